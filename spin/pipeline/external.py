"""What a policy is examined with beside the held-out measures: benchmarks, MT-Bench, a judge's preference. All optional.

Each is a stage like the others: found again by what makes it, and resumed where it was cut.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.config.schema import Config
from spin.evaluation.external import harness, mt_bench
from spin.evaluation.external import judges as judge
from spin.models.policy import Policy
from spin.runtime.shards import ResumableShards
from spin.runtime.tables import fingerprint

if TYPE_CHECKING:
    from spin.pipeline.stages import Evaluated, Stages, Work

MT_BENCH_TOKENS = 1024  # of an answer, as in FastChat


@dataclass(frozen=True)
class Exams:
    """What came out, None for what was not asked for: rows of `harness.run`, `mt_bench_score` with the answers, and a
    `judge.Comparison` with the opponent."""

    harness: list[dict] | None = None
    mt_bench: dict | None = None
    comparison: dict | None = None


def check(config: Config) -> None:
    """Before anything long is begun: raise UserError if what `config` asks for is not there, or does not go together."""
    asked = config.evaluation
    if asked.harness:
        harness.check_tasks(harness.parse_tasks(asked.harness), asked.harness_include)
    if asked.questions is not None:
        mt_bench.read_questions(asked.questions)
    if asked.judge is not None:
        judge.identity(asked.judge, asked.judge_model)
    if asked.name == "mt_bench" and asked.questions is None:
        mt_bench.read_questions(None)  # says where to get them


def run_harness(stages: "Stages", policy: Policy, iteration: int | None) -> list[dict]:
    """The policy's benchmarks: rows of `harness.run`. A stage for each task, so that a run that is cut keeps those it has."""
    asked = stages.config.evaluation
    return [_run_task(stages, policy, iteration, task) for task in harness.parse_tasks(asked.harness or [])]


def _run_task(stages: "Stages", policy: Policy, iteration: int | None, task: harness.Task) -> dict:
    asked = stages.config.evaluation
    inputs = {
        "policy": policy.id,
        "harness": harness.identity([task], asked.harness_include),
        "limit": asked.harness_limit,
        "batch_size": asked.harness_batch_size,  # by rounding
        "seed": stages.config.seed,
        "precision": stages.numerics["precision"],
        "device": stages.device.type,
    }
    title = f"{task.name} of {policy.label}"

    def build(work: "Work") -> dict:
        stages.release()
        (row,) = harness.run_tasks(
            policy,
            [task],
            asked.harness_include,
            asked.harness_limit,
            asked.harness_batch_size,
            stages.dtype,
            stages.device,
            stages.config.seed,
            lambda text: stages.tracker.say(f"{title}: {text}"),
        )
        (work.folder / "result.json").write_text(json.dumps(row, indent=2) + "\n")
        work.log({"step": 0, f"{task.name}/{task.metric.partition(':')[0]}": row["value"]})
        return {"value": row["value"]}

    stage = stages.stage("harness", title, {"iter": iteration, "policy": policy.label}, inputs, build, by_rank_0=True)
    return json.loads((stage.folder / "result.json").read_text())


def run_mt_bench(stages: "Stages", policy: Policy, iteration: int | None) -> dict:
    """The policy's answers to MT-Bench's questions in FastChat's layout, and the judge's grades where there is one."""
    config = stages.config
    asked = config.evaluation
    questions = mt_bench.read_questions(asked.questions)
    tokens = config.generation.max_new_tokens or MT_BENCH_TOKENS
    inputs = {
        "policy": policy.id,
        "questions": [asdict(question) for question in questions],
        "template": config.data.template,
        "stop_ids": sorted(stages.stop_ids),
        "max_new_tokens": tokens,
        "batch_size": config.generation.batch_size,  # by rounding
        "seed": config.seed,
        "precision": stages.numerics["precision"],
        "device": stages.device.type,
        "judge": judge.identity(asked.judge, asked.judge_model) if asked.judge else None,
        "bootstrap": asked.bootstrap,
    }
    title = f"MT-Bench of {policy.label}"

    def build(work: "Work") -> dict:
        say = stages.tracker.say

        def keep(part: str) -> ResumableShards:
            return ResumableShards(work.resume / "answers" / part, say, lambda rows, seconds: work.earlier(seconds))

        with stages.tracker.progress(title, mt_bench.TURNS * len(questions), "answers") as bar:
            rows = mt_bench.answer(
                stages.model(policy),
                stages.tokenizer,
                questions,
                config.data.template,
                stages.stop_ids,
                config.generation,
                tokens,
                config.seed,
                bar.advance,
                say=say,
                keep=keep,
            )
        stages.release()
        result: dict[str, Any] = {"answers": rows, "verdicts": None, "score": None}
        if asked.judge:
            somebody = _open(stages)
            with stages.tracker.progress(f"{title}: judge", mt_bench.TURNS * len(rows), "verdicts") as bar:
                shards = ResumableShards(work.resume / "verdicts", say, lambda rows, seconds: bar.skip(rows))
                verdicts = mt_bench.judge_answers(rows, questions, somebody, say, advance=bar.advance, keep=shards)
            score = mt_bench.mt_bench_score(verdicts, asked.bootstrap, config.seed)
            result |= {"verdicts": verdicts, "score": score}
            work.log({"step": 0, **{key: value for key, value in score.items() if key != "by_category"}})
        (work.folder / "mt_bench.json").write_text(json.dumps(result, indent=2) + "\n")
        return {"answers": len(rows), "score": result["score"] and result["score"]["score"]}

    stage = stages.stage("mt_bench", title, {"iter": iteration, "policy": policy.label}, inputs, build, by_rank_0=True)
    return json.loads((stage.folder / "mt_bench.json").read_text())


def run_comparison(
    stages: "Stages", policy: Policy, iteration: int | None, now: "Evaluated", before: "Evaluated"
) -> dict:
    """Which answers to the held-out prompts a judge prefers: this policy's or its opponent's. See `judge.compare`."""
    asked, seed = stages.config.evaluation, stages.config.seed
    assert asked.judge is not None
    pairs = list(zip(now.held_out.pairs, before.held_out.pairs, strict=True))
    inputs = {
        "answers": fingerprint([one for one, _ in pairs]),
        "opponents": fingerprint([other for _, other in pairs]),
        "judge": judge.identity(asked.judge, asked.judge_model),
        "precision": stages.numerics["precision"],
        "device": stages.device.type,
        "bootstrap": asked.bootstrap,
        "seed": seed,
    }
    title = f"{policy.label} against {before.policy.label}"

    def build(work: "Work") -> dict:
        stages.release()
        somebody = _open(stages)
        with stages.tracker.progress(f"judge {title}", len(pairs), "prompts") as bar:

            def found(rows: int, seconds: float) -> None:
                bar.skip(rows)
                work.earlier(seconds)

            comparison = judge.compare(
                [one.prompt for one, _ in pairs],
                [one.generated for one, _ in pairs],
                [other.generated for _, other in pairs],
                somebody,
                seed,
                asked.bootstrap,
                advance=bar.advance,
                keep=ResumableShards(work.resume / "verdicts", stages.tracker.say, found),
            )
        result = asdict(comparison)
        (work.folder / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
        work.log({"step": 0, **{k: v for k, v in result.items() if k not in ("outcomes", "names")}})
        return {"win_rate": comparison.win_rate, "n": comparison.n}

    labels = {"iter": iteration, "policy": policy.label}
    stage = stages.stage("compare", f"judge {title}", labels, inputs, build, by_rank_0=True)
    result = json.loads((stage.folder / "comparison.json").read_text())
    # Labels are this run's, not part of what made the stage.
    comparison = judge.Comparison(**{**result, "names": (policy.label, before.policy.label)})
    return {**asdict(comparison), "finding": comparison.finding}


def _open(stages: "Stages") -> Any:
    asked = stages.config.evaluation
    assert asked.judge is not None
    return judge.open_judge(
        asked.judge, asked.judge_model, asked.judge_timeout, dtype=stages.dtype, device=stages.device
    )


def write_answers(result: dict, name: str, folder: Path) -> None:
    """MT-Bench answers as FastChat reads them, under a name that people know the model by."""
    mt_bench.write([{**row, "model_id": name} for row in result["answers"]], folder)
