"""Stages as data, and the one walk over them that plays, reuses or resumes each.

A stage declares what it needs, what decides its content, how it is built and how its result is read. `Player` plays
stages; `spin.pipeline.plan` looks the same declarations up without playing them.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from spin.engines.device_memory import peak_memory_gib
from spin.models.policy import Policy
from spin.pipeline.context import Run
from spin.runtime.checkpoints import describe_progress
from spin.runtime.errors import UserError
from spin.runtime.progress import Progress
from spin.runtime.shards import ResumableShards
from spin.runtime.store import Artifact, key_of
from spin.runtime.tracking import to_json_types

Result = TypeVar("Result", covariant=True)


class Results(dict[Any, Any]):
    """The results of stages that were played or found. A given policy is its own result."""

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, Policy):
            return key
        raise KeyError(key)


@dataclass(frozen=True, eq=False)
class Stage(Generic[Result]):
    """A stage of a run. Its fields are settings and the stages that it needs, first the policy that it is about.

    The results of these stages are passed to `inputs`, `build` and `read` under the fields' names. All ranks build a
    stage together. An error in `may_fail`, which all ranks raise together, ends the stage but not the game: the result
    is None.
    """

    name: ClassVar[str]  # the folder in the store
    title_format: ClassVar[str] = "{stage.subject}: {stage.name}"
    may_fail: ClassVar[tuple[type[UserError], ...]] = ()
    iteration: int | None
    policy: "PolicySource"

    @property
    def label(self) -> str:
        """The name of the policy that results, for display: "iter0"."""
        raise NotImplementedError

    @property
    def subject(self) -> str:
        """What the stage is about, for display: "iter 0", or before iteration 0 the policy's label."""
        return self.policy.label if self.iteration is None else f"iter {self.iteration}"

    @property
    def title(self) -> str:
        return self.title_format.format(stage=self)

    @property
    def labels(self) -> dict:
        """Columns of each row of metrics that name this run's parts and do not decide the stage's content."""
        return {"iter": self.iteration}

    def needs(self, results: Results) -> dict[str, Any]:
        """The results of the stages among the fields, by field. Raises KeyError if one is not known yet."""
        needed = {}
        for field, value in vars(self).items():
            if isinstance(value, Stage | Policy):
                needed[field] = results[value]
            elif isinstance(value, Mapping):
                needed[field] = {key: results[stage] for key, stage in value.items()}
        return needed

    def inputs(self, run: Run, *args: Any, **needs: Any) -> dict:
        """Return everything that decides the content. Its hash is the stage's key."""
        raise NotImplementedError

    def build(self, run: Run, work: "Work", *args: Any, **needs: Any) -> dict:
        """Compute the artifact in `work.folder`. Returns facts for its manifest."""
        raise NotImplementedError

    def read(self, run: Run, artifact: Artifact, *args: Any, **needs: Any) -> Result:
        """Read the result from a finished artifact."""
        raise NotImplementedError


PolicySource = Policy | Stage[Policy]  # a policy that is given, or results from a stage


class Measurement(Stage[Result]):
    """A stage that measures `policy`."""

    @property
    def labels(self) -> dict:
        return {"iter": self.iteration, "policy": self.policy.label}


@dataclass
class Work:
    """What a stage is built with: `folder` becomes the artifact, `resume` has what an interrupted attempt continues
    from, and `earlier_seconds` what earlier attempts spent on the reused parts."""

    run: Run
    stage: Stage
    folder: Path
    resume: Path
    earlier_seconds: float = 0.0

    def log(self, row: dict) -> None:
        """Log a row of metrics, and keep it in the artifact."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(to_json_types(row)) + "\n")
        self.run.tracker.log({**self.stage.labels, "stage": self.stage.name, **row})

    def shards(self, name: str, bar: Progress | None = None, per_row: float = 1, **options: bool) -> ResumableShards:
        """Shards stored in `resume`. Reused ones advance `bar` by `per_row` for each row."""

        def on_reused(rows: int, seconds: float) -> None:
            self.earlier_seconds += seconds
            if bar:
                bar.skip(round(rows * per_row))

        return ResumableShards(self.resume / name, self.run.say, on_reused, self.run.ranks, **options)


class Player:
    """Plays stages in order, each found in the store or built, and keeps their results and artifacts.

    `references` are the store entries ("train/<key>") in use. `given_up`: why a stage failed, by title. `on_build` is
    called with a stage's title before it is built, on the main process.
    """

    def __init__(self, run: Run):
        self.run = run
        self.artifacts: dict[Stage, Artifact] = {}
        self.results = Results()
        self.references: list[str] = []
        self.given_up: dict[str, str] = {}
        self.on_build: Callable[[str], object] = lambda title: None
        self.started = time.perf_counter()

    def result(self, stage: Stage[Result]) -> Result:
        """The result of a stage that was played."""
        return self.results[stage]

    def play(self, stage: Stage) -> None:
        """Find the stage in the store or build it. Its metrics are logged in either case."""
        run, needs = self.run, stage.needs(self.results)
        inputs = stage.inputs(run, **needs)
        self.references.append(f"{stage.name}/{key_of(inputs)}")
        if run.ranks.is_main_process:
            run.store.refer(run.folder, self.references[-1:])

        def build(folder: Path) -> dict:
            if run.ranks.is_main_process:
                self.on_build(stage.title)
            work = Work(run, stage, folder, run.store.resume(stage.name, inputs))
            if progress := describe_progress(work.resume):
                run.say(f"{stage.title}: resuming, {progress}")
            facts = stage.build(run, work, **needs)
            peak = run.ranks.all_reduce_max(peak_memory_gib())
            return facts | {"peak_memory_gib": peak, "earlier_seconds": work.earlier_seconds}

        try:
            artifact = self._find_or_build(stage, inputs, build)
        except stage.may_fail as error:
            run.say(f"{stage.title}: given up, the game continues: {error}")
            self.given_up[stage.title], self.results[stage] = str(error), None
            return
        if artifact.reused:
            run.say(f"{stage.title}: reused")
            for row in artifact.rows():
                run.tracker.log({**stage.labels, "stage": stage.name, **row}, reused=True)
        self.artifacts[stage] = artifact
        self.results[stage] = stage.read(run, artifact, **needs)

    def _find_or_build(self, stage: Stage, inputs: dict, build: Callable[[Path], dict]) -> Artifact:
        """Find the stage on the main process, or build it on all ranks. Only the main process uses the store."""
        run, artifact = self.run, None

        def build_on_all(folder: Path) -> dict:
            run.ranks.broadcast(True)
            return build(folder)

        if run.ranks.is_main_process:
            artifact = run.store.get(stage.name, inputs, build_on_all)
            run.ranks.broadcast(False)
        else:
            while run.ranks.broadcast():
                with tempfile.TemporaryDirectory() as scratch:
                    build(Path(scratch))
        run.ranks.raise_if_stopped()
        return run.ranks.broadcast(artifact)
