"""Tests of complete games that are killed, stopped, damaged, short of disk or memory, or started twice at once.

Repeating the same command always yields the bits of an undisturbed game.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.games import Place

ROOT = Path(__file__).parents[2]
# Many small shards and checkpoints.
WORDS = (
    "generation.batch_size=4",
    "checkpoint.shard_size=4",
    "checkpoint.steps=1",
    "schedule.batch_size=4",
    "schedule.replay=previous",
)
ORDER = ["evaluate", "sft", "evaluate", *["generate", "score", "train", "evaluate"] * 2]
TIMINGS = {"tokens_per_second", "pairs_per_second"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, games):
    """An undisturbed game, which also creates the model that the other games start from."""
    place = Place(tmp_path_factory.mktemp("reference"), games)
    place.play(*WORDS)
    return place


@pytest.fixture
def place(tmp_path, games, reference):
    shutil.copytree(reference.folder / "cache", tmp_path / "cache")
    return Place(tmp_path, games)


def records(place: Place, run: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in place.metrics(run)]


def assert_same(place: Place, reference: Place, run: str = "run") -> None:
    """Assert that policies, pairs, metrics except speeds, and the summary are equal, and that no row appears twice."""
    for name in ("sft", "iter0", "iter1"):
        weights, expected = (
            load_file(p / name / "policy" / "model.safetensors") for p in (place.folder / run, reference.folder / "run")
        )
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights), name
    for name in ("iter0", "iter1"):
        pairs = [pq.read_table(p / name / "pairs.parquet") for p in (place.folder / run, reference.folder / "run")]
        assert pairs[0].equals(pairs[1])
        assert len({(row["id"], row["iter"]) for row in pairs[0].to_pylist()}) == len(pairs[0])
    rows = records(place, run)
    assert rows == records(reference, "run")
    marks = Counter((row["stage"], row["iter"], row.get("policy"), row["step"]) for row in rows)
    assert max(marks.values()) == 1
    games = [json.loads((p / "game.json").read_text()) for p in (place.folder / run, reference.folder / "run")]
    for key in ("iterations", "evaluations", "samples", "data"):
        assert games[0][key] == games[1][key]
    assert place.stages() == reference.stages()
    assert unfinished(place) == []


def unfinished(place: Place) -> list[str]:
    """Return the names of unfinished stages."""
    return sorted(path.parent.name for path in (place.folder / "store").glob("*/*.part"))


def await_path(place: Place, game, pattern: str) -> Path:
    """Wait for a path in the store that matches `pattern`, and return it."""
    while game.poll() is None:
        if paths := sorted((place.folder / "store").glob(pattern)):
            return paths[0]
        time.sleep(0.002)
    raise AssertionError(f"the game ended with {game.returncode} before there was any {pattern}")


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file, without changing files that are linked to it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.unlink()
    path.write_bytes(content)


def at_call(function: str, count: int, action: str, moment: str = "before") -> str:
    """Return code that runs `action` before or after the `count`-th call (from 1) of `function` ("module.name")."""
    module, _, name = function.rpartition(".")
    return f"""
import os, signal
import {module} as module
function, calls = module.{name}, 0
def wrapper(*args, **kwargs):
    global calls
    calls += 1
    if calls == {count} and {moment!r} == "before":
        {action}
    result = function(*args, **kwargs)
    if calls == {count} and {moment!r} == "after":
        {action}
    return result
module.{name} = wrapper
"""


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def test_kill_at_every_stage(place, reference):
    """A game that is killed just before or just after a stage is committed resumes, for each of the eleven stages."""
    for number in range(len(ORDER)):
        for moment, finished in (("before", number), ("after", number + 1)):
            done = place.start(*WORDS, code=at_call("spin.runtime.store.commit_atomically", 1, KILL, moment)).wait()
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert sum(place.stages().values()) == finished
    place.play(*WORDS)
    assert_same(place, reference)


@pytest.mark.parametrize(
    ("function", "moment"),
    [
        ("shards", "after"),
        ("checkpoints", "before"),
        pytest.param("shards", "before", marks=pytest.mark.slow),
        pytest.param("checkpoints", "after", marks=pytest.mark.slow),
    ],
)
def test_kill_between_shards(place, reference, function, moment):
    """A game resumes after eight attempts that are killed at their second shard or checkpoint."""
    code, killed = at_call(f"spin.runtime.{function}.commit_atomically", 2, KILL, moment), 0
    for _ in range(8):
        killed += place.start(*WORDS, code=code).wait().returncode == -signal.SIGKILL
    assert killed >= 6
    place.play(*WORDS)
    assert_same(place, reference)


@pytest.mark.parametrize("function", ["link_tree", "link_file", "write_text"])
def test_kill_while_the_run_folder_is_written(place, reference, function):
    for count in (1, 2):
        done = place.start(*WORDS, code=at_call(f"spin.pipeline.run_folder.{function}", count, KILL)).wait()
        assert done.returncode == -signal.SIGKILL, done.stderr
    place.play(*WORDS)
    assert_same(place, reference)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGINT,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_stop_by_signal(place, reference, number):
    """A stop signal makes training save its state although no checkpoint is due."""
    words = [*WORDS, "checkpoint.steps=null", "checkpoint.minutes=60"]
    send = f"os.kill(os.getpid(), {int(number)})"
    stops = [
        ("spin.generation.sampling.decode", 1),  # the evaluation of the start
        ("spin.method.training._accumulate_gradients", 3),  # SFT
        ("spin.method.training._accumulate_gradients", 30),  # a later training
        ("spin.runtime.store.commit_atomically", 1),
    ]
    saved = 0
    for function, count in stops:
        done = place.start(*words, code=at_call(function, count, send)).wait()
        if done.returncode == 0:
            continue
        assert done.returncode == 128 + number
        (line,) = done.stderr.strip().splitlines()
        assert line == f"stopped by {number.name}: finished work is kept, run the same command to continue."
        saved += "saved the training state at step" in done.stdout
    assert saved >= 1
    place.play(*words)
    assert_same(place, reference)


def test_plan_of_a_resumed_stage(place, reference):
    game = place.start(*WORDS)
    await_path(place, game, "sft/*.part/resume/training/step-00000004")
    game.kill()
    game.wait()
    plan = place.play(*WORDS, "plan=true").stdout
    step = int(re.search(r"sft +start +resume +training up to step (\d+)", plan)[1])
    assert step >= 4
    assert "1 stages to reuse, 1 to resume, 9 to play" in plan
    done = place.play(*WORDS)
    assert f"SFT: resuming, training up to step {step}" in done.stdout
    assert_same(place, reference)


def test_damaged_shard(place, reference):
    game = place.start(*WORDS)
    shard = await_path(place, game, "generate/*.part/resume/answers/00002").parent / "00001"
    game.kill()
    game.wait()
    flip(shard / "rows.parquet")
    done = place.play(*WORDS)
    assert f"{shard}: the content of rows.parquet has changed: recomputing this shard" in done.stdout
    assert_same(place, reference)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint(place, reference, damage):
    game = place.start(*WORDS)
    await_path(place, game, "train/*.part/resume/training/step-00000003")
    game.kill()
    game.wait()
    newest = sorted((place.folder / "store").glob("train/*.part/resume/training/step-*"))[-1]
    weights = newest / "masters.safetensors"
    if damage == "flipped":
        flip(weights)
    else:
        os.truncate(weights, weights.stat().st_size // 2)
    step = int(newest.name.removeprefix("step-"))
    done = place.play(*WORDS)
    assert f"{newest}: " in done.stdout and "this checkpoint is not used" in done.stdout
    assert_same(place, reference)
    assert step >= 3


@pytest.mark.parametrize(
    ("pattern", "replayed"),
    [
        ("score/*/pairs.parquet", {"score"}),
        ("generate/*/answers.parquet", {"generate"}),
        ("evaluate/*/evaluation.json", {"evaluate"}),
        ("train/*/policy/model.safetensors", {"train"}),
        ("sft/*/manifest.json", {"sft"}),
    ],
)
def test_damaged_stage(reference, place, pattern, replayed):
    shutil.copytree(reference.folder / "store", place.folder / "store")
    damaged = sorted((place.folder / "store").glob(pattern))[0]
    flip(damaged)
    planned = {line.split()[0] for line in place.play(*WORDS, "plan=true").stdout.splitlines() if "damaged:" in line}
    assert planned == (replayed if "manifest" not in pattern else set())  # an unreadable manifest counts as none
    done = place.play(*WORDS)
    stage = Path(*damaged.parts[: len((place.folder / "store").parts) + 2])
    assert f"{stage}: " in done.stdout and "rebuilding this stage" in done.stdout
    assert "1 stages played" in done.stdout
    assert_same(place, reference)


def play_limited(limits: str, words: list[str]) -> subprocess.CompletedProcess:
    """Play in a new interpreter that runs the code `limits` first."""
    script = (
        f"import resource, runpy, sys; {limits} sys.argv[0] = 'run.py'; runpy.run_path('run.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_disk_fills_up(place, reference):
    """A game ends at a limit on file sizes that a checkpoint exceeds and scores do not, and resumes without the limit."""
    limits = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limits += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    done = play_limited(limits, place.words(*WORDS))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no space left" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert place.stages() == {"evaluate": 1} and unfinished(place) == []  # the first checkpoint did not fit
    place.play(*WORDS)
    assert_same(place, reference)


def test_same_command_twice(place, reference):
    games = [place.start(*WORDS), place.start(*WORDS)]
    results = [game.wait() for game in games]
    assert [game.returncode for game in results] == [0, 0], results
    assert sum("another run plays in" in game.stdout for game in results) == 1
    assert sum("11 stages played" in game.stdout for game in results) == 1
    assert sum("nothing was computed again" in game.stdout for game in results) == 1
    assert_same(place, reference)


def test_two_runs_share_a_store(place, reference):
    games = [place.start(*WORDS, run=run) for run in ("one", "two")]
    results = [game.wait() for game in games]
    assert [game.returncode for game in results] == [0, 0], results
    played = [re.search(r"(\d+) stages played", game.stdout) for game in results]
    assert sum(int(match[1]) for match in played if match) == len(ORDER)
    for run in ("one", "two"):
        assert_same(place, reference, run)


def test_take_over_from_a_killed_run(place, reference):
    first = place.start(*WORDS)
    await_path(place, first, "sft/*.part/resume/training/step-00000002")
    first.kill(signal.SIGSTOP)
    second = place.start(*WORDS, run="second")
    while "another run is building the same sft stage" not in second.out.read_text():
        assert second.poll() is None, second.err.read_text()
        time.sleep(0.01)
    first.kill(signal.SIGKILL)
    first.wait()
    done = second.wait()
    assert done.returncode == 0, done.stderr
    assert "SFT: resuming, training up to step" in done.stdout
    assert_same(place, reference, "second")


def test_divergence(place):
    done = place.play(*WORDS, "optimizer.lr=1e30", status=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "not finite" in done.stderr and "lower the learning rate" in done.stderr
    rows = [row for row in place.metrics() if row["stage"] == "train"]
    assert rows[-1]["skipped"] >= 1 and rows[-1]["grad_norm"] is None
    assert place.stages()["train"] == 0 and place.stages()["sft"] == 1


def test_nonfinite_weights(place):
    model = next((place.folder / "cache").glob("tiny-*[0-9]"))
    broken = place.folder / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = place.play(*WORDS, f"model.path={broken}", status=1)
    (line,) = done.stderr.strip().splitlines()
    assert "not finite" in line and "weights are broken" in line
    assert place.stages() == {}


def test_out_of_memory(tmp_path, place):
    """The address space may grow by 1 GiB after the imports, which is less than a batch of 400 long answers needs."""
    records = ({"prompt": f"Tell {i}.", "response": f"{i} " + "and so on " * 90} for i in range(408))
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    limits = "import re, spin.game, transformers.models.llama.modeling_llama, matplotlib.pyplot;"
    limits += "size = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024 + 2**30;"
    limits += "resource.setrlimit(resource.RLIMIT_AS, (size, size));"
    words = ["data=local", f"data.path={tmp_path}/long.jsonl", "data.template=paper", "data.held_out=400"]
    words += ["generation.max_new_tokens=8", "engine.tokens_per_batch=1000000"]
    done = play_limited(limits, place.words(*words))
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "out of memory: set engine.gradient_checkpointing=true" in line


def test_docs_name_existing_tests():
    text = (ROOT / "docs" / "faults.md").read_text()
    mentions = re.findall(r"`([\w/]*test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(mentions) > 20
    for file, test in mentions:
        path = ROOT / "tests" / file
        assert path.is_file() and (not test or f"def {test}(" in path.read_text()), (file, test)
