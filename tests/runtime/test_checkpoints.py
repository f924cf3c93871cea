"""Training that is cut anywhere and goes on ends in the same bits; what is damaged is found out and not used."""

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


# --- sealed folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path):
    beside = tmp_path / "beside"
    (beside / "inner").mkdir(parents=True)
    (beside / "a.txt").write_text("first")
    (beside / "inner" / "b.bin").write_bytes(bytes(range(256)) * 9000)
    commit_atomically(beside, tmp_path / "sealed", {"fact": [1, "two"]})
    return tmp_path / "sealed"


def test_commit_and_verify(sealed, tmp_path):
    assert verify_artifact(sealed)["fact"] == [1, "two"]
    assert not (tmp_path / "beside").exists()


def test_verify_finds_any_damage(sealed):
    rng = random.Random(0)
    for path in [path for path in sealed.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for _ in range(40):
            at = rng.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
            with pytest.raises(CorruptArtifact):
                verify_artifact(sealed)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CorruptArtifact):
            verify_artifact(sealed)
        path.unlink()
        with pytest.raises(CorruptArtifact, match="No such file"):
            verify_artifact(sealed)
        path.write_bytes(whole)
        verify_artifact(sealed)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": 3, "xxh3": ""}', '{"xxh3": "x"}', "[" * 100_000])
def test_damaged_manifest(sealed, text):
    (sealed / "manifest.json").write_text(text)
    with pytest.raises(CorruptArtifact):
        verify_artifact(sealed)


# --- shards -----------------------------------------------------------------------------------------------------------


def shards_of(folder, made, messages=None):
    keep = ResumableShards(folder, (messages if messages is not None else []).append)

    def part(number):
        def make():
            made.append(number)
            return [{"id": f"{number}", "ids": (number, 7), "logp": 0.1 * number}]

        return Shard([f"id{number}"], make)

    return lambda *numbers: list(keep([part(number) for number in numbers]))


def test_shard_is_computed_once(tmp_path):
    made = []
    cut = shards_of(tmp_path, made)(0)
    first = shards_of(tmp_path, made)(0, 1, 2)
    again = shards_of(tmp_path, made)(0, 1, 2)
    assert made == [0, 1, 2] and len(cut) == 1
    first[0] = [{**row, "ids": tuple(row["ids"])} for row in first[0]]
    assert [[{**row, "ids": tuple(row["ids"])} for row in rows] for rows in again] == first


def test_damaged_shard(tmp_path):
    made, messages = [], []
    rows = shards_of(tmp_path, made, messages)
    rows(0, 1)
    path = tmp_path / "00001" / "rows.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert [shard[0]["id"] for shard in rows(0, 1)] == ["0", "1"]
    assert made == [0, 1, 1] and len(messages) == 1 and "00001" in messages[0] and "made again" in messages[0]


def test_shard_of_other_prompts(tmp_path):
    made = []
    keep = ResumableShards(tmp_path, print)
    for ids in (["a", "b"], ["a"], ["a"]):
        part = Shard(ids, lambda ids=ids: made.append(ids) or [{"of": ids}])
        assert list(keep([part])) == [[{"of": ids}]]
    assert made == [["a", "b"], ["a"]]


def test_on_reused(tmp_path):
    """Called for shards of an earlier run that fit; not for those of another size, nor for damaged ones."""
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
    """Twelve pairs, and their log-probs under the opponent."""
    pairs = pairs_of(12)
    return pairs, score(folder, pairs, dtype=dtype)


class Cut(Exception):
    """The process dies."""


def train(folder, pairs, tiny_folder, optimizer="rmsprop", dtype=torch.float32, cut=None, every=1, messages=None):
    """`STEPS` steps with a checkpoint after each, or up to `cut`; the masters, the rows and the engine's first step."""
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
    whole = train(None, pairs, tiny_folder, optimizer, dtype)
    for cut in range(0, STEPS, 2 if dtype == torch.float32 else 3):
        folder = tmp_path / str(cut)
        assert train(folder, pairs, tiny_folder, optimizer, dtype, cut=cut) is None
        again = train(folder, pairs, tiny_folder, optimizer, dtype)
        assert again[2] == cut and same(again, whole)
        assert len(list(folder.glob("step-*"))) == 2  # older ones go by themselves


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
    again = train(tmp_path, pairs, tiny_folder, messages=messages)
    assert again[2] == 4 and same(again, train(None, pairs, tiny_folder))
    assert len(messages) == 1 and str(newest) in messages[0] and name in messages[0] and "not used" in messages[0]


def test_all_checkpoints_damaged(tiny_folder, tmp_path):
    pairs, messages = scored_pairs(tiny_folder), []
    train(tmp_path, pairs, tiny_folder, cut=5)
    for folder in tmp_path.glob("step-*"):
        (folder / "state.json").write_text("{}")
    again = train(tmp_path, pairs, tiny_folder, messages=messages)
    assert again[2] == 0 and len(messages) == 2 and same(again, train(None, pairs, tiny_folder))


def test_checkpoint_due(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow:
        def save_state(self, folder):
            now[0] += 9.0  # writing takes nine seconds: the next may come after 300

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
            assert not checkpoints.write(Slow(), state)  # it is kept already
    assert due == [False, True, False, False, False, False, True, False, False, False]


def test_describe_progress(tiny_folder, tmp_path):
    assert describe_progress(tmp_path / "none") is None
    shards_of(tmp_path / "answers", [])(0)
    train(tmp_path / "training", scored_pairs(tiny_folder), tiny_folder, cut=3)
    assert describe_progress(tmp_path) == "1 shard of answers, training up to step 3"
    shutil.rmtree(tmp_path / "training" / "step-00000003")
    assert describe_progress(tmp_path).endswith("step 2")


class FakeEngine:
    """Its state is one number."""

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
    """A checkpoint whose write is killed is complete or absent; the one before is kept."""
    Checkpoints(tmp_path).write(FakeEngine(), state_at(3))
    if (child := os.fork()) == 0:
        usual = checkpoints_module.commit_atomically

        def commit(*arguments):
            if point == "after commit":
                usual(*arguments)
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
    """The state of a closed engine would replace a good checkpoint."""

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
    interrupt.install_handlers()  # forgets what came
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_deferred_signal(signals, number):
    done = []

    def work():
        with deferred():
            with deferred():
                os.kill(os.getpid(), number)
            time.sleep(0.01)
            done.append("whole")
        done.append("never")

    with pytest.raises(Interrupted) as caught:
        work()
    assert done == ["whole"] and caught.value.signal == number
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers say it twice: what is being written is not disturbed
    time.sleep(0.01)


def test_ignored_signal_stays_ignored(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt.install_handlers()
    os.kill(os.getpid(), signal.SIGHUP)


def test_previous_handler_is_called_last(signals, monkeypatch):
    """As submitit's, which is there first, puts the job back into the queue and ends the process."""
    monkeypatch.setattr(interrupt, "_previous", {})
    called = []
    signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    interrupt.install_handlers()
    interrupt.install_handlers()  # each point of a sweep does
    with pytest.raises(Interrupted) as caught, deferred():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert called == []
    interrupt.call_previous_handler(caught.value.signal)
    interrupt.call_previous_handler(signal.SIGTERM)  # submitit's handler of this one would only ignore it
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
    """What SLURM's `scontrol show job` says decides; with a real SLURM this is tests/pipeline/test_slurm.py."""
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
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 130 and done.stderr == "ended at once.\n"


@pytest.mark.parametrize("inside", ["forward", "step"])
def test_signal_in_training(tiny_folder, tmp_path, signals, inside, monkeypatch):
    """In the forward pass of step 4 the state after step 3 is kept; within the update of step 4 that after step 4."""
    pairs = scored_pairs(tiny_folder)
    engine, messages = engine_of(tiny_folder), []
    method = "backward" if inside == "forward" else "step"
    usual = getattr(engine, method)

    def strike(*arguments):
        if len(rows) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments)

    rows = []
    monkeypatch.setattr(engine, method, strike)
    checkpoints = Checkpoints(tmp_path, minutes=60, say=messages.append)
    with pytest.raises(Interrupted):
        train_engine(engine, pairs[0], references=pairs[1], log=rows.append, checkpoints=checkpoints, **SETTINGS)
    kept = 4 if inside == "forward" else 5
    assert messages == [f"saved the training state at step {kept} of 8"]
    with pytest.raises(Interrupted):  # a library that swallows it only delays it
        interrupt.raise_if_stopped()
    interrupt.install_handlers()  # as the next process has it
    again = train(tmp_path, pairs, tiny_folder)
    assert again[2] == kept and same(again, train(None, pairs, tiny_folder))


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
