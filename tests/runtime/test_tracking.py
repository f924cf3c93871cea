"""The output of a run: metrics.jsonl, W&B (the real client, offline), printed lines and progress bars."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from spin.runtime import progress
from spin.runtime.errors import UserError
from spin.runtime.progress import format_seconds
from spin.runtime.tracking import SENT, Tracker, wandb_mode
from tests.games import ROOT
from tests.wandb_log import runs

KEY = "0" * 40


@pytest.fixture(autouse=True)
def no_wandb_login(monkeypatch, tmp_path):
    """Remove all W&B variables and use a missing netrc file, so that no test logs in to W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def tracker(folder, wandb="disabled", rank=0, **console):
    output = io.StringIO()
    console = Console(file=output, width=100, **console)
    return Tracker(folder, name="t", config={"seed": 0}, wandb=wandb, rank=rank, console=console), output


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_row_is_written_immediately(tmp_path):
    run_tracker, _ = tracker(tmp_path)
    row = {"iter": 0, "step": 1, "stage": "train", "loss": 0.5, "rewards/real": -0.1}
    run_tracker.log(row)
    assert rows(tmp_path) == [row]
    run_tracker.close()


def test_another_run_replaces_the_rows(tmp_path):
    for loss in (1.0, 2.0):
        run_tracker, _ = tracker(tmp_path)
        run_tracker.log({"loss": loss})
        run_tracker.close()
    assert rows(tmp_path) == [{"loss": 2.0}]


def test_values_outside_json(tmp_path):
    run_tracker, _ = tracker(tmp_path)
    run_tracker.log(
        {"nan": float("nan"), "inside": [np.float32("inf"), np.int64(3)], "path": Path("a/b"), "scalar": np.array(1.5)}
    )
    run_tracker.close()
    assert rows(tmp_path) == [{"nan": None, "inside": [None, 3], "path": "a/b", "scalar": 1.5}]


def test_other_ranks_leave_no_trace(tmp_path):
    folder = tmp_path / "run"
    run_tracker, output = tracker(folder, wandb="online", rank=1)
    run_tracker.log({"loss": 1.0})
    run_tracker.say("hello")
    run_tracker.samples("iter0", [{"prompt": "a", "real": "b", "generated": "c"}])
    with run_tracker.progress("train", 3, "pairs") as bar:
        bar.advance(3, loss=1.0)
    run_tracker.close({"a": 1})
    assert not folder.exists()
    assert output.getvalue() == ""


# --- W&B --------------------------------------------------------------------------------------------------------------


def test_offline_run_needs_no_network(tmp_path):
    """An offline run prints one line and sends nothing; in a separate process, to capture what W&B's service prints."""
    code = """
import sys, pathlib
from spin.runtime.tracking import Tracker
run_tracker = Tracker(pathlib.Path(sys.argv[1]), name="t", config={"loss": {"beta": 0.1}}, wandb="auto")
for t in (0, 1):
    for step in (0, 1):
        run_tracker.log({"iter": t, "step": step, "stage": "train", "loss": 0.5, "grad_norm": None})
    run_tracker.log({"iter": t, "step": 0, "stage": "evaluate", "policy": f"iter{t}", "a": 0.2, "a_interval": [0.1, 0.3]})
    run_tracker.samples(f"iter{t}", [{"prompt": "p", "real": "r", "generated": f"g{t}"}])
run_tracker.close({"peak_memory_gib": 1.0})
run_tracker.close()
run_tracker.say("after")
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert result.stdout == f"W&B is offline; to upload this run: wandb sync {run}\nafter\n"
    assert len(rows(tmp_path)) == 6

    (log,) = runs(tmp_path)
    assert [row["global_step"] for row in log.rows] == [1, 2, 2, 2, 3, 4, 4, 4] and log.exit_code == 0
    assert [row.get("train/loss") for row in log.rows] == [0.5, 0.5, None, None] * 2
    assert [row["evaluate/a_interval_low"] for row in log.rows if "evaluate/a" in row] == [0.1, 0.1]
    assert log.summary["peak_memory_gib"] == 1.0 and log.config["loss"] == {"beta": 0.1}
    tables = [json.loads(path.read_text()) for path in (run / "files/media/table").iterdir()]
    longest = max(tables, key=lambda table: len(table["data"]))
    assert longest["columns"] == ["iteration", "prompt", "real", "generated"]
    assert longest["data"] == [["iter0", "p", "r", "g0"], ["iter1", "p", "r", "g1"]]
    file_names = {path.name for path in run.rglob("*") if path.is_file()}
    assert not file_names & {"requirements.txt", "diff.patch", "output.log"}
    assert not any(name.endswith(".py") for name in file_names)


def test_wandb_row(tmp_path):
    run_tracker, _ = tracker(tmp_path)
    wandb_rows = [
        run_tracker._wandb_row({"stage": stage, "iter": t, "step": step, "loss": 0.5})
        for stage, t, step in [("sft", None, 0), ("sft", None, 1), ("train", 0, 0), ("train", 0, 1), ("train", 1, 0)]
    ]
    assert [row["global_step"] for row in wandb_rows] == [1, 2, 3, 4, 5]
    assert wandb_rows[0] == {"sft/step": 0, "sft/loss": 0.5, "iter": -1, "global_step": 1}
    evaluation = run_tracker._wandb_row(
        {"stage": "evaluate", "iter": 1, "step": 0, "a": None, "b": 2.0, "b_interval": [1.0, 3.0]}
    )
    values = {"evaluate/a": None, "evaluate/b": 2.0, "evaluate/b_interval_low": 1.0, "evaluate/b_interval_high": 3.0}
    assert evaluation == {"evaluate/step": 0, **values, "iter": 1, "global_step": 5}
    run_tracker.close()


def test_disabled_does_not_import_wandb(tmp_path):
    code = """
import sys, pathlib
from spin.runtime.tracking import Tracker
run_tracker = Tracker(pathlib.Path(sys.argv[1]), name="t", config={}, wandb="disabled")
run_tracker.log({"loss": 1.0}); run_tracker.samples("iter0", []); run_tracker.close()
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    assert not (tmp_path / "wandb").exists()


def test_wandb_failure_prints_one_line(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no space\nleft")

    monkeypatch.setattr(Tracker, "_start", fail)
    run_tracker, output = tracker(tmp_path, wandb="offline")
    for _ in range(3):
        run_tracker.log({"loss": 1.0})
    run_tracker.samples("iter0", [{"prompt": "a", "real": "b", "generated": "c"}])
    run_tracker.close()
    assert len(rows(tmp_path)) == 3
    assert len(output.getvalue().splitlines()) == 1
    assert "(no space left)" in output.getvalue()


def test_failed_run_is_marked_in_wandb(tmp_path):
    run_tracker, _ = tracker(tmp_path, wandb="offline")
    run_tracker.log({"loss": 1.0})
    try:
        raise KeyError
    except KeyError:
        run_tracker.close({"x": float("nan")})
    for _ in range(100):  # W&B's process writes the exit code later
        (log,) = runs(tmp_path)
        if log.exit_code is not None:
            break
        time.sleep(0.1)
    assert log.exit_code == 1 and log.summary["x"] is None


def attempt(folder, steps, *, seconds=1.0, beta=0.1, **config):
    """Run one attempt at a game: training steps with samples after the second, and the step count in the summary."""
    settings, console = {"loss": {"beta": beta}, **config}, Console(file=io.StringIO())
    run_tracker = Tracker(folder, name="t", config=settings, wandb="offline", console=console)
    for step in range(steps):
        run_tracker.log({"iter": 0, "stage": "train", "step": step, "loss": beta + step, "pairs_per_second": seconds})
        if step == 1:
            run_tracker.samples("iter0", [{"prompt": "p", "real": "r", "generated": "g"}])
    run_tracker.close({"last": steps})
    time.sleep(1)  # W&B's folder names contain the time in seconds


def test_continued_game_continues_its_run(tmp_path):
    attempt(tmp_path, 3, iter=0)
    with (tmp_path / SENT).open("a") as file:
        file.write('{"iter": 0, "sta')  # truncated by a kill
    attempt(tmp_path, 5, iter=1, seconds=2.0)
    first, second = runs(tmp_path)
    assert first.id == second.id and second.summary["last"] == 5
    wandb_rows = first.rows + second.rows
    assert [row["_step"] for row in wandb_rows] == list(range(6))
    assert [row.get("train/step") for row in wandb_rows] == [0, 1, None, 2, 3, 4]
    assert [row["global_step"] for row in wandb_rows] == [1, 2, 2, 3, 4, 5]
    assert len(rows(tmp_path)) == 5  # the file is complete
    attempt(tmp_path, 2, iter=1, beta=0.2)  # another game in the same folder
    attempt(tmp_path, 3, iter=1, beta=0.2)
    third, fourth = runs(tmp_path)[2:]
    assert third.id == fourth.id != first.id
    assert [row.get("train/step") for row in third.rows + fourth.rows] == [0, 1, None, 2]


STOPPED = """
import os, pathlib, signal, sys, time
from spin.runtime import signals
from spin.runtime.tracking import Tracker
signals.install_handlers()
run_tracker = Tracker(pathlib.Path(sys.argv[1]), name="t", config={}, wandb="offline")
def log(step):
    run_tracker.log({"iter": 0, "stage": "train", "step": step, "loss": 0.5})
def signal_wandb(number):
    children = [pid for path in pathlib.Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    cores = [int(pid) for pid in children if b"wandb-core" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(cores) == 1
    os.kill(cores[0], number)
    time.sleep(0.5)
try:
    for step in range(4):
        with signals.deferred():
            if step == 2:
                time.sleep(0.3)  # W&B writes its file
                exec(sys.argv[2])
            log(step)
except KeyboardInterrupt:
    pass
finally:
    run_tracker.close()
"""
STOPS = {
    "batch system": "signal_wandb(signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)",
    "only W&B": "signal_wandb(signal.SIGKILL)",
    "all killed": "signal_wandb(signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)",
    "notice": "signal_wandb(signal.SIGUSR2)",
    "none": "pass",
}


@pytest.mark.parametrize("stop", ["batch system", "only W&B", "all killed", "notice"])
def test_stopped_processes(stop, tmp_path):
    """No row is lost or sent twice, and no error is raised, if W&B's process or all processes receive signals."""

    def play(stop):
        command = [sys.executable, "-c", STOPPED, tmp_path, STOPS[stop]]
        env = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # the service of this process
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    result = play(stop)
    assert result.returncode == (-9 if stop == "all killed" else 0) and not result.stderr, result.stderr
    assert ("W&B stopped working" in result.stdout) == (stop == "only W&B")
    resumed = play("none")
    assert resumed.returncode == 0 and not resumed.stderr, resumed.stderr
    wandb_steps = [(log.id, row["train/step"]) for log in runs(tmp_path) for row in log.rows]
    last = runs(tmp_path)[-1].id
    assert [step for run, step in wandb_steps if run == last] == [0, 1, 2, 3]
    assert len({run for run, _ in wandb_steps}) == 1 + (stop == "only W&B")  # its rows are unknown


def test_policies_are_uploaded_once(tmp_path):
    policy = tmp_path / "iter0" / "policy"
    policy.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (policy / name).write_text("{}")
    for _ in range(2):
        run_tracker, output = tracker(tmp_path, wandb="offline")
        run_tracker.policy("iter0", policy)
        run_tracker.close()
        assert "Warning" not in output.getvalue()
    first, second = runs(tmp_path)
    assert first.artifacts == {"t-iter0": ["config.json", "model.safetensors"]} and not second.artifacts


# --- mode -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "variable", "mode"),
    [
        ("auto", None, "auto"),
        ("auto", "offline", "offline"),
        ("auto", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_mode(setting, variable, mode, monkeypatch):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(setting) == mode


def test_login():
    """A login is found in every mode; in separate processes, because wandb keeps a login until its process ends."""
    code = "from spin.runtime.tracking import wandb_mode, _logged_in; print(_logged_in(), wandb_mode('online'))"
    for mode in ("online", "offline"):
        env = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_MODE": mode}
        result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert (result.stdout, result.stderr) == ("True online\n", "")


@pytest.mark.parametrize(("setting", "variable"), [("online", None), ("online", "offline"), ("auto", "online")])
def test_online_without_login(setting, variable, tmp_path, monkeypatch):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="wandb login"):
        tracker(tmp_path, wandb=setting)
    assert rows(tmp_path) == [{}]  # the rows of an earlier run are kept


# --- console output ---------------------------------------------------------------------------------------------------


def test_say_shows_brackets_and_does_not_wrap(tmp_path):
    run_tracker, output = tracker(tmp_path)
    run_tracker.say("loss.beta=[0.1, 5.0] [red]not red[/] " + "x" * 200)
    run_tracker.close()
    run_tracker.say("after")
    assert output.getvalue() == "loss.beta=[0.1, 5.0] [red]not red[/] " + "x" * 200 + "\nafter\n"


def test_progress_in_a_log_file(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    run_tracker, output = tracker(tmp_path)
    with run_tracker.progress("iter 0: train [x]", 100, "pairs") as bar:
        for step in range(100):
            clock[0] += 0.25
            bar.advance(1, loss=0.5, margin=step * 0.01)
    run_tracker.close()
    assert output.getvalue().splitlines() == [
        "iter 0: train [x]: 40/100 pairs, 4.00 pairs/s, 15 s left, loss 0.500, margin 0.390",
        "iter 0: train [x]: 80/100 pairs, 4.00 pairs/s, 5 s left, loss 0.500, margin 0.790",
        "iter 0: train [x]: 100 pairs in 25 s, 4.00 pairs/s, loss 0.500, margin 0.990",
    ]


def test_progress_of_no_items_and_of_a_failure(tmp_path):
    run_tracker, output = tracker(tmp_path)
    with run_tracker.progress("score", 0, "pairs"):
        pass
    with contextlib.suppress(KeyError), run_tracker.progress("generate", 10, "answers") as bar:
        bar.advance(4)
        raise KeyError
    run_tracker.close()
    first, second = output.getvalue().splitlines()
    assert first == "score: 0 pairs in 0 s"
    assert second.startswith("generate: 4/10 answers, ")
    assert second.endswith(": stopped")


def test_progress_of_ranks_counts_ended_answers(tmp_path):
    """Ranks exchange counts, which takes a round trip, only after a step in which an answer has ended."""
    run_tracker, output = tracker(tmp_path)
    exchanged = []
    with run_tracker.progress("generate", 10, "answers") as bar:
        bar.add_for_all = lambda n: exchanged.append(n) or 3 + sum(exchanged)  # another rank has ended three
        for ended in (0, 0, 4, 0, 3, 0):
            bar.advance(ended)
    run_tracker.close()
    assert exchanged == [4, 3, 0]
    assert output.getvalue().startswith("generate: 10 answers in ")


def test_progress_on_a_terminal(tmp_path):
    run_tracker, output = tracker(tmp_path, force_terminal=True, force_interactive=True, _environ={})
    with run_tracker.progress("train [bold]", 4, "pairs") as bar:
        bar.advance(2, loss=0.25)
        run_tracker.say("a line above the bar")
        bar.advance(2, loss=0.125)
    run_tracker.close()
    text = output.getvalue()
    assert "train [bold]" in text
    assert "━" in text
    assert "a line above the bar" in text
    assert "train [bold]: 4 pairs in " in text.splitlines()[-1] and "loss 0.125" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (47, "47 s"),
        (59.7, "1 min 00 s"),
        (192, "3 min 12 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360000, "100 h 00 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_reused_stages_start_no_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, new in (("old", False), ("new", True)):
        run_tracker = Tracker(tmp_path / name, name=name, config={}, wandb="offline")
        run_tracker.log({"stage": "train", "iter": 0, "step": 0, "loss": 0.7}, reused=True)
        run_tracker.samples("iter0", [{"prompt": "p", "real": "r", "generated": "g"}], reused=True)
        if new:
            run_tracker.log({"stage": "train", "iter": 1, "step": 0, "loss": 0.6})
        run_tracker.close()
    assert len((tmp_path / "old" / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "old" / "wandb").exists()
    assert list((tmp_path / "new" / "wandb").glob("offline-run-*"))
