"""Measure the cost of checkpoints, checksums and flushing to the disk as a share of a game.

    python benchmarks/overhead.py                          the default game, in a folder that is removed afterwards
    python benchmarks/overhead.py checkpoint.minutes=0     with a checkpoint after every step

Each function that stores or checks something is timed within the game, because the difference between two games would be
smaller than the noise of a shared machine. Prints a markdown table.
"""

import functools
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import ROOT, describe_machine

SHARDS = "shards: writing, checksums, flushing"
# "module:name" of the timed functions, and their rows in the table. A nested call counts for the outer function.
WATCHED = {
    "spin.runtime.artifacts:commit_atomically": "stages: checksums, flushing",
    "spin.runtime.artifacts:verify_artifact": "stages: check before reuse",
    "spin.runtime.shards:ResumableShards._compute": SHARDS,
    "spin.runtime.checkpoints:Checkpoints.write": "training checkpoints: writing, checksums, flushing",
    "spin.models.policy:content_id": "identity of policies",
}
# Rows with calls in every game. Zero calls mean that the game no longer uses the timed function.
ALWAYS = (
    WATCHED["spin.runtime.artifacts:commit_atomically"],
    SHARDS,
    WATCHED["spin.models.policy:content_id"],
)


class Stopwatch:
    """Seconds and calls by row of the table; each moment is counted once."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.current: str | None = None

    @contextmanager
    def switch(self, row: str | None) -> Iterator[None]:
        """Count the time in the `with` block for `row` instead of the current row; for no row if `row` is None."""
        outer, self.current = self.current, row
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            for name, sign in ((row, 1), (outer, -1)):
                if name is not None:
                    self.seconds[name] += sign * elapsed
            self.current = outer

    def watch(self, function: Callable, row: str) -> Callable:
        """Return `function` with its outermost calls counted for `row`."""

        @functools.wraps(function)
        def wrapper(*arguments, **settings):
            if self.current is not None:
                return function(*arguments, **settings)
            self.calls[row] += 1
            with self.switch(row):
                return function(*arguments, **settings)

        return wrapper

    def watch_shards(self, write: Callable) -> Callable:
        """Return `ResumableShards._compute`, timed without the computation of a shard's rows."""

        def write_shard(shards, number, part):
            def make() -> list[dict]:
                with self.switch(None):
                    return part.make()

            return write(shards, number, replace(part, make=make))

        return self.watch(write_shard, SHARDS)


def resolve(path: str) -> tuple[object, str, Callable]:
    """Return the module or class with the function "module:name", the function's name in it, and the function."""
    module, _, name = path.partition(":")
    try:
        *holders, last = name.split(".")
        holder = functools.reduce(getattr, holders, import_module(module))
        return holder, last, getattr(holder, last)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"benchmarks/overhead.py: {path} does not exist; correct WATCHED") from error


def patch(stopwatch: Stopwatch) -> Callable[[], None]:
    """Time all watched functions in every module that imported them. Returns a function that undoes this."""
    replaced: list[tuple[object, str, Callable]] = []
    for path, row in WATCHED.items():
        holder, name, function = resolve(path)
        wrapper = stopwatch.watch_shards(function) if row == SHARDS else stopwatch.watch(function, row)
        places = [(holder, name)]
        for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "spin"]:
            places += [(module, key) for key, value in vars(module).items() if value is function and module != holder]
        for place, key in places:
            replaced.append((place, key, function))
            setattr(place, key, wrapper)

    def undo() -> None:
        for place, key, function in replaced:
            setattr(place, key, function)

    return undo


def main(words: list[str]) -> None:
    from spin.config.hydra import load
    from spin.game import play
    from spin.runtime.artifacts import folder_size

    stopwatch = Stopwatch()
    undo = patch(stopwatch)
    try:
        with tempfile.TemporaryDirectory(dir=ROOT, prefix=".overhead-") as folder:
            config = load(*words, f"store.path={folder}/store", "tracking.wandb=disabled")
            started = time.perf_counter()
            play(config, Path(folder) / "run", "python benchmarks/overhead.py")
            total = time.perf_counter() - started
            size = folder_size(Path(folder) / "store") / 2**30
    finally:
        undo()
    if missing := [row for row in ALWAYS if not stopwatch.calls[row]]:
        raise SystemExit(f"benchmarks/overhead.py: the game never called a function of: {'; '.join(missing)}")

    command = shlex.join(["python", "benchmarks/overhead.py", *words])
    print(f"\n`{command}`: {config.name}, {total:.0f} s, {size:.1f} GiB stored. {describe_machine()}\n")
    print("| part | calls | seconds | share of the game |\n|---|---|---|---|")
    for row in WATCHED.values():
        seconds = stopwatch.seconds[row]
        print(f"| {row} | {stopwatch.calls[row]} | {seconds:.2f} | {seconds / total:.2%} |")
    seconds = stopwatch.seconds.total()
    print(f"| together | {stopwatch.calls.total()} | {seconds:.2f} | {seconds / total:.2%} |")


if __name__ == "__main__":
    main(sys.argv[1:])
