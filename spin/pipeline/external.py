"""The external evaluations as stages: benchmarks, MT-Bench, a judge's preference.

Each has `<name>_inputs` (what decides its content), `build_<name>` (fills the stage's folder and returns facts) and
`read_<name>` (the result of a finished stage).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin.config.schema import Config
from spin.evaluation.external import harness, judges, mt_bench
from spin.method.pairs import Pair
from spin.models.load import load_tokenizer
from spin.models.policy import Policy
from spin.runtime.shards import ResumableShards
from spin.runtime.store import Artifact
from spin.runtime.tables import fingerprint

MT_BENCH_TOKENS = 1024  # of an answer, as in FastChat


class Context(Protocol):
    """What these stages need of the run."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    numerics: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    say: Callable[[str], None]
    progress: Callable[[str, int, str], Any]  # title, total, unit -> a bar, used in `with`

    def load_model(self, policy: Policy) -> PreTrainedModel: ...
    def release(self) -> None: ...  # takes the model out of memory


class Work(Protocol):
    """What a stage is built with: its folder, a folder to resume from, a log of metrics, the seconds of earlier tries."""

    folder: Path
    resume: Path
    log: Callable[[dict], None]

    def earlier(self, seconds: float) -> None: ...


@dataclass(frozen=True)
class Exams:
    """The results of a policy, None for those that are not configured."""

    harness: list[dict] | None = None
    mt_bench: dict | None = None
    comparison: dict | None = None


def check(config: Config) -> None:
    """Raise UserError, before anything long, if something that the evaluations need is missing or does not fit."""
    evaluation = config.evaluation
    if evaluation.harness:
        harness.check_tasks(harness.parse_tasks(evaluation.harness), evaluation.harness_include)
    if evaluation.judge is not None:
        judges.identity(evaluation.judge, evaluation.judge_model)
    if evaluation.questions is not None or evaluation.name == "mt_bench":
        questions = mt_bench.read_questions(evaluation.questions)
        if evaluation.judge is not None:
            mt_bench.read_grading(str(evaluation.questions), questions)


def _numerics(context: Context) -> dict[str, Any]:
    return {key: context.numerics[key] for key in ("precision", "device")}


def _write(path: Path, result: Any) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n")


def _open_judge(context: Context) -> judges.Judge:
    evaluation = context.config.evaluation
    context.release()
    return judges.open_judge(
        str(evaluation.judge), evaluation.judge_model, evaluation.judge_timeout, context.dtype, context.device
    )


# --- benchmarks: a stage for each task ----------------------------------------------------------------------------------


def harness_inputs(context: Context, policy: Policy, task: harness.Task) -> dict[str, Any]:
    evaluation = context.config.evaluation
    return {
        "policy": policy.id,
        "harness": harness.identity(task, evaluation.harness_include),
        "limit": evaluation.harness_limit,
        "batch_size": evaluation.harness_batch_size,  # changes roundings
        "seed": context.config.seed,
        **_numerics(context),
    }


def build_harness(work: Work, context: Context, policy: Policy, task: harness.Task) -> dict[str, Any]:
    evaluation = context.config.evaluation
    context.release()  # a model that was used has another attention, which may round otherwise
    row = harness.run_task(
        task,
        context.load_model(policy),
        load_tokenizer(policy.tokenizer),
        evaluation.harness_include,
        evaluation.harness_limit,
        evaluation.harness_batch_size,
        context.config.seed,
        context.say,
    )
    context.release()
    _write(work.folder / "result.json", row)
    work.log({"step": 0, f"{task.task}/{task.metric.partition(':')[0]}": row["value"]})
    return {"value": row["value"]}


def read_harness(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / "result.json").read_text())


# --- MT-Bench -----------------------------------------------------------------------------------------------------------


def mt_bench_inputs(context: Context, policy: Policy) -> dict[str, Any]:
    config, evaluation = context.config, context.config.evaluation
    questions = mt_bench.read_questions(evaluation.questions)
    graded = (
        {
            "judge": judges.identity(evaluation.judge, evaluation.judge_model),
            "grading": mt_bench.read_grading(str(evaluation.questions), questions),
        }
        if evaluation.judge
        else {"judge": None}
    )
    return {
        "policy": policy.id,
        "questions": [asdict(question) for question in questions],
        "template": config.data.template,
        "stop_ids": sorted(context.stop_ids),
        "max_new_tokens": config.generation.max_new_tokens or MT_BENCH_TOKENS,
        "batch_size": config.generation.batch_size,  # changes roundings
        "seed": config.seed,
        **_numerics(context),
        **graded,
        "bootstrap": evaluation.bootstrap,
    }


def build_mt_bench(work: Work, context: Context, policy: Policy, title: str) -> dict[str, Any]:
    config, evaluation = context.config, context.config.evaluation
    questions = mt_bench.read_questions(evaluation.questions)

    def keep(part: str) -> ResumableShards:
        return ResumableShards(work.resume / "answers" / part, context.say, lambda rows, seconds: work.earlier(seconds))

    with context.progress(title, mt_bench.TURNS * len(questions), "answers") as bar:
        answers = mt_bench.answer_questions(
            context.load_model(policy),
            context.tokenizer,
            questions,
            config.data.template,
            context.stop_ids,
            config.generation,
            config.generation.max_new_tokens or MT_BENCH_TOKENS,
            config.seed,
            bar.advance,
            context.say,
            keep,
        )
    result: dict[str, Any] = {"answers": answers, "verdicts": None, "score": None}
    if evaluation.judge:
        grading, judge = mt_bench.read_grading(str(evaluation.questions), questions), _open_judge(context)
        with context.progress(f"{title}: judge", mt_bench.TURNS * len(answers), "verdicts") as bar:
            shards = ResumableShards(work.resume / "verdicts", context.say, lambda rows, seconds: bar.skip(rows))
            result["verdicts"] = mt_bench.grade_answers(answers, questions, grading, judge, bar.advance, shards)
        result["score"] = score = mt_bench.mt_bench_score(result["verdicts"], evaluation.bootstrap, config.seed)
        work.log({"step": 0, **{key: value for key, value in score.items() if key != "by_category"}})
    _write(work.folder / "mt_bench.json", result)
    return {"answers": len(answers), "score": result["score"] and result["score"]["score"]}


def read_mt_bench(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / "mt_bench.json").read_text())


def write_answers(result: dict, name: str, folder: Path) -> None:
    """MT-Bench answers as FastChat reads them, under the model's `name`."""
    mt_bench.write_answers(result["answers"], name, folder)


# --- a judge's preference between a policy and its opponent -------------------------------------------------------------


def compare_inputs(context: Context, pairs: Sequence[Pair], opponents: Sequence[Pair]) -> dict[str, Any]:
    evaluation = context.config.evaluation
    return {
        "answers": fingerprint(pairs),
        "opponents": fingerprint(opponents),
        "judge": judges.identity(str(evaluation.judge), evaluation.judge_model),
        **_numerics(context),
        "bootstrap": evaluation.bootstrap,
        "seed": context.config.seed,
    }


def build_compare(
    work: Work, context: Context, pairs: Sequence[Pair], opponents: Sequence[Pair], title: str
) -> dict[str, Any]:
    judge, config = _open_judge(context), context.config
    with context.progress(title, len(pairs), "prompts") as bar:

        def found(rows: int, seconds: float) -> None:
            bar.skip(rows)
            work.earlier(seconds)

        comparison = judges.compare(
            [pair.prompt for pair in pairs],
            [pair.generated for pair in pairs],
            [pair.generated for pair in opponents],
            judge,
            config.seed,
            config.evaluation.bootstrap,
            bar.advance,
            ResumableShards(work.resume / "verdicts", context.say, found),
        )
    _write(work.folder / "comparison.json", comparison)
    work.log({"step": 0, **{key: value for key, value in comparison.items() if key != "outcomes"}})
    return {"win_rate": comparison["win_rate"], "n": comparison["n"]}


def read_compare(artifact: Artifact, policy: str, opponent: str) -> dict[str, Any]:
    """The comparison, with the labels of this run, which are no part of what made the stage."""
    comparison = json.loads((artifact.folder / "comparison.json").read_text())
    return {**comparison, "names": [policy, opponent], "finding": judges.finding(comparison, policy, opponent)}
