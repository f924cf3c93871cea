"""What the benchmarks work on: pairs like the embedded data's, made by the project's own stages and kept in a store.

A contender is a process of its own, started again and again in turn with the others: its peak memory is its own, and the
noise of a shared machine falls on all alike.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Answers up to 128 tokens, where the default game takes 48: what a user's own data are like.
LENGTHS = ["data.max_prompt_length=96", "data.max_response_length=128", "data.max_length=224"]


@dataclass(frozen=True)
class Workload:
    """A model folder, and a file of scored pairs that it is the opponent of."""

    model: Path
    pairs: Path


def prepare(pairs: int, words: Sequence[str] = ()) -> Workload:
    """Generate and score so many pairs, or find them in the store (outputs/benchmarks)."""
    stages = stages_of([f"data.size={pairs}", "data.held_out=0", *LENGTHS, *words])
    scored = stages.score(stages.start, 0, [stages.generate(stages.start, 0)], stages.start)
    return Workload(stages.start.folder, scored.stage.folder / "pairs.parquet")


def start(words: Sequence[str] = ()) -> Any:
    """The policy that a game with these settings starts from, fetched if it is not there."""
    return stages_of(["data=tiny", *words]).start


def stages_of(words: Sequence[str]) -> Any:
    from spin.pipeline.stages import Stages

    from spin.config.hydra import load
    from spin.runtime.tracking import Tracker

    folder = ROOT / "outputs" / "benchmarks"
    config = load(f"store.path={folder}/store", *words)
    folder = Path(config.store.path).parent
    folder.mkdir(parents=True, exist_ok=True)
    return Stages(config, folder, Tracker(folder, name="benchmarks", config={}, wandb="disabled"))


def interleaved(contenders: dict[str, list[str]], repeats: int) -> dict[str, list[dict]]:
    """Run each contender's command `repeats` times in turn; each prints one JSON object as its last line."""
    found: dict[str, list[dict]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, command in contenders.items():
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(f"{name}: {shlex.join(command)} failed:\n{done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{turn + 1}/{repeats} {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def median(rows: Sequence[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def machine() -> str:
    """Versions and processor, in one line."""
    import torch
    import transformers

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads."
    )


def processor() -> str:
    """The processor's name, and which matrix instructions it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in text.split()]
    return f"{name} ({units[0] if units else 'no vector units'})"


def peak_rate(precision: str, size: int = 2048, seconds: float = 3.0, device: str = "cpu") -> float:
    """FLOP/s of a large product in that type, the best of those tried for so many seconds."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(getattr(torch, precision)) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
