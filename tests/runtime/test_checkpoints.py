"""Training that is interrupted at any step and resumed ends with the same bits; damaged files are not used."""

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spin.runtime import checkpoints as checkpoints_module
from spin.runtime import signals as interrupt
from spin.runtime.artifacts import CorruptArtifact, commit_atomically, verify_artifact
from spin.runtime.checkpoints import Checkpoints, TrainState, describe_progress
from spin.runtime.shards import ResumableShards, Shard, compute_shards
from spin.runtime.signals import Interrupted, deferred
from spin.runtime.store import RESUME
from tests.method.test_training import engine_of, pairs_of, score
from tests.method.test_training import train as train_engine

ROOT = Path(__file__).parents[2]


# --- artifacts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path):
    beside = tmp_path / "beside"
    (beside / "inner").mkdir(parents=True)
    (beside / "a.txt").write_text("first")
    (beside / "inner" / "b.bin").write_bytes(bytes(range(256)) * 9000)
    commit_atomically(beside, tmp_path / "sealed", {"fact": [1, "two"]})
    return tmp_path / "sealed"


def test_commit_and_verify(artifact, tmp_path):
    assert verify_artifact(artifact)["fact"] == [1, "two"]
    assert not (tmp_path / "beside").exists()


def test_verify_finds_any_damage(artifact):
    rng = random.Random(0)
    for path in [path for path in artifact.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for _ in range(40):
            at = rng.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
            with pytest.raises(CorruptArtifact):
                verify_artifact(artifact)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CorruptArtifact):
            verify_artifact(artifact)
        path.unlink()
        with pytest.raises(CorruptArtifact, match="No such file"):
            verify_artifact(artifact)
        path.write_bytes(content)
        verify_artifact(artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": 3, "xxh3": ""}', '{"xxh3": "x"}', "[" * 100_000])
def test_damaged_manifest(artifact, text):
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(CorruptArtifact):
        verify_artifact(artifact)


# --- shards -----------------------------------------------------------------------------------------------------------


def shards_of(folder, computed, messages=None):
    resumable = ResumableShards(folder, (messages if messages is not None else []).append)

    def shard(number):
        def compute():
            computed.append(number)
            return [{"id": f"{number}", "ids": (number, 7), "logp": 0.1 * number}]

        return Shard([f"id{number}"], compute)

    return lambda *numbers: list(resumable([shard(number) for number in numbers]))


def test_shard_is_computed_once(tmp_path):
    computed = []
    partial = shards_of(tmp_path, computed)(0)
    first = shards_of(tmp_path, computed)(0, 1, 2)
    reused = shards_of(tmp_path, computed)(0, 1, 2)
    assert computed == [0, 1, 2] and len(partial) == 1
    first[0] = [{**row, "ids": tuple(row["ids"])} for row in first[0]]
    assert [[{**row, "ids": tuple(row["ids"])} for row in rows] for rows in reused] == first


def test_damaged_shard(tmp_path):
    computed, messages = [], []
    rows = shards_of(tmp_path, computed, messages)
    rows(0, 1)
    path = tmp_path / "00001" / "rows.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert [shard[0]["id"] for shard in rows(0, 1)] == ["0", "1"]
    assert computed == [0, 1, 1] and len(messages) == 1 and "00001" in messages[0] and "recomputing" in messages[0]


def test_shard_of_other_prompts(tmp_path):
    computed = []
    resumable = ResumableShards(tmp_path, print)
    for ids in (["a", "b"], ["a"], ["a"]):
        shard = Shard(ids, lambda ids=ids: computed.append(ids) or [{"of": ids}])
        assert list(resumable([shard])) == [[{"of": ids}]]
    assert computed == [["a", "b"], ["a"]]


def test_on_reused(tmp_path):
    """`on_reused` is called for matching shards of an earlier run, not for shards of another size or damaged ones."""
    shards = [Shard([f"id{n}"], lambda n=n: [{"n": n}] * 3) for n in range(4)]
    list(ResumableShards(tmp_path, print)([shards[0], Shard(["x"], list), shards[2]]))
    (tmp_path / "00002" / "rows.parquet").write_bytes(b"")
    reused = []
    rows = list(ResumableShards(tmp_path, lambda text: None, lambda *call: reused.append(call))(shards))
    assert rows == [[{"n": n}] * 3 for n in range(4)] == list(compute_shards(shards))
    assert [count for count, _ in reused] == [3]


# --- checkpoints ------------------------------------------------------------------------------------------------------

STEPS = 8


SETTINGS = {"epochs": 2, "batch_size": 3, "warmup_ratio": 0.2}


def scored_pairs(folder, dtype=torch.float32):
    """Return twelve pairs and their log-probs under the opponent."""
    pairs = pairs_of(12)
    return pairs, score(folder, pairs, dtype=dtype)


class Cut(Exception):
    """The simulated end of a process."""


def train(folder, pairs, tiny_folder, optimizer="rmsprop", dtype=torch.float32, cut=None, every=1, messages=None):
    """Train for `STEPS` steps, or up to step `cut`. Return the masters, the rows and the step of the restored state."""
    rows = []
    engine = engine_of(tiny_folder, dtype, name=optimizer)

    def log(row):
        rows.append(row)
        if row["step"] == cut:
            raise Cut

    checkpoints = Checkpoints(folder, steps=every, say=(messages if messages is not None else []).append)
    try:
        train_engine(engine, pairs[0], references=pairs[1], log=log, checkpoints=checkpoints, **SETTINGS)
    except Cut:
        return None
    return engine.masters, rows, checkpoints.restored.step


def same(first, second) -> bool:
    timings = ("tokens_per_second", "pairs_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timings} for row in result[1]] for result in (first, second)]
    return rows[0] == rows[1] and all(torch.equal(first[0][name], second[0][name]) for name in first[0])


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_after_any_step(tiny_folder, tmp_path, optimizer, dtype):
    pairs = scored_pairs(tiny_folder, dtype)
    uninterrupted = train(None, pairs, tiny_folder, optimizer, dtype)
    for cut in range(0, STEPS, 2 if dtype == torch.float32 else 3):
        folder = tmp_path / str(cut)
        assert train(folder, pairs, tiny_folder, optimizer, dtype, cut=cut) is None
        resumed = train(folder, pairs, tiny_folder, optimizer, dtype)
        assert resumed[2] == cut and same(resumed, uninterrupted)
        assert len(list(folder.glob("step-*"))) == 2  # older ones are removed


def test_checkpoints_do_not_change_training(tiny_folder, tmp_path):
    pairs = scored_pairs(tiny_folder)
    assert same(train(tmp_path, pairs, tiny_folder), train(None, pairs, tiny_folder))


@pytest.mark.parametrize("name", ["masters.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_newest_checkpoint_damaged(tiny_folder, tmp_path, name, damage):
    pairs, messages = scored_pairs(tiny_folder), []
    train(tmp_path, pairs, tiny_folder, cut=5)
    newest = tmp_path / "step-00000005"
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if damage == "truncated":
        (newest / name).write_bytes(content[:-3])
    elif damage == "flipped":
        (newest / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    resumed = train(tmp_path, pairs, tiny_folder, messages=messages)
    assert resumed[2] == 4 and same(resumed, train(None, pairs, tiny_folder))
    assert len(messages) == 1 and str(newest) in messages[0] and name in messages[0] and "not used" in messages[0]


def test_all_checkpoints_damaged(tiny_folder, tmp_path):
    pairs, messages = scored_pairs(tiny_folder), []
    train(tmp_path, pairs, tiny_folder, cut=5)
    for folder in tmp_path.glob("step-*"):
        (folder / "state.json").write_text("{}")
    resumed = train(tmp_path, pairs, tiny_folder, messages=messages)
    assert resumed[2] == 0 and len(messages) == 2 and same(resumed, train(None, pairs, tiny_folder))


def test_checkpoint_due(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow:
        def save_state(self, folder):
            now[0] += 9.0  # writing takes 9 s, so the next checkpoint is due after 300 s

        def load_state(self, folder):
            raise AssertionError

    checkpoints, state = Checkpoints(tmp_path, minutes=2, say=print), TrainState()
    assert checkpoints.restore(Slow()).step == 0
    due = []
    for _ in range(10):
        now[0] += 60
        state.add({"grad_norm": 1.0}, 60.0)
        due.append(checkpoints.due(state))
        if due[-1]:
            assert checkpoints.write(Slow(), state)
            assert not checkpoints.write(Slow(), state)  # it is already written
    assert due == [False, True, False, False, False, False, True, False, False, False]


def test_describe_progress(tiny_folder, tmp_path):
    assert describe_progress(tmp_path / "none") is None
    shards_of(tmp_path / "answers", [])(0)
    train(tmp_path / "training", scored_pairs(tiny_folder), tiny_folder, cut=3)
    assert describe_progress(tmp_path) == "1 shard of answers, training up to step 3"
    shutil.rmtree(tmp_path / "training" / "step-00000003")
    assert describe_progress(tmp_path).endswith("step 2")
    (tmp_path / "answers").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "answers" / "1-0-1024")  # of a part of MT-Bench's questions
    (tmp_path / "moved").rename(tmp_path / "verdicts")
    assert describe_progress(tmp_path).startswith("1 shard of answers, 1 shard of verdicts, training")


class FakeEngine:
    """An engine whose state is one number."""

    def __init__(self, before_save=lambda: None):
        self.before_save = before_save

    def save_state(self, folder):
        self.before_save()
        (folder / "state.bin").write_bytes(b"7")

    def load_state(self, folder):
        self.value = (folder / "state.bin").read_bytes()


def state_at(step):
    return TrainState(step=step, rows=[{"step": n} for n in range(step)])


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("point", ["in save_state", "before commit", "after commit"])
def test_kill_during_write(tmp_path, point):
    """A checkpoint whose write is killed is complete or absent; the previous one is kept."""
    Checkpoints(tmp_path).write(FakeEngine(), state_at(3))
    if (child := os.fork()) == 0:
        original = checkpoints_module.commit_atomically

        def commit(*arguments):
            if point == "after commit":
                original(*arguments)
            kill()

        checkpoints_module.commit_atomically = commit
        Checkpoints(tmp_path).write(FakeEngine(kill if point == "in save_state" else lambda: None), state_at(4))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    engine = FakeEngine()
    state = Checkpoints(tmp_path).restore(engine)
    assert state == state_at(4 if point == "after commit" else 3) and engine.value == b"7"
    assert Checkpoints(tmp_path).write(engine, state_at(5))


def test_write_on_interrupt(tmp_path):
    messages = []
    with (
        pytest.raises(Interrupted),
        Checkpoints(tmp_path, say=messages.append).write_on_interrupt(FakeEngine(), state_at(3), 8),
    ):
        raise Interrupted(signal.SIGTERM)
    assert messages == ["saved the training state at step 3 of 8"]
    assert Checkpoints(tmp_path).restore(FakeEngine()).step == 3


def test_nothing_is_written_after_close(tmp_path):
    """Nothing is written after `close`, because the state of a closed engine would replace a good checkpoint."""

    def fail():
        raise AssertionError

    checkpoints = Checkpoints(tmp_path, steps=1)
    checkpoints.close()
    assert not checkpoints.due(state_at(3)) and not checkpoints.write(FakeEngine(fail), state_at(3))
    with pytest.raises(Interrupted), checkpoints.write_on_interrupt(FakeEngine(fail), state_at(3), 8):
        raise Interrupted(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    interrupt.install_handlers()
    yield
    interrupt.install_handlers()  # discards received signals
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_deferred_signal(signals, number):
    events = []

    def work():
        with deferred():
            with deferred():
                os.kill(os.getpid(), number)
            time.sleep(0.01)
            events.append("whole")
        events.append("never")

    with pytest.raises(Interrupted) as error:
        work()
    assert events == ["whole"] and error.value.signal == number
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it twice; the second must not interrupt a write
    time.sleep(0.01)


def test_ignored_signal_stays_ignored(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt.install_handlers()
    os.kill(os.getpid(), signal.SIGHUP)


def test_previous_handler_is_called_last(signals, monkeypatch):
    """An earlier handler is called last, like submitit's, which requeues the job and ends the process."""
    monkeypatch.setattr(interrupt, "_previous", {})
    called = []
    signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    interrupt.install_handlers()
    interrupt.install_handlers()  # as each point of a sweep does
    with pytest.raises(Interrupted) as error, deferred():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert called == []
    interrupt.call_previous_handler(error.value.signal)
    interrupt.call_previous_handler(signal.SIGTERM)  # not called: submitit's handler ignores SIGTERM
    interrupt.call_previous_handler(signal.SIGUSR1)
    assert called == [signal.SIGUSR2]


@pytest.mark.parametrize(
    ("job", "requeued"),
    [
        ("JobState=RUNNING Reason=None PreemptEligibleTime=2026-11-27T15:13:24 PreemptTime=2026-11-27T15:13:45", True),
        (
            "JobState=PREEMPTED Reason=None PreemptEligibleTime=2026-11-27T15:13:24 PreemptTime=2026-11-27T15:13:45",
            True,
        ),
        ("JobState=RUNNING Reason=None PreemptEligibleTime=2026-11-27T15:13:24 PreemptTime=None", False),
        (
            "JobState=CANCELLED Reason=None PreemptEligibleTime=2026-11-27T15:13:24 PreemptTime=2026-11-27T15:13:45",
            False,
        ),
        ("slurm_load_jobs error: Invalid job id specified", False),
        (None, False),  # no SLURM
    ],
)
def test_preempted_job_is_requeued(job, requeued, signals, monkeypatch, tmp_path):
    """A job is requeued if `scontrol show job` reports a preemption; tests/pipeline/test_slurm.py uses a real SLURM."""
    if job:
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\ntest "$*" = "show job --oneliner 7" && echo "JobId=7 {job}"\n')
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    called = []
    monkeypatch.setattr(interrupt, "_previous", {signal.SIGUSR2: lambda number, frame: called.append(number)})
    interrupt.call_previous_handler(signal.SIGTERM)
    assert called == [signal.SIGUSR2] * requeued


def test_second_ctrl_c_ends_at_once():
    script = (
        "import os, signal, time; from spin.runtime import signals\n"
        "signals.install_handlers()\n"
        "with signals.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 130 and result.stderr == "terminated immediately.\n"


@pytest.mark.parametrize("phase", ["forward", "step"])
def test_signal_in_training(tiny_folder, tmp_path, signals, phase, monkeypatch):
    """A signal in a forward pass saves the state before that step; a signal in an update saves the state after it."""
    pairs = scored_pairs(tiny_folder)
    engine, messages = engine_of(tiny_folder), []
    method = "backward" if phase == "forward" else "step"
    original = getattr(engine, method)

    def send_signal(*arguments):
        if len(rows) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    rows = []
    monkeypatch.setattr(engine, method, send_signal)
    checkpoints = Checkpoints(tmp_path, minutes=60, say=messages.append)
    with pytest.raises(Interrupted):
        train_engine(engine, pairs[0], references=pairs[1], log=rows.append, checkpoints=checkpoints, **SETTINGS)
    saved_step = 4 if phase == "forward" else 5
    assert messages == [f"saved the training state at step {saved_step} of 8"]
    with pytest.raises(Interrupted):  # a library that swallows the signal only delays it
        interrupt.raise_if_stopped()
    interrupt.install_handlers()  # as in the next process
    resumed = train(tmp_path, pairs, tiny_folder)
    assert resumed[2] == saved_step and same(resumed, train(None, pairs, tiny_folder))


def test_nothing_stored_can_execute_code(tiny_folder, tmp_path):
    train(tmp_path / RESUME, scored_pairs(tiny_folder), tiny_folder, cut=3)
    shards_of(tmp_path / RESUME / "answers", [])(0)
    files = {path.suffix for path in (tmp_path / RESUME).rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json", ".parquet"}
    for path in (ROOT / "spin").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
        assert not names & {"eval", "exec"} and "torch.load" not in path.read_text(), path
        assert "trust_remote_code=True" not in path.read_text(), path
    state = json.loads((tmp_path / RESUME / "step-00000003" / "state.json").read_text())
    assert state["step"] == 3 and len(state["rows"]) == 3
