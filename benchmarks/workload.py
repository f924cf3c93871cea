"""Shared by the benchmarks: pairs to work on, the steps of the method, and processes that are measured in turn.

Each tool runs in its own processes, alternating with the others. This gives each its own peak memory, and the noise of a
shared machine affects all of them equally.
"""

import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin.engines.logps import Forward
    from spin.engines.packing import Continuations
    from spin.method.pairs import Pair
    from spin.models.policy import Policy
    from spin.pipeline.context import Run

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "outputs" / "benchmarks" / "store"

LR, BETA = 5e-7, 0.1
# Answers of up to 128 tokens, closer to real data than the 48 of the default game.
LENGTHS = ["data.max_prompt_length=96", "data.max_response_length=128", "data.max_length=224"]


# --- pairs and steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model folder, and a file of pairs with answers and scores by this model."""

    model: Path
    pairs: Path


def prepare_workload(pairs: int, words: Sequence[str] = ()) -> Workload:
    """Generate and score `pairs` pairs, or reuse them from the store (outputs/benchmarks)."""
    from spin.pipeline.generate import Generate
    from spin.pipeline.score import Score
    from spin.pipeline.stage import Player

    run = open_game([f"store.path={STORE}", f"data.size={pairs}", "data.held_out=0", *LENGTHS, *words])
    opponent = run.start
    generate = Generate(0, opponent)
    score = Score(0, opponent, "opponent", {0: generate})
    player = Player(run)
    for stage in (generate, score):
        player.play(stage)
    return Workload(run.start.folder, player.artifacts[score].folder / "pairs.parquet")


def open_game(words: Sequence[str]) -> "Run":
    """Return the run of `python run.py *words`, with a run folder next to the store."""
    from spin.config.hydra import load
    from spin.pipeline.context import prepare_run
    from spin.runtime.tracking import Tracker

    config = load(*words)
    folder = Path(config.store.path).parent / "benchmark-run"
    folder.mkdir(parents=True, exist_ok=True)
    return prepare_run(config, folder, Tracker(folder, name="benchmarks", config={}, wandb="disabled"))


def find_start(words: Sequence[str] = ()) -> "Policy":
    """Return the policy that `python run.py *words` starts from, downloaded if necessary."""
    from spin.config.hydra import load
    from spin.models.find import find_model

    config = load(*words)
    return find_model(config.model, Path(config.cache.path).expanduser())


def find_forward(model: Any, items: Sequence["Continuations"], engine: Any = None) -> "Forward":
    """Return the forward pass for log-probs of `items` under the settings `engine` (default: spin's defaults)."""
    from spin.config.schema import EngineConfig
    from spin.engines.logps import choose_forward

    engine = engine or EngineConfig.from_defaults()
    sizes = engine.tokens_per_batch, engine.head_chunk
    forward, note = choose_forward(model, items, engine.layout, *sizes, max(item.tokens for item in items))
    if note:
        print(note, file=sys.stderr)
    return forward


def score_pairs(model: Any, pairs: Sequence["Pair"], forward: "Forward") -> dict:
    """Return the references for `train_pairs`: log-probs of the pairs under their opponent, `model`."""
    from spin.engines.logps import compute_logps
    from spin.method.pairs import group_by_prompt, split_responses, to_continuations

    values = compute_logps(model, to_continuations(pairs), forward)
    return {"opponent": split_responses(values, [len(group) for group in group_by_prompt(pairs)])}


def train_pairs(
    engine: Any, pairs: Sequence["Pair"], references: dict, forward: "Forward", batch_size: int, epochs: int = 1
) -> list[dict]:
    """Train with the paper's objective. Returns the metrics of each step."""
    from spin.config.schema import LossConfig
    from spin.method.objectives import make_objective
    from spin.method.training import train_spin

    objective, rows = make_objective(LossConfig.from_defaults(beta=BETA), 0), []
    settings = {"lr": LR, "epochs": epochs, "batch_size": batch_size, "warmup_ratio": 0.1, "seed": 0}
    train_spin(engine, pairs, references, objective, forward, log=rows.append, **settings)
    return rows


def step_seconds(row: dict) -> float:
    """Return the duration of a training step in seconds, from its metrics."""
    return row["pairs"] / row["pairs_per_second"]


# --- processes --------------------------------------------------------------------------------------------------------


def run_in_turn(commands: dict[str, list[str]], repeats: int) -> dict[str, list[dict]]:
    """Run the commands in turn, `repeats` times. Returns the JSON objects that they print as their last lines, by name."""
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for repeat in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(f"{name}: {shlex.join(command)} failed:\n{done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            seconds = time.perf_counter() - started
            print(f"{repeat + 1}/{repeats} {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return results


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `work()` and its duration in seconds."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def resident_peak_gib(whose: int = resource.RUSAGE_SELF) -> float:
    return resource.getrusage(whose).ru_maxrss / 2**20


def median(rows: Sequence[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


# --- the machine ------------------------------------------------------------------------------------------------------


def describe_machine() -> str:
    """Return versions and processor in one line."""
    import torch
    import transformers

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads."
    )


def _processor() -> str:
    """Return the processor's name and its widest vector or matrix instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in text.split()]
    return f"{name} ({units[0] if units else 'no vector units'})"


def peak_rate(precision: str, size: int = 2048, seconds: float = 3.0, device: str = "cpu") -> float:
    """Return the FLOP/s of a large matrix product in `precision`: the best of those measured within `seconds`."""
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
