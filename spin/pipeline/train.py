"""The stages that make a policy: supervised fine-tuning, the training of an iteration, and merging an adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from spin.pipeline.probes import lora_settings
from spin.pipeline.score import Scores
from spin.pipeline.stage import Node, Stage, Work
from spin.runtime.artifacts import folder_size
from spin.runtime.checkpoints import Checkpoints, TrainState
from spin.runtime.random import seed_of
from spin.runtime.signals import deferred
from spin.runtime.store import Artifact
from spin.runtime.tables import Lazy, Rows

# Parts of the random stream beside the iterations, which count from 0.
SFT_STREAM, ADAPTER_STREAM = -1, -3


class Training(Stage[Policy]):
    """A stage that trains a policy from `policy`."""

    @property
    def label(self) -> str:
        return "sft" if self.iteration is None else f"iter{self.iteration}"

    def read(self, run: Run, artifact: Artifact, **needs) -> Policy:
        base = run.start.base_or_self if run.config.model.adapter == "lora" else None
        return Policy(self.label, artifact.folder / "policy", artifact.manifest["facts"]["policy"], base)


class Sft(Training):
    """Fine-tune the start on the human answers: iteration 0's opponent is an SFT model of the same data."""

    name, title = "sft", "SFT"

    def settings(self, run: Run) -> dict:
        schedule = run.config.schedule
        return {
            "lr": schedule.sft_lr,
            "epochs": schedule.sft_epochs,
            "batch_size": schedule.batch_size,
            "warmup_ratio": schedule.warmup_ratio,
            "seed": seed_of(run.config.seed, SFT_STREAM, bits=32),
        }

    def inputs(self, run: Run, policy: Policy) -> dict:
        examples = run.data.train.digest
        return {"start": policy.id, "examples": examples, **self.settings(run), **training_inputs(run, policy)}

    def build(self, run: Run, work: Work, policy: Policy) -> dict:
        train_set = run.data.train

        def make(row: int) -> Continuations:
            return Continuations((example := train_set[row]).prompt_ids, (example.real_ids,))

        items = Lazy(len(train_set), make)
        settings = self.settings(run)

        def train(engine, **common) -> TrainState:
            return train_sft(engine, items, **common, **settings)

        return train_policy(run, work, policy, train, round(len(items) * settings["epochs"]), {"loss": "loss"})


@dataclass(frozen=True, eq=False)
class Train(Training):
    """The main player: starts as the opponent `policy` and learns to tell its answers from the human ones.

    `scores` are the pairs' log-probs by the model that gave them, `first` iteration 0's answers; the objective says which
    it needs.
    """

    name = "train"
    iteration: int
    scores: Mapping[str, Node[Scores]]
    first: Node[Rows[Answer]] | None = None

    def objective(self, run: Run) -> Objective:
        return make_objective(run.config.loss, self.iteration, run.config.generation.num_answers)

    def settings(self, run: Run) -> dict:
        config, t = run.config, self.iteration
        return {
            "lr": value_at_iteration(config.optimizer.lr, t),
            "epochs": value_at_iteration(config.schedule.epochs, t),
            "batch_size": config.schedule.batch_size,
            "warmup_ratio": config.schedule.warmup_ratio,
            "seed": seed_of(config.seed, t, bits=32),
        }

    def inputs(self, run: Run, policy: Policy, scores: Mapping[str, Scores], first: Rows[Answer] | None = None) -> dict:
        inputs = {
            "start": policy.id,
            "scores": {model: score.key for model, score in scores.items()},
            "objective": self.objective(run).settings,
            **self.settings(run),
            **training_inputs(run, policy),
        }
        return inputs if first is None else inputs | {"first": first.digest}

    def build(
        self, run: Run, work: Work, policy: Policy, scores: Mapping[str, Scores], first: Rows[Answer] | None = None
    ) -> dict:
        pairs, objective, settings = scores["opponent"].pairs, self.objective(run), self.settings(run)
        references = {model: score.logps for model, score in scores.items()}
        first_ids = {(answer.id, answer.index): answer.ids for answer in first or ()}

        def train(engine, **common) -> TrainState:
            return train_spin(engine, pairs, references, objective, first=first_ids, **common, **settings)

        prompts = round(len(group_by_prompt(pairs)) * settings["epochs"])
        return train_policy(run, work, policy, train, prompts, {"loss": "loss", "margin": "rewards/margins"})


class Merge(Stage[Artifact]):
    """The policy's adapter merged into its base: a complete model folder, `merged/` in the artifact."""

    name = "merge"

    def inputs(self, run: Run, policy: Policy) -> dict:
        return {"policy": policy.id}

    def build(self, run: Run, work: Work, policy: Policy) -> dict:
        run.models.release()
        if run.ranks.is_main_process:
            run.store.check_free(fp32_bytes(policy.base_or_self.folder), self.title)
            save_merged(policy, work.folder / "merged")
            write_stop_ids(work.folder / "merged", run.stop_ids)
        return {}

    def read(self, run: Run, artifact: Artifact, policy: Policy) -> Artifact:
        return artifact


def training_inputs(run: Run, start: Policy) -> dict:
    """What decides the weights beside the data and the schedule."""
    config = run.config
    # The files beside the weights (tokenizer, template, ...) are copied to every policy.
    inputs: dict[str, Any] = {
        "optimizer": config.optimizer.model_dump() | {"lr": None},
        "numerics": run.numerics,
        "files": auxiliary_digest(run.start.tokenizer),
    }
    if config.engine.compile:
        inputs["compile"] = True
    if config.engine.name != "single":  # the number of ranks changes rounding only, as threads do
        inputs["engine"] = config.engine.name
    if config.model.adapter == "lora" and not start.base:  # a fresh adapter; a given one has its own settings
        lora = lora_settings(config.model)
        inputs["adapter"] = {**vars(lora), "seed": config.seed}
    return inputs


def train_policy(
    run: Run, work: Work, start: Policy, train: Callable[..., TrainState], prompts: int, shown: dict[str, str]
) -> dict:
    """Train from `start` with `train`, resuming from a checkpoint, and save the policy. Returns facts.

    `prompts` is the length of the progress bar, `shown` the values beside it: their names, and their columns in the rows.
    """
    start = run.ranks.broadcast(_prepare_start(run, work, start) if run.ranks.is_main_process else None)
    settings = run.config.checkpoint
    checkpoints = Checkpoints(work.resume / "training", settings.minutes, settings.steps, run.say, run.ranks)
    engine = run.models.engine(start)
    with run.tracker.progress(work.stage.title, max(1, prompts), "prompts") as bar:

        def log(row: dict) -> None:
            work.log(row)
            if row["step"] < checkpoints.restored.step:
                bar.skip(row["prompts"])
            else:
                bar.advance(row["prompts"], **{name: row[column] for name, column in shown.items()})

        state = train(engine, forward=run.models.forward(engine.model, start), log=log, checkpoints=checkpoints)
    work.earlier_seconds += checkpoints.restored.seconds
    folder = work.folder / "policy"
    with checkpoints.write_on_interrupt(engine, state, state.step), deferred():
        engine.save(folder)
    checkpoints.close()
    engine.close()
    if not run.ranks.is_main_process:
        return {}
    write_stop_ids(folder, run.stop_ids)
    prompts_seen = trained_on(start.folder_with(TRAINED_ON)) | {*run.data.train.column("opening")}
    note_trained_on(folder, prompts_seen)
    return {"policy": content_id(folder, start.base), "skipped_steps": state.skipped}


def _prepare_start(run: Run, work: Work, start: Policy) -> Policy:
    """Check the disk, and attach a fresh adapter if the settings ask for one."""
    needed = run.policy_bytes + training_bytes(run.policy_bytes, run.config.optimizer) - folder_size(work.resume)
    run.store.check_free(needed, f"{work.stage.title}: a policy and its checkpoints")
    model = run.config.model
    if model.adapter == "none" or start.base:
        return start
    seed = seed_of(run.config.seed, ADAPTER_STREAM, bits=32)
    return fresh_adapter(start, lora_settings(model), seed, model, work.resume / "adapter")
