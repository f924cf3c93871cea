"""The stages that produce a model: SFT, the training of an iteration, and the merging of an adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from spin.config.schema import value_at_iteration
from spin.engines.disk import fp32_bytes, training_bytes
from spin.engines.packing import Continuations
from spin.generation.answers import Answer
from spin.method.objectives import Objective, make_objective
from spin.method.pairs import group_by_prompt
from spin.method.training import train_sft, train_spin
from spin.models.find import fresh_adapter
from spin.models.policy import TRAINED_ON, Policy, auxiliary_digest, content_id, note_trained_on, trained_on
from spin.models.save import save_merged, write_stop_ids
from spin.pipeline.context import Run
from spin.pipeline.generate import Generate
from spin.pipeline.probes import lora_settings
from spin.pipeline.score import Score, Scores
from spin.pipeline.stage import Stage, Work
from spin.runtime.artifacts import folder_size
from spin.runtime.checkpoints import Checkpoints, TrainState
from spin.runtime.random import seed_of
from spin.runtime.signals import deferred
from spin.runtime.store import Artifact
from spin.runtime.tables import Lazy, Rows

# Names of random streams, besides the iterations, which count from 0.
SFT_STREAM, ADAPTER_STREAM = -1, -3
# The values shown beside the progress bar, and their columns in the rows of metrics.
SHOWN = {"loss": "loss", "margin": "rewards/margins"}


class Training(Stage[Policy]):
    """A stage that trains a new policy, starting from `policy`."""

    @property
    def label(self) -> str:
        return "sft" if self.iteration is None else f"iter{self.iteration}"

    def settings(self, run: Run) -> dict:
        """Return the settings of the training loop."""
        config, schedule, t = run.config, run.config.schedule, self.iteration
        return {
            "lr": schedule.sft_lr if t is None else value_at_iteration(config.optimizer.lr, t),
            "epochs": schedule.sft_epochs if t is None else value_at_iteration(schedule.epochs, t),
            "batch_size": schedule.batch_size,
            "warmup_ratio": schedule.warmup_ratio,
            "seed": seed_of(config.seed, SFT_STREAM if t is None else t, bits=32),
        }

    def inputs(self, run: Run, policy: Policy, *args: Any, **needs: Any) -> dict:
        return {"start": policy.id, **self.settings(run), **training_inputs(run, policy)}

    def loop(self, run: Run, *args: Any, **needs: Any) -> tuple[Callable[..., TrainState], int]:
        """Return the training loop with its data bound, and the number of prompts."""
        raise NotImplementedError

    def build(self, run: Run, work: Work, policy: Policy, *args: Any, **needs: Any) -> dict:
        """Train, resuming from a checkpoint if there is one, and save the policy."""
        ranks, settings, checkpoint = run.ranks, self.settings(run), run.config.checkpoint
        loop, prompts = self.loop(run, **needs)
        start = ranks.broadcast(_prepare_start(run, work, policy) if ranks.is_main_process else None)
        checkpoints = Checkpoints(work.resume / "training", checkpoint.minutes, checkpoint.steps, run.say, ranks)
        engine = run.engine(start)
        forward = run.forward(engine.model, start)
        with run.tracker.progress(self.title, max(1, round(prompts * settings["epochs"])), "prompts") as bar:

            def log(row: dict) -> None:
                work.log(row)
                if row["step"] < checkpoints.restored.step:
                    bar.skip(row["prompts"])
                else:
                    bar.advance(row["prompts"], **{name: row[key] for name, key in SHOWN.items() if key in row})

            state = loop(engine, forward=forward, log=log, checkpoints=checkpoints, **settings)
        work.earlier_seconds += checkpoints.restored.seconds
        folder = work.folder / "policy"
        with checkpoints.write_on_interrupt(engine, state, state.step), deferred():
            engine.save(folder)
        checkpoints.close()
        engine.close()
        if not ranks.is_main_process:
            return {}
        write_stop_ids(folder, run.stop_ids)
        note_trained_on(folder, trained_on(start.folder_with(TRAINED_ON)) | {*run.data.train.column("opening")})
        return {"policy": content_id(folder, start.base), "skipped_steps": state.skipped}

    def read(self, run: Run, artifact: Artifact, *args: Any, **needs: Any) -> Policy:
        base = run.start.base_or_self if run.config.model.adapter == "lora" else None
        return Policy(self.label, artifact.folder / "policy", artifact.manifest["facts"]["policy"], base)


class Sft(Training):
    """Fine-tuning of the start on the human answers: the paper's first opponent is a model fine-tuned on the same data."""

    name, title_format = "sft", "SFT"

    def inputs(self, run: Run, policy: Policy) -> dict:
        return super().inputs(run, policy) | {"examples": run.data.train.digest}

    def loop(self, run: Run) -> tuple[Callable[..., TrainState], int]:
        train_set = run.data.train

        def make(row: int) -> Continuations:
            return Continuations((example := train_set[row]).prompt_ids, (example.real_ids,))

        return partial(train_sft, items=Lazy(len(train_set), make)), len(train_set)


@dataclass(frozen=True, eq=False)
class Train(Training):
    """The training of the main player: it starts as the opponent `policy` and learns to distinguish human answers.

    `scores` holds the pairs' log-probs by model, `first` iteration 0's answers if the objective needs them.
    """

    name = "train"
    iteration: int
    scores: Mapping[str, Score]
    first: Generate | None = None

    def objective(self, run: Run) -> Objective:
        return make_objective(run.config.loss, self.iteration, run.config.generation.num_answers)

    def inputs(self, run: Run, policy: Policy, scores: Mapping[str, Scores], first: Rows[Answer] | None = None) -> dict:
        inputs = super().inputs(run, policy) | {
            "scores": {model: score.key for model, score in scores.items()},
            "objective": self.objective(run).settings,
        }
        return inputs if first is None else inputs | {"first": first.digest}

    def loop(
        self, run: Run, scores: Mapping[str, Scores], first: Rows[Answer] | None = None
    ) -> tuple[Callable[..., TrainState], int]:
        pairs = scores["opponent"].pairs
        loop = partial(
            train_spin,
            pairs=pairs,
            references={model: score.logps for model, score in scores.items()},
            objective=self.objective(run),
            first=None if first is None else {(answer.id, answer.index): answer.ids for answer in first},
        )
        return loop, len(group_by_prompt(pairs))


class Merge(Stage[Artifact]):
    """The merging of the policy's adapter into its base: a complete model folder, `merged/` in the artifact."""

    name = "merge"

    def inputs(self, run: Run, policy: Policy) -> dict:
        files = auxiliary_digest(run.start.tokenizer)
        return {"policy": policy.id, "files": files, "stop_ids": sorted(run.stop_ids)}

    def build(self, run: Run, work: Work, policy: Policy) -> dict:
        run.release()
        if run.ranks.is_main_process:
            run.store.check_free(fp32_bytes(policy.base_or_self.folder), self.title)
            save_merged(policy, work.folder / "merged")
            write_stop_ids(work.folder / "merged", run.stop_ids)
        return {}

    def read(self, run: Run, artifact: Artifact, policy: Policy) -> Artifact:
        return artifact


def training_inputs(run: Run, start: Policy) -> dict:
    """Return the inputs that determine the weights, other than the data and the schedule."""
    config = run.config
    # The files besides the weights (tokenizer, template, ...) are copied to every policy.
    inputs: dict[str, Any] = {
        "optimizer": config.optimizer.model_dump() | {"lr": None},
        "numerics": run.numerics,
        "files": auxiliary_digest(run.start.tokenizer),
    }
    if config.engine.compile:
        inputs["compile"] = True
    if config.engine.name != "single":  # the number of ranks affects only rounding, as the number of threads does
        inputs["engine"] = config.engine.name
    if config.model.adapter == "lora" and not start.base:  # a fresh adapter; an existing one has its own settings
        lora = lora_settings(config.model)
        inputs["adapter"] = {**vars(lora), "seed": config.seed}
    return inputs


def _prepare_start(run: Run, work: Work, start: Policy) -> Policy:
    """Check the free disk space, and return the start, with a fresh adapter if the settings require one."""
    needed = run.policy_bytes + training_bytes(run.policy_bytes, run.config.optimizer) - folder_size(work.resume)
    run.store.check_free(needed, f"{work.stage.title}: a policy and its checkpoints")
    model = run.config.model
    if model.adapter == "none" or start.base:
        return start
    seed = seed_of(run.config.seed, ADAPTER_STREAM, bits=32)
    return fresh_adapter(start, lora_settings(model), seed, model, work.resume / "adapter")
