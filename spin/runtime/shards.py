"""Work that is divided into shards, each computed once and stored."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spin.runtime.artifacts import CorruptArtifact, commit_atomically, verify_artifact
from spin.runtime.errors import UserError
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.signals import deferred, pending_signal, raise_if_stopped
from spin.runtime.tables import write_parquet


@dataclass(frozen=True)
class Shard:
    """A part of the work: `make()` computes its rows, `of` (ids or hashes) identifies them."""

    of: Sequence[object]
    make: Callable[[], list[dict]]


ShardDriver = Callable[[Sequence[Shard]], Iterator[list[dict]]]  # yields the rows of each shard in turn
Say = Callable[[str], None]


def compute_shards(shards: Sequence[Shard]) -> Iterator[list[dict]]:
    """Compute the shards in memory, without storing or sharing them."""
    return (shard.make() for shard in shards)


class ResumableShards:
    """A driver that stores each computed shard in `folder`, and reads stored shards instead of computing them again.

    Ranks share the work: each computes the next free shard, and at the end reads all of them. With `main_process_only` the
    other ranks wait. `on_reused(rows, seconds)` is called with row count and time of each shard from an earlier run.
    """

    def __init__(
        self,
        folder: Path,
        say: Say,
        on_reused: Callable[[int, float], None] | None = None,
        ranks: ProcessGroup = SINGLE_PROCESS,
        main_process_only: bool = False,
    ):
        self.folder, self.say, self.on_reused, self.ranks = folder, say, on_reused, ranks
        self.main_process_only = main_process_only

    def __call__(self, shards: Sequence[Shard]) -> Iterator[list[dict]]:
        earlier = {number for number in range(len(shards)) if self._folder(number).is_dir()}
        if self.ranks.size > 1:
            self._compute_missing(shards)
        for number, shard in enumerate(shards):
            raise_if_stopped()
            rows, seconds = self._read(number, shard) or (None, 0.0)
            if rows is not None and number in earlier and self.on_reused:
                self.on_reused(len(rows), seconds)
            yield self._compute(number, shard) if rows is None else rows

    def _compute_missing(self, shards: Sequence[Shard]) -> None:
        """Compute the missing shards on all ranks. A UserError of one rank is raised on all."""
        self.ranks.barrier()  # first let every rank see which shards an earlier run has stored
        numbers = iter(range(len(shards))) if self.main_process_only else self.ranks.claim_indices()
        failure = None
        if self.ranks.is_main_process or not self.main_process_only:
            while not pending_signal() and (number := next(numbers, len(shards))) < len(shards):
                try:
                    if not failure and self._read(number, shards[number]) is None:
                        self._compute(number, shards[number])
                except UserError as error:
                    failure = error  # claim the remaining shards, so that no other rank computes them
        self.ranks.raise_if_stopped()
        self.ranks.raise_together(failure)

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _read(self, number: int, shard: Shard) -> tuple[list[dict], float] | None:
        """Return a stored shard's rows and seconds. Remove a damaged or different shard and return None."""
        folder = self._folder(number)
        if not folder.is_dir():
            return None
        try:
            manifest = verify_artifact(folder)
            if manifest["of"] == list(shard.of):
                return pq.read_table(folder / "rows.parquet").to_pylist(), manifest["seconds"]
        except CorruptArtifact as damage:
            self.say(f"{folder}: {damage}: recomputing this shard")
        shutil.rmtree(folder)
        return None

    def _compute(self, number: int, shard: Shard) -> list[dict]:
        started = time.perf_counter()
        rows = shard.make()
        with deferred():
            beside = self.folder / f"next-{self.ranks.rank}.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            write_parquet(pa.Table.from_pylist(rows), beside / "rows.parquet")
            facts = {"of": list(shard.of), "seconds": time.perf_counter() - started}
            commit_atomically(beside, self._folder(number), facts)
        return rows
