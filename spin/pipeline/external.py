"""Optional stages that measure a policy: benchmarks, MT-Bench, and comparison by a judge."""

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from spin.config.schema import Config
from spin.evaluation.external import harness, judges, mt_bench
from spin.models.load import load_tokenizer
from spin.models.policy import Policy, auxiliary_digest
from spin.pipeline.context import Run
from spin.pipeline.evaluate import Evaluate, Evaluation
from spin.pipeline.stage import Measurement, PolicySource, Work
from spin.runtime.errors import UserError
from spin.runtime.store import Artifact


def declare_external(
    config: Config, iteration: int | None, policy: PolicySource, evaluation: Evaluate | None, opponent: Evaluate | None
) -> list["External"]:
    """Return the external evaluations of a policy that the settings request."""
    settings = config.evaluation
    stages: list[External] = [
        Benchmark(iteration, policy, task) for task in harness.parse_tasks(settings.harness or [])
    ]
    if settings.questions:
        stages.append(MtBench(iteration, policy))
    if settings.judge and evaluation and opponent:
        stages.append(Compare(iteration, policy, evaluation, opponent))
    return stages


class External(Measurement[Any]):
    """An external evaluation of `policy`."""

    may_fail: ClassVar[tuple[type[UserError], ...]] = (judges.JudgeError,)
    result_file: ClassVar[str]

    def write(self, work: Work, result: Any) -> None:
        (work.folder / self.result_file).write_text(json.dumps(result, indent=2) + "\n")

    def read(self, run: Run, artifact: Artifact, *args, **needs) -> Any:
        return json.loads((artifact.folder / self.result_file).read_text())

    def write_files(self, result: Any, run: Run) -> None:
        """Write files for other programs to the run's folder."""


@dataclass(frozen=True, eq=False)
class Benchmark(External):
    """One task of the lm-evaluation-harness. Each task is a stage, so that an interrupted run keeps finished tasks."""

    name, title_format = "harness", "{stage.task.task} of {stage.policy.label}"
    result_file = "result.json"
    task: harness.Task

    def inputs(self, run: Run, policy: Policy) -> dict:
        settings = run.config.evaluation
        return {
            "policy": policy.id,
            "files": auxiliary_digest(policy.tokenizer),
            "harness": harness.identity(self.task, settings.harness_include),
            "limit": settings.harness_limit,
            "batch_size": settings.harness_batch_size,  # changes rounding
            "seed": run.config.seed,
            **device_inputs(run),
        }

    def build(self, run: Run, work: Work, policy: Policy) -> dict:
        run.release()  # the loaded model may use another attention implementation, which rounds differently
        row = harness.run_task(
            self.task,
            run.load(policy),
            load_tokenizer(policy.tokenizer),
            run.config.evaluation,
            run.config.seed,
            run.say,
            run.ranks,
        )
        run.release()
        self.write(work, row)
        work.log({"step": 0, f"{self.task.task}/{self.task.metric.partition(':')[0]}": row["value"]})
        return {"value": row["value"]}


class MtBench(External):
    """Answers to the MT-Bench questions in FastChat's format, graded if there is a judge."""

    name, title_format = "mt_bench", "MT-Bench of {stage.policy.label}"
    result_file = "mt_bench.json"

    def inputs(self, run: Run, policy: Policy) -> dict:
        config, settings = run.config, run.config.evaluation
        questions = mt_bench.read_questions(settings.questions)
        judge: dict[str, Any] = {"judge": None}
        if settings.judge:
            grading = mt_bench.read_grading(str(settings.questions), questions)
            judge = {"judge": judges.identity(settings.judge, settings.judge_model), "grading": grading}
        return {
            "policy": policy.id,
            "files": auxiliary_digest(run.start.tokenizer),
            "questions": [asdict(question) for question in questions],
            "template": config.data.template,
            **({"template_options": config.data.template_options} if config.data.template_options else {}),
            "stop_ids": sorted(run.stop_ids),
            "max_new_tokens": config.generation.max_new_tokens or mt_bench.MAX_TOKENS,
            "batch_size": config.generation.batch_size,  # changes rounding, as `tokens` does
            "tokens": config.generation.tokens,
            "seed": config.seed,
            **device_inputs(run),
            **judge,
            "bootstrap": settings.bootstrap,
        }

    def build(self, run: Run, work: Work, policy: Policy) -> dict:
        config, settings = run.config, run.config.evaluation
        questions = mt_bench.read_questions(settings.questions)
        with run.progress(self.title, mt_bench.TURNS * len(questions), "answers") as bar:
            answers = mt_bench.answer_questions(
                run.load(policy),
                run.tokenizer,
                questions,
                config,
                run.stop_ids,
                bar.advance,
                run.say,
                lambda part: work.shards(f"answers/{part}", bar),
                run.ranks.size,
            )
        result: dict[str, Any] = {"answers": answers, "verdicts": None, "score": None}
        if settings.judge:
            grading, judge = mt_bench.read_grading(str(settings.questions), questions), open_judge(run)
            with run.progress(f"{self.title}: judge", mt_bench.TURNS * len(answers), "verdicts") as bar:
                shards = work.shards("verdicts", bar)
                result["verdicts"] = mt_bench.grade_answers(answers, questions, grading, judge, bar.advance, shards)
            result["score"] = score = mt_bench.mt_bench_score(result["verdicts"], settings.bootstrap, config.seed)
            work.log({"step": 0, **{key: value for key, value in score.items() if key != "by_category"}})
        self.write(work, result)
        return {"answers": len(answers), "score": result["score"] and result["score"]["score"]}

    def write_files(self, result: dict, run: Run) -> None:
        model_id = f"{run.config.name}-{self.policy.label.replace('/', '-')}"
        mt_bench.write_answers(result["answers"], model_id, run.folder / "mt_bench")


@dataclass(frozen=True, eq=False)
class Compare(External):
    """A judge's preference between the held-out answers of a policy and those of its opponent."""

    name, title_format = "compare", "judge {stage.policy.label} against {stage.opponent.policy.label}"
    result_file = "comparison.json"
    evaluation: Evaluate
    opponent: Evaluate

    def inputs(self, run: Run, policy: Policy, evaluation: Evaluation, opponent: Evaluation) -> dict:
        settings = run.config.evaluation
        return {
            "answers": evaluation.held_out.pairs.digest,
            "opponents": opponent.held_out.pairs.digest,
            "judge": judges.identity(str(settings.judge), settings.judge_model),
            "prompt": judges.PAIR,
            **device_inputs(run),
            "bootstrap": settings.bootstrap,
            "seed": run.config.seed,
        }

    def build(self, run: Run, work: Work, policy: Policy, evaluation: Evaluation, opponent: Evaluation) -> dict:
        judge, pairs = open_judge(run), evaluation.held_out.pairs
        with run.progress(self.title, len(pairs), "prompts") as bar:
            comparison = judges.compare(
                [pair.prompt for pair in pairs],
                [pair.generated for pair in pairs],
                [pair.generated for pair in opponent.held_out.pairs],
                judge,
                run.config.seed,
                run.config.evaluation.bootstrap,
                bar.advance,
                work.shards("verdicts", bar),
            )
        self.write(work, comparison)
        work.log({"step": 0, **{key: value for key, value in comparison.items() if key != "outcomes"}})
        return {"win_rate": comparison["win_rate"], "n": comparison["n"]}

    def read(self, run: Run, artifact: Artifact, **needs) -> dict:
        comparison = super().read(run, artifact)
        names = [self.policy.label, self.opponent.policy.label]  # specific to this run, therefore not in the artifact
        return {**comparison, "names": names, "finding": judges.finding(comparison, *names)}


def device_inputs(run: Run) -> dict:
    """Return the settings that determine the bits of a forward pass of the model as transformers loads it."""
    return {key: run.numerics[key] for key in ("precision", "device")}


def open_judge(run: Run) -> judges.Judge:
    """Return the judge that the settings name. Releases the loaded model, because the judge may be a local model."""
    settings = run.config.evaluation
    run.release()
    return judges.open_judge(str(settings.judge), settings.judge_model, settings.judge_timeout, run.dtype, run.device)
