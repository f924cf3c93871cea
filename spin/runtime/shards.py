"""Work that is split into shards, each computed once and kept."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spin.runtime.artifacts import CorruptArtifact, commit_atomically, verify_artifact
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.signals import deferred, pending_signal, raise_if_stopped


@dataclass(frozen=True)
class Shard:
    """A part of some work: `of` (ids, hashes) decides its rows, which `make()` gives."""

    of: Sequence[object]
    make: Callable[[], list[dict]]


# keep(parts): the rows of each part in turn, made or found.
ShardDriver = Callable[[Sequence[Shard]], Iterator[list[dict]]]
Say = Callable[[str], None]


def compute_shards(parts: Sequence[Shard]) -> Iterator[list[dict]]:
    """A `Keep` for work that nobody resumes, nor shares with other ranks."""
    for part in parts:
        yield part.make()


class ResumableShards:
    """A `Keep` in a folder: each part is a shard that is made once, whatever happens to the run between two of them.

    Ranks share the work: each makes the next shard that nobody has begun, and reads all in the end. With `by_rank_0` the
    others wait for them. `found` is told of every shard that is there: how many rows it has and how many seconds it took.
    """

    def __init__(
        self,
        folder: Path,
        say: Say,
        found: Callable[[int, float], None] = lambda rows, seconds: None,
        ranks: ProcessGroup = SINGLE_PROCESS,
        by_rank_0: bool = False,
    ):
        self.folder, self.say, self.found, self.ranks, self.by_rank_0 = folder, say, found, ranks, by_rank_0

    def __call__(self, parts: Sequence[Shard]) -> Iterator[list[dict]]:
        earlier = {number for number in range(len(parts)) if self._folder(number).is_dir()}
        if self.ranks.size > 1:
            self._make(parts)
        for number, part in enumerate(parts):
            raise_if_stopped()
            rows = self._read(number, part, self.found if number in earlier else lambda rows, seconds: None)
            yield self._write(number, part) if rows is None else rows

    def _make(self, parts: Sequence[Shard]) -> None:
        """All shards that are not there, by all ranks."""
        self.ranks.barrier()  # until each has seen what was there before
        numbers = iter(range(len(parts))) if self.by_rank_0 else self.ranks.claim_indices()
        while not pending_signal() and (self.ranks.is_main_process or not self.by_rank_0):
            number = next(numbers, len(parts))
            if number >= len(parts):
                break
            if self._read(number, parts[number]) is None:
                self._write(number, parts[number])
        self.ranks.raise_if_stopped()

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _read(
        self, number: int, part: Shard, found: Callable[[int, float], None] = lambda rows, seconds: None
    ) -> list[dict] | None:
        """A shard's rows; None where it is not there, or not what it should be: then it is taken away."""
        folder = self._folder(number)
        if not folder.is_dir():
            return None
        try:
            manifest = verify_artifact(folder)
            if manifest["of"] == list(part.of):  # not where shards of another size were kept
                rows = pq.read_table(folder / "rows.parquet").to_pylist()
                found(len(rows), manifest["seconds"])
                return rows
        except CorruptArtifact as damage:
            self.say(f"{folder}: {damage}: this shard is made again")
        shutil.rmtree(folder)
        return None

    def _write(self, number: int, part: Shard) -> list[dict]:
        started = time.perf_counter()
        rows = part.make()
        with deferred():  # what is made is kept
            beside = self.folder / f"next-{self.ranks.rank}.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), beside / "rows.parquet")
            facts = {"of": list(part.of), "seconds": time.perf_counter() - started}
            commit_atomically(beside, self._folder(number), facts)
        return rows
