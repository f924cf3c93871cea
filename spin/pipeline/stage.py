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
from spin.pipeline.context import Run
from spin.runtime.checkpoints import describe_progress
from spin.runtime.errors import UserError
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.progress import Progress
from spin.runtime.shards import ResumableShards
from spin.runtime.store import Artifact, key_of
from spin.runtime.tracking import to_json_types

Result = TypeVar("Result", covariant=True)


@dataclass
class Work:
    """What a stage is built with.

    `folder` becomes the artifact. `resume` keeps what an interrupted attempt can continue from. `log` takes a row of
    metrics. `ranks` build the stage together. `earlier_seconds` is what earlier attempts spent on the parts that are reused.
    """

    title: str
    folder: Path
    resume: Path
    log: Callable[[dict], None]
    say: Callable[[str], None]
    ranks: ProcessGroup
    earlier_seconds: float = 0.0

    def shards(self, name: str, bar: Progress | None = None, per_row: float = 1, **options: bool) -> ResumableShards:
        """Shards that are kept in `resume`. Reused ones advance `bar` by `per_row` for each of their rows."""

        def on_reused(rows: int, seconds: float) -> None:
            self.earlier_seconds += seconds
            if bar:
                bar.skip(round(rows * per_row))

        return ResumableShards(self.resume / name, self.say, on_reused, self.ranks, **options)


class Node(Generic[Result]):
    """A result that stages can need."""


@dataclass(frozen=True, eq=False)
class Given(Node[Result]):
    """A result that is known before anything is played."""

    value: Result


class Stage(Node[Result]):
    """A stage of a run, declared as a dataclass whose fields are its settings and the nodes that it needs.

    The results of these nodes are passed to `inputs`, `build` and `read` in the order of the fields. All ranks build a
    stage together unless `main_process_only`. An error in `may_fail`, which all ranks must raise together, ends the stage and
    not the game: the result is None.
    """

    name: ClassVar[str]  # the folder in the store
    main_process_only: ClassVar[bool] = False
    may_fail: ClassVar[tuple[type[UserError], ...]] = ()
    iteration: int | None

    @property
    def needs(self) -> list[Node[Any]]:
        """The nodes among the fields, those of a mapping in its order."""
        values = list(vars(self).values())
        nodes = [node for value in values for node in (value.values() if isinstance(value, Mapping) else [value])]
        return [node for node in nodes if isinstance(node, Node)]

    def subject(self, *results: Any) -> str:
        """What the stage is about, for display: "iter 0". `results` are empty where they are not known yet."""
        return f"iter {self.iteration}"

    def labels(self, *results: Any) -> dict:
        """Columns of each row of metrics that name this run's parts and do not decide the stage's content."""
        return {"iter": self.iteration}

    def inputs(self, run: Run, *results: Any) -> dict:
        """Everything that decides the content. Its hash is the stage's key."""
        raise NotImplementedError

    def build(self, run: Run, work: Work, *results: Any) -> dict:
        """Compute the artifact in `work.folder`. Returns facts for its manifest."""
        raise NotImplementedError

    def read(self, run: Run, artifact: Artifact, *results: Any) -> Result:
        """Read the result from a finished artifact."""
        raise NotImplementedError

    def title(self, *results: Any) -> str:
        return f"{self.subject(*results)}: {self.name}"


class Player:
    """Plays stages in order, each found in the store or built, and keeps their results and artifacts.

    `references` are the store entries ("train/<key>") that this run uses. `given_up` has the reason for each stage that
    failed, by title. `seconds` sums by stage name what the stages took when they were built, in this run or an earlier
    one. `on_build` is called with the title of a stage before it is built, on the main process.
    """

    def __init__(self, run: Run):
        self.run = run
        self.artifacts: dict[Stage, Artifact] = {}
        self.results: dict[Stage, Any] = {}
        self.references: list[str] = []
        self.given_up: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.peak_memory_gib = 0.0
        self.built = 0
        self.on_build: Callable[[str], object] = lambda title: None
        self._started = time.perf_counter()

    def result(self, node: Node[Result]) -> Result:
        """The result of a node that is given or was played."""
        return node.value if isinstance(node, Given) else self.results[node]  # type: ignore[index]

    @property
    def elapsed(self) -> float:
        """Seconds since the first stage could begin."""
        return time.perf_counter() - self._started

    def play(self, stage: Stage) -> None:
        """Find the stage in the store or build it. Its metrics are logged either way, so that the run's record is complete."""
        run, results = self.run, [self.result(node) for node in stage.needs]
        inputs, title, labels = stage.inputs(run, *results), stage.title(*results), stage.labels(*results)
        self.references.append(f"{stage.name}/{key_of(inputs)}")
        if run.ranks.is_main_process:
            run.store.refer(run.folder, self.references[-1:])

        def build(folder: Path) -> dict:
            if run.ranks.is_main_process:
                self.on_build(title)
            with (folder / "metrics.jsonl").open("w") as file:

                def log(row: dict) -> None:
                    file.write(json.dumps(to_json_types(row)) + "\n")
                    file.flush()
                    run.tracker.log({**labels, "stage": stage.name, **row})

                ranks = SINGLE_PROCESS if stage.main_process_only else run.ranks
                work = Work(title, folder, run.store.resume(stage.name, inputs), log, run.say, ranks)
                if progress := describe_progress(work.resume):
                    run.say(f"{title}: resuming, {progress}")
                facts = stage.build(run, work, *results)
            peak = ranks.all_reduce_max(peak_memory_gib())
            return facts | {"peak_memory_gib": peak, "earlier_seconds": work.earlier_seconds}

        try:
            artifact = self._find_or_build(stage, inputs, build)
        except stage.may_fail as error:
            run.say(f"{title}: given up, the game goes on: {error}")
            self.given_up[title], self.results[stage] = str(error), None
            return
        if artifact.reused:
            run.say(f"{title}: reused")
            for row in artifact.rows():
                run.tracker.log({**labels, "stage": stage.name, **row}, reused=True)
        else:
            self.built += 1
        self.seconds[stage.name] = self.seconds.get(stage.name, 0.0) + artifact.manifest["seconds"]
        self.peak_memory_gib = max(self.peak_memory_gib, artifact.manifest["facts"]["peak_memory_gib"])
        self.artifacts[stage] = artifact
        self.results[stage] = stage.read(run, artifact, *results)

    def _find_or_build(self, stage: Stage, inputs: dict, build: Callable[[Path], dict]) -> Artifact:
        """The main process keeps the store, and has the other ranks build with it if the stage is missing."""
        run, artifact = self.run, None

        def build_on_all(folder: Path) -> dict:
            if not stage.main_process_only:
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
