"""`spin.play`: a game from Python, its result, and its errors."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM

import spin
from tests.games import ROOT


def settings(folder: Path, **overrides) -> dict:
    paths = {"store": {"path": folder / "store"}, "cache.path": folder / "cache", "hydra.run.dir": folder / "run"}
    return {**paths, "tracking": {"wandb": "disabled"}, "evaluation.bootstrap": 50, "iter": 0, **overrides}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def result(folder):
    return spin.play("experiment=smoke", **settings(folder, schedule={"sft_epochs": 1}))


def test_result(result, folder):
    assert isinstance(result, spin.Result) and result.folder == folder / "run"
    assert list(result.policies) == ["sft", "iter0"] and result.best == result.policies["iter0"]
    assert all(AutoModelForCausalLM.from_pretrained(path) for path in result.policies.values())
    assert list(result.measures) == ["start", "sft", "iter0"]
    assert result.measures["iter0"]["nll_per_token"] < result.measures["start"]["nll_per_token"]
    assert {"prompt", "real", "generated"} <= set(pq.read_table(result.pairs[0]).column_names)
    assert result.config.schedule.sft_epochs == 1 and result.config.evaluation.bootstrap == 50
    assert result.summary == json.loads((folder / "run" / "game.json").read_text())
    assert result.summary["command"].startswith("python run.py experiment=smoke store.path=/")
    assert len(repr(result)) < 1500


def test_second_call_reuses_stages_and_evaluate_measures_a_policy(result, folder, capsys):
    repeated = spin.play("experiment=smoke", **settings(folder, schedule={"sft_epochs": 1}))
    assert "nothing was computed again" in capsys.readouterr().out and repeated.measures == result.measures
    evaluate = settings(folder, stage="evaluate", model=result.best, **{"hydra.run.dir": folder / "measured"})
    measured = spin.play("experiment=smoke", **evaluate)
    assert measured.policies == {} and measured.best is None and measured.pairs == {}
    (row,) = measured.measures.values()
    assert row["nll_per_token"] == result.measures["iter0"]["nll_per_token"]


def test_best_is_the_selected_policy(folder):
    selecting = {"data.validation": 8, "schedule.sft_epochs": 1, "hydra.run.dir": folder / "selected"}
    selected = spin.play("experiment=smoke", **settings(folder, **selecting))
    assert selected.best == folder / "selected" / "best" / "policy" or selected.summary["selected"]["policy"] == "start"
    assert selected.best and (selected.best / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "overrides", "line"),
    [
        ([], {"loss": {"betta": 1}}, "loss.betta: there is no such setting. Did you mean loss.beta?"),
        ([], {"optimizer": "sgdd"}, "optimizer=sgdd: there is no such choice. There are: adamw, "),
        ([], {"loss": {"beta": -1}}, "loss.beta=-1: must be greater than 0."),
        (["loss.beta=[1"], {}, "no viable alternative"),
        ([], {"iter": "one"}, "iter=one: must be a valid integer."),
        ([], {"model": "/nowhere/at/all", "data": "tiny"}, "model.path=/nowhere/at/all: no such folder."),
        ([], {"model": "tiny", "data": "my pairs.jsonl"}, "my pairs.jsonl: no such file or folder"),
        ([], {"plan": True}, "spin.play plays one game in one process"),
        (["loss.beta=1,2"], {}, "loss.beta"),
        (["experiment=beta_lr"], {}, "spin.play plays one game: use run.py for a sweep."),
        ([], {"model": None}, "model=None: give a choice in conf/model/, a path or a hub name, or leave it out."),
    ],
)
def test_errors_are_one_line(words, overrides, line, tmp_path):
    with pytest.raises(spin.UserError) as error:
        spin.play(*words, **settings(tmp_path, **overrides))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists() and not GlobalHydra.instance().is_initialized()


def test_internal_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("spin.game.play", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        spin.play("experiment=smoke", **settings(tmp_path))


def test_import_is_lazy_and_documented():
    code = "import sys, spin; assert spin.UserError; print('hydra' in sys.modules or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert "loss=" in inspect.getdoc(spin.play)
    with pytest.raises(AttributeError, match="no attribute 'playy'"):
        spin.playy  # noqa: B018


INTERRUPTED = """
import spin
settings = {settings!r}
try:
    spin.play("experiment=smoke", **settings)
except KeyboardInterrupt:
    print("interrupted")
print(list(spin.play("experiment=smoke", **settings).policies))
"""


@pytest.mark.slow
def test_interrupted_kernel_resumes(tmp_path):
    slow_game = settings(tmp_path, **{"schedule.sft_epochs": 60, "checkpoint": {"steps": 2}})
    text = {key: str(value) if isinstance(value, Path) else value for key, value in slow_game.items()}
    text["store"] = {"path": str(tmp_path / "store")}
    command = [sys.executable, "-c", INTERRUPTED.format(settings=text)]
    game = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    while not list(tmp_path.glob("store/sft/*.part/resume/training/step-*")) and game.poll() is None:
        time.sleep(0.1)
    game.send_signal(signal.SIGINT)
    out = game.communicate(timeout=250)[0].decode()
    assert game.returncode == 0 and "interrupted" in out, out
    assert "resuming, training up to step" in out, out
    assert out.strip().endswith("['sft', 'iter0']")
