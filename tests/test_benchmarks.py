"""Every benchmark runs with small settings and prints a table. Most of its numbers are not checked."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import broken_answers, gpu, overhead, workload
from spin.models.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__.py", "workload.py"}


def table(folder, script, *words):
    """Run a script and return its markdown table as the numbers of each row by the row's name."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    body = done.stdout.partition("\n|---")[2].splitlines()[1:]
    rows = [line.strip("| ").split(" | ") for line in body if line.startswith("| ")]
    return {name: [float(cell.rstrip("%")) for cell in cells if NUMBER.fullmatch(cell)] for name, *cells in rows}


NUMBER = re.compile(r"[\d.]+%?")
GPU = ["--small", "--pairs", "4", "--steps", "2"]


def tiny(folder):
    words = f"model=tiny data=tiny data.held_out=2 store.path={folder}/store cache.path={folder}/cache"
    return ["--repeats", "1", "--words", words]


def smoke(folder):
    return ["experiment=smoke", "iter=0", "evaluation.bootstrap=20", f"cache.path={folder}/cache"]


def test_every_benchmark_has_a_test():
    text = Path(__file__).read_text()
    assert [name for name in SCRIPTS if f'"{name}"' not in text] == []


def test_memory_table(tmp_path):
    """Check the output only; tests/engines/test_memory.py compares the numbers with a measurement."""
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_table.py"), "--sizes", "24", "80"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("| model | 24 GiB | 80 GiB |")


@pytest.mark.slow
def test_gpu_small(tmp_path):
    rows = table(tmp_path, "gpu.py", *GPU, "--logs", f"{tmp_path}/logs", "--only", "training", "full-blocks")
    assert [name.split(",")[0] for name in rows] == ["training: 4 pairs", "full-blocks: 4 pairs"]
    assert all(seconds > 0 and memory > 0 for seconds, memory, _ in rows.values())
    assert "rewards/margins" in (tmp_path / "logs" / "full-blocks.log").read_text()


def test_gpu_part_out_of_time_leaves_no_process(tmp_path):
    """A part's own processes, such as a game, end with it."""
    pid = tmp_path / "pid"
    command = ["bash", "-c", f"sleep 100 & echo $! > {pid}; wait"]
    with open(os.devnull, "w") as log, pytest.raises(subprocess.TimeoutExpired):
        gpu.run_in_group(command, log, 2)
    state = Path("/proc", pid.read_text().strip(), "stat")
    end = time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_gpu_memory_of_a_command():
    memory = gpu.command_seconds([sys.executable, "-c", "bytearray(2**27)"], "")["memory"]
    assert memory == workload.resident_peak_gib(resource.RUSAGE_CHILDREN) > 1 / 8


@pytest.mark.slow  # each part is a process that imports everything
def test_gpu_parts(tmp_path):
    """Parts of each kind run on a CPU. A part is skipped with a reason if its library is missing or no time is left."""
    parts = ["device-tests", "generation", "scoring", "compile", "8-bit-states", "vllm", "default-game"]
    assert {kind for kind, _ in gpu.PARTS.values()} == {gpu.PARTS[part][0] for part in parts}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *GPU, f"--logs={tmp_path}", "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = {line.strip("| ").partition(":")[0] for line in done.stdout.splitlines() if line.startswith("| ")}
    skipped = dict(re.findall(r"^([\w-]+): skipped, (.*)$", done.stdout, re.M))
    assert {*skipped} <= {"vllm", "8-bit-states"} and {*parts} - {*skipped} <= measured
    assert all("vllm" in reason or "bitsandbytes" in reason for reason in skipped.values())
    done = subprocess.run([*command, "--minutes=0"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("skipped, no time is left") == len(parts)


def test_training_with_spin(tmp_path):
    rows = table(tmp_path, "training.py", "--pairs", "4", "--batch-size", "2", "--only", "spin", *tiny(tmp_path))
    assert rows["spin"][6] == pytest.approx(0.693, abs=0.02)  # the first loss


def test_generation_with_spin(tmp_path):
    words = ["--prompts", "4", "--batch-size", "2", "--new", "4", "--only", "spin"]
    prompts, tokens, rate, *_ = table(tmp_path, "generation.py", *words, *tiny(tmp_path))["spin"]
    assert prompts == 4 and tokens > 0 and rate > 0


def test_generation_without_vllm(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "generation.py"), "--only=vllm", "--vllm=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith(
        "/nowhere: there is no such interpreter; `make vllm` installs one\n"
    )


@pytest.mark.slow
def test_paper_memory(tmp_path):
    assert set(table(tmp_path, "paper_memory.py")) == {"8 GPUs", "1 GPU"}


def test_overhead(tmp_path):
    rows = table(tmp_path, "overhead.py", *smoke(tmp_path), "checkpoint.minutes=0")
    calls = {name: cells[0] for name, cells in rows.items()}
    assert calls.pop("together") == sum(calls.values())
    assert calls.pop("stages: check before reuse") == 0
    assert len(calls) == 4 and all(calls.values()), calls


@pytest.mark.parametrize(
    "path", ["spin.runtime.store:seal", "spin.store:verify", "spin.runtime.shards:Shards.__call__"]
)
def test_overhead_of_missing_function(monkeypatch, path):
    monkeypatch.setattr(overhead, "WATCHED", {path: "nothing"})
    with pytest.raises(SystemExit, match="does not exist"):
        overhead.patch(overhead.Stopwatch())


def test_stopwatch_counts_each_moment_once():
    stopwatch = overhead.Stopwatch()

    def inner():
        time.sleep(0.02)

    def outer():
        stopwatch.watch(inner, "inner")()
        with stopwatch.switch(None):
            time.sleep(0.2)

    started = time.perf_counter()
    stopwatch.watch(outer, "outer")()
    elapsed = time.perf_counter() - started
    assert stopwatch.calls == {"outer": 1}
    assert 0.02 <= stopwatch.seconds["outer"] <= elapsed - 0.2


def test_broken_answers(tmp_path):
    rows = table(tmp_path, "broken_answers.py", *smoke(tmp_path), f"store.path={tmp_path}/store")
    assert list(rows) == ["the policy's answers", *broken_answers.break_answers(["a"], ["a"])]


@pytest.mark.slow
def test_data(tmp_path):
    make_tiny_model(tmp_path / "tiny")
    rows = table(tmp_path, "data.py", "--records", "20", "--tokenizer", str(tmp_path / "tiny"))
    assert list(rows) == [f"{reader}, {count}" for count in (20, 40, 80) for reader in ("spin", "datasets")]
    rows = table(tmp_path, "data.py", "--records", "0", "--pairs", "40")
    assert list(rows) == ["played", "again, finished"]  # both are mostly start-up at this size


@pytest.mark.slow
def test_training_with_all_tools(tmp_path):
    rows = table(tmp_path, "training.py", "--pairs", "4", "--batch-size", "2", *tiny(tmp_path))
    assert list(rows) == ["spin", "trl", "trl-defaults", "official"]
    for name, (*_, loss, _share) in rows.items():
        assert loss == pytest.approx(0.693, abs=0.02), name  # all tools minimise the same loss


@pytest.mark.slow
def test_generation_with_all_tools(tmp_path):
    words = ["--prompts", "4", "--batch-size", "2", "--new", "4", "--vllm", "/nowhere", *tiny(tmp_path)]
    rows = table(tmp_path, "generation.py", *words)
    assert list(rows) == ["spin", "plain", "continuous", "beams"]
    assert all(tokens > 0 and rate > 0 for _, tokens, rate, *_ in rows.values())


@pytest.mark.slow
def test_growth(tmp_path):
    words = ["--repeats", "1", "--scale", "0.1", "--words", f"model=tiny cache.path={tmp_path}/cache"]
    rows = table(tmp_path, "growth.py", "--parts", "growth", *words)
    assert {name.split(",")[0] for name in rows} == {"scoring", "training", "generation"}
    assert all(len(cells) == 5 and min(cells) > 0 for cells in rows.values())  # amount, seconds, three times memory


@pytest.mark.slow
def test_growth_with_processes(tmp_path):
    words = ["--repeats", "1", "--scale", "0.1", "--words", f"model=tiny cache.path={tmp_path}/cache"]
    rows = table(tmp_path, "growth.py", "--parts", "processes", *words)
    assert list(rows) == ["1 process", *(f"2 processes, ZeRO {stage}" for stage in (0, 2))]
    for rate, ratio, run in rows.values():
        assert rate == run > 0 and ratio == pytest.approx(rate / rows["1 process"][0], abs=0.01)


@pytest.mark.slow
def test_sweep(tmp_path):
    words = ["--betas", "0.1,0.5", "--rates", "1e-3", *smoke(tmp_path)]
    rows = table(tmp_path, "sweep.py", *words)  # fails if the policies differ
    assert list(rows) == ["2 separate runs", "the sweep", "the sweep again, all done"]
