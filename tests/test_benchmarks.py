"""The benchmarks run, small, on a tiny model: that a table comes out, not what is in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def table(folder, script, *words):
    """A script's table in markdown: for each row its name and numbers."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if re.match(r"\| [a-z]", line)]
    return {name: [float(x) for x in cells if re.fullmatch(r"[\d.]+", x)] for name, *cells in rows}


def tiny(folder):
    return ["--repeats", "1", "--words", f"model=tiny data=tiny data.held_out=2 store.path={folder}/store"]


def test_the_step_of_a_gpu_runs_small_on_a_cpu(tmp_path):
    rows = table(tmp_path, "gpu.py", "--small", "--pairs", "6", "--steps", "2")
    assert [name.split(",")[0] for name in rows] == ["generation", "scoring", "training"]
    assert all(seconds > 0 and memory > 0 for seconds, memory, _ in rows.values())


@pytest.mark.slow
def test_training_beside_other_tools(tmp_path):
    rows = table(tmp_path, "training.py", "--pairs", "8", "--batch-size", "4", *tiny(tmp_path))
    assert list(rows) == ["spin", "trl", "trl-as-it-comes", "official"]
    for name, (*_, loss, _share) in rows.items():
        assert loss == pytest.approx(0.693, abs=0.02), name  # all of them play the same game


@pytest.mark.slow
def test_generation_beside_other_tools(tmp_path):
    rows = table(tmp_path, "generation.py", "--prompts", "8", "--batch-size", "4", "--new", "8", *tiny(tmp_path))
    assert list(rows) == ["spin", "plain", "continuous", "article"]
    assert all(tokens > 0 and rate > 0 for _, tokens, rate, *_ in rows.values())


@pytest.mark.slow
def test_growth_of_cost(tmp_path):
    words = ["--repeats", "1", "--words", f"model=tiny store.path={tmp_path}/store"]
    rows = table(tmp_path, "growth.py", *words)
    assert {name.split(",")[0] for name in rows} == {"scoring", "training", "generation"}
    assert all(len(cells) == 5 and min(cells) > 0 for cells in rows.values())  # once, its seconds, three times memory
