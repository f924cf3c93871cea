"""Declarations of stages, and the player that builds, resumes or reuses each of them.

A stage declares its needs, the inputs that determine its content, how it is built and how its result is read. `Player`
plays stages; `spin.pipeline.plan` looks up the same declarations without playing them.
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
    """The results of stages that were built or found in the store. A `Policy` is its own result."""

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, Policy):
            return key
        raise KeyError(key)


@dataclass(frozen=True, eq=False)
class Stage(Generic[Result]):
    """A stage of a run. Its fields are settings and the stages that it needs; `policy` is what it uses or measures.

    The results of these stages are passed to `inputs`, `build` and `read` under the fields' names. All ranks build a
    stage together. An error in `may_fail`, which all ranks raise together, ends only the stage, whose result is None.
    """

    name: ClassVar[str]  # also the name of its folder in the store
    title_format: ClassVar[str] = "{stage.subject}: {stage.name}"
    may_fail: ClassVar[tuple[type[UserError], ...]] = ()
    iteration: int | None
    policy: "PolicySource"

    @property
    def label(self) -> str:
        """The display name of the resulting policy, such as "iter0"."""
        raise NotImplementedError

    @property
    def subject(self) -> str:
        """The display name of the stage's subject: "iter 0", or before iteration 0 the policy's label."""
        return self.policy.label if self.iteration is None else f"iter {self.iteration}"

    @property
    def title(self) -> str:
        return self.title_format.format(stage=self)

    @property
    def labels(self) -> dict:
        """Columns of each row of metrics that identify parts of this run and do not affect the stage's content."""
        return {"iter": self.iteration}

    def needs(self, results: Results) -> dict[str, Any]:
        """Return the results of the stages among the fields, by field. Raises KeyError if one is not available yet."""
        needed = {}
        for field, value in vars(self).items():
            if isinstance(value, Stage | Policy):
                needed[field] = results[value]
            elif isinstance(value, Mapping):
                needed[field] = {key: results[stage] for key, stage in value.items()}
        return needed

    def inputs(self, run: Run, *args: Any, **needs: Any) -> dict:
        """Return everything that determines the stage's content. Its hash is the stage's key."""
        raise NotImplementedError

    def build(self, run: Run, work: "Work", *args: Any, **needs: Any) -> dict:
        """Compute the artifact in `work.folder`, and return facts for its manifest."""
        raise NotImplementedError

    def read(self, run: Run, artifact: Artifact, *args: Any, **needs: Any) -> Result:
        """Read the result from a finished artifact."""
        raise NotImplementedError


PolicySource = Policy | Stage[Policy]  # a given policy, or a stage that results in one


class Measurement(Stage[Result]):
    """A stage that measures `policy`."""

    @property
    def labels(self) -> dict:
        return {"iter": self.iteration, "policy": self.policy.label}


@dataclass
class Work:
    """The context in which a stage is built: `folder` becomes the artifact (on ranks other than 0 it is temporary), `resume` holds the data from which an
    interrupted stage resumes, and `earlier_seconds` is the time that earlier attempts spent on the reused parts."""

    run: Run
    stage: Stage
    folder: Path
    resume: Path
    earlier_seconds: float = 0.0

    def log(self, row: dict) -> None:
        """Log a row of metrics, and store it in the artifact."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(to_json_types(row)) + "\n")
        self.run.tracker.log({**self.stage.labels, "stage": self.stage.name, **row})

    def shards(
        self, name: str, bar: Progress | None = None, per_row: float = 1, main_process_only: bool = False
    ) -> ResumableShards:
        """Return a driver for shards stored in `resume`. Reused shards advance `bar` by `per_row` per row."""

        def on_reused(rows: int, seconds: float) -> None:
            self.earlier_seconds += seconds
            if bar:
                bar.skip(round(rows * per_row))

        return ResumableShards(self.resume / name, self.run.say, on_reused, self.run.ranks, main_process_only)


class Player:
    """A player of stages, which finds each in the store or builds it, and keeps the results and artifacts.

    `references` are the store entries ("train/<key>") in use. `given_up` holds the reasons for failed stages by title.
    The main process calls `on_build` with a stage's title before building the stage.
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
        """Return the result of a played stage."""
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
        """Find the stage on the main process, or build it on all ranks. Only the main process looks up and commits
        stages; all ranks write shards."""
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
