"""What an interrupted stage goes on from: finished shards of answers or scores, and the state of training.

All of it is sealed (`sealed.py`): a shard or checkpoint that is damaged is found out, named and not used.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from spin.interrupt import check, deferred, pending
from spin.ranks import ALONE, Ranks
from spin.sealed import Damaged, read_manifest, seal, verify

# A checkpoint may take up to this share of the time since the one before it.
WRITING_SHARE = 0.03
KEPT = 2  # checkpoints: the newest may turn out to be damaged


@dataclass(frozen=True)
class Part:
    """A part of some work: `of` (ids, hashes) decides its rows, which `make()` gives."""

    of: Sequence[object]
    make: Callable[[], list[dict]]


# keep(parts): the rows of each part in turn, made or found.
Keep = Callable[[Sequence[Part]], Iterator[list[dict]]]
Say = Callable[[str], None]


def keep_nothing(parts: Sequence[Part]) -> Iterator[list[dict]]:
    """A `Keep` for work that nobody resumes, nor shares with other ranks."""
    for part in parts:
        yield part.make()


class Shards:
    """A `Keep` in a folder: each part is a shard that is made once, whatever happens to the run between two of them.

    Ranks share the work: each makes the next shard that nobody has begun, and reads all in the end. With `by_rank_0` the
    others wait for them. `found` is told of every shard that is there: how many rows it has and how many seconds it took.
    """

    def __init__(
        self,
        folder: Path,
        say: Say,
        found: Callable[[int, float], None] = lambda rows, seconds: None,
        ranks: Ranks = ALONE,
        by_rank_0: bool = False,
    ):
        self.folder, self.say, self.found, self.ranks, self.by_rank_0 = folder, say, found, ranks, by_rank_0

    def __call__(self, parts: Sequence[Part]) -> Iterator[list[dict]]:
        earlier = {number for number in range(len(parts)) if self._folder(number).is_dir()}
        if self.ranks.size > 1:
            self._make(parts)
        for number, part in enumerate(parts):
            check()
            rows = self._read(number, part, self.found if number in earlier else lambda rows, seconds: None)
            yield self._write(number, part) if rows is None else rows

    def _make(self, parts: Sequence[Part]) -> None:
        """All shards that are not there, by all ranks."""
        self.ranks.wait()  # until each has seen what was there before
        numbers = iter(range(len(parts))) if self.by_rank_0 else self.ranks.claims()
        while not pending() and (self.ranks.leads or not self.by_rank_0):
            number = next(numbers, len(parts))
            if number >= len(parts):
                break
            if self._read(number, parts[number]) is None:
                self._write(number, parts[number])
        self.ranks.check()

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _read(
        self, number: int, part: Part, found: Callable[[int, float], None] = lambda rows, seconds: None
    ) -> list[dict] | None:
        """A shard's rows; None where it is not there, or not what it should be: then it is taken away."""
        folder = self._folder(number)
        if not folder.is_dir():
            return None
        try:
            manifest = verify(folder)
            if manifest["of"] == list(part.of):  # not where shards of another size were kept
                rows = pq.read_table(folder / "rows.parquet").to_pylist()
                found(len(rows), manifest["seconds"])
                return rows
        except Damaged as damage:
            self.say(f"{folder}: {damage}: this shard is made again")
        shutil.rmtree(folder)
        return None

    def _write(self, number: int, part: Part) -> list[dict]:
        started = time.perf_counter()
        rows = part.make()
        with deferred():  # what is made is kept
            beside = self.folder / f"next-{self.ranks.rank}.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), beside / "rows.parquet")
            facts = {"of": list(part.of), "seconds": time.perf_counter() - started}
            seal(beside, self._folder(number), facts)
        return rows


@dataclass
class TrainState:
    """All that a resume needs beside the engine's tensors.

    The order of the data and the learning rate follow from `step`, and the loop uses no random numbers. `step` counts
    finished steps, `skipped` those among them without an update (the last `skipped_in_a_row` of them without a break),
    `rows` are their metrics, `seconds` what they took.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)

    def add(self, row: dict, seconds: float) -> None:
        """One more step is finished; where its gradient was not finite it was without an update."""
        self.step += 1
        updated = math.isfinite(row["grad_norm"])
        self.skipped += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        self.seconds += seconds
        self.rows.append({**row, "skipped": self.skipped})


class Engine(Protocol):
    """What a checkpoint asks of an engine."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


class Checkpoints:
    """The state of one training stage in `folder`: `step-00000012/`, the last two of them (one while the next is written).

    `minutes` after the last one is due, later where writing would take more than 3 % of the time; or every `steps` steps,
    whatever that takes. Without a folder nothing is kept. `restored` is the state that `restore` found.
    """

    def __init__(
        self,
        folder: Path | None = None,
        minutes: float = 5.0,
        steps: int | None = None,
        say: Say = print,
        ranks: Ranks = ALONE,
    ):
        self.folder, self.minutes, self.steps, self.say, self.ranks = folder, minutes, steps, say, ranks
        self.restored = TrainState()
        self._last = time.monotonic()
        self._cost = 0.0  # seconds that the last one took to write
        self._written = 0  # its step

    def restore(self, engine: Engine) -> TrainState:
        """Put the newest checkpoint that is whole into `engine`, and return where training stands."""
        folder = self.ranks.share(self._newest() if self.ranks.leads else None)
        if folder is not None:
            text = (folder / "state.json").read_text()
            engine.load_state(folder)
            self.restored = TrainState(**json.loads(text))
            self._written = self.restored.step
        self._last = time.monotonic()
        return replace(self.restored, rows=list(self.restored.rows))

    def _newest(self) -> Path | None:
        for folder in reversed(self._folders()):
            try:
                verify(folder)
                return folder
            except Damaged as damage:
                self.say(f"{folder}: {damage}: this checkpoint is not used")
                shutil.rmtree(folder)
        return None

    def due(self, state: TrainState) -> bool:
        """Is it time? Ranks are of one mind: rank 0's clock counts."""
        return self.ranks.share(self._due(state))

    def _due(self, state: TrainState) -> bool:
        if self.folder is None or state.skipped_in_a_row:  # what gives no finite loss is no state to go back to
            return False
        if self.steps is not None:
            return state.step - self._written >= self.steps
        return time.monotonic() - self._last >= max(60 * self.minutes, self._cost / WRITING_SHARE)

    def write(self, engine: Engine, state: TrainState) -> bool:
        """Keep `state`, which must be that of a finished step; False where it is kept already or not worth it."""
        if self.folder is None or state.step == self._written or state.skipped_in_a_row:
            return False
        started = time.monotonic()
        beside = self.folder / "next.tmp"
        if self.ranks.leads:
            shutil.rmtree(beside, ignore_errors=True)
            for old in self._folders()[: 1 - KEPT]:  # first, so that no more than two take up space
                shutil.rmtree(old, ignore_errors=True)  # a network disk may keep a file that somebody has open
            beside.mkdir(parents=True)
        engine.save_state(beside)
        if self.ranks.leads:
            (beside / "state.json").write_text(json.dumps(asdict(state)))
            seal(beside, self.folder / f"step-{state.step:08d}", {"step": state.step})
        self._last, self._written = time.monotonic(), state.step
        self._cost = self._last - started
        return True

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder else []


# --- what a stage goes on from, in words ------------------------------------------------------------------------------


def describe(resume: Path) -> str | None:
    """What the folder of an unfinished stage holds, for a person: "training up to step 40", "3 shards of answers"."""
    parts = []
    for name in ("answers", "scores"):
        if count := len(list((resume / name).glob("[0-9]*"))):
            parts.append(f"{count} shard{'s' if count > 1 else ''} of {name}")
    for folder in sorted((resume / "training").glob("step-*"), reverse=True):
        try:
            step: Any = read_manifest(folder)["step"]
        except (Damaged, KeyError):
            continue
        parts.append(f"training up to step {step}")
        break
    return ", ".join(parts) or None
