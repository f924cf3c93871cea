"""What safety costs: checkpoints, checksums and flushing to the disk, as a share of a game.

    python benchmarks/overhead.py                          the default game, in a folder that is removed afterwards
    python benchmarks/overhead.py checkpoint.minutes=0     with a checkpoint after every step

Every function that keeps or checks something is timed where it is called, in the game itself: a difference of two games
would be smaller than the noise of a shared machine. Printed as a table in markdown, with what made it.
"""

import functools
import os
import platform
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# (where it is called from, its name): what it is for. One that runs inside another counts for the outer one.
WATCHED = {
    ("spin.store", "seal"): "stages: checksums, flushing",
    ("spin.store", "verify"): "stages: checked when reused",
    ("spin.plan", "verify"): "stages: checked when reused",
    ("spin.checkpoint.Shards", "__call__"): "shards: writing, checksums, flushing",
    ("spin.checkpoint.Checkpoints", "write"): "training checkpoints: writing, checksums, flushing",
    ("spin.stages", "content_id"): "identity of trained policies",
    ("spin.model", "content_id"): "identity of the start",
}


def main() -> None:
    from spin.config.hydra import load
    from spin.game import play

    words = sys.argv[1:]
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    inside: list[str] = []

    def timed(function: Callable, what: str) -> Callable:
        @functools.wraps(function)
        def wrapper(*arguments, **settings):
            if inside:
                return function(*arguments, **settings)
            inside.append(what)
            started = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                inside.pop()
                seconds[what] += time.perf_counter() - started
                calls[what] += 1

        return wrapper

    def made(keep, number, of, make):
        """A shard's own time is what is left when the work in it is taken off."""

        def work():
            started = time.perf_counter()
            what = inside.pop()
            try:
                return make()
            finally:
                inside.append(what)
                seconds[what] -= time.perf_counter() - started

        return original(keep, number, of, work)

    from spin.runtime.shards import ResumableShards

    original = ResumableShards.__call__
    ResumableShards.__call__ = made  # type: ignore[method-assign]
    for (place, name), what in WATCHED.items():
        module, _, member = place.partition(".checkpoint.")
        holder = getattr(import_module("spin.checkpoint"), member) if member else import_module(module)
        setattr(holder, name, timed(getattr(holder, name), what))

    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".overhead-") as folder:
        here = [f"store.path={folder}/store", "tracking.wandb=disabled"]
        config = load(*words, *here)
        started = time.perf_counter()
        play(config, Path(folder) / "run", "python benchmarks/overhead.py")
        total = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder, "store").rglob("*") if path.is_file()) / 2**30

    import torch
    import transformers

    command = shlex.join(["python", "benchmarks/overhead.py", *words])
    print(f"\n`{command}`: {config.name}, {total:.0f} s, {size:.1f} GiB stored.")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads.\n"
    )
    print("| what | times | seconds | share of the game |\n|---|---|---|---|")
    for what in dict.fromkeys(WATCHED.values()):
        print(f"| {what} | {calls[what]} | {seconds[what]:.2f} | {seconds[what] / total:.2%} |")
    print(f"| together | {calls.total()} | {seconds.total():.2f} | {seconds.total() / total:.2%} |")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
