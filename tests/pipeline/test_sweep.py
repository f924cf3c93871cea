"""Tests of sweeps: a table of all points, failed and finished, and no point played twice."""

import csv
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

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spin.config.hydra import LAUNCHERS, load
from spin.evaluation.measure_table import MEASURES
from spin.pipeline import points
from spin.pipeline.points import content_hash, is_done, play_point, record_status
from spin.reporting.sweep_rows import RECORD, Point, read_record, rows_of
from spin.runtime.signals import Interrupted
from tests.config.test_schema import composed
from tests.games import ROOT, Place
from tests.pipeline.test_external import question_file


def table(folder: Path) -> list[dict]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def sweep(place: Place, *words: str, status: int = 0, name: str = "sweep") -> subprocess.CompletedProcess:
    return place.play("-m", "iter=0", *words, f"hydra.sweep.dir={place.folder}/{name}", status=status)


BETA_LR = ("loss.beta=0.1,-1,2", "optimizer.lr=1e-3,1e-4")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("sweep"), games)
    place.first = sweep(place, *BETA_LR, status=1)
    return place


def test_leaderboard(swept):
    folder, done = swept.folder / "sweep", swept.first
    assert done.stderr == f"error: 2 of 6 points have no result; {folder}/sweep.md says why.\n"
    assert swept.stages() == {"sft": 1, "generate": 1, "score": 1, "train": 4, "evaluate": 2 + 4}
    rows = [row for row in table(folder) if row["kind"] == "point"]
    assert Counter((row["loss.beta"], row["optimizer.lr"]) for row in rows) == Counter(
        (beta, lr) for beta in ("0.1", "-1", "2") for lr in ("0.001", "0.0001")
    )
    for row in rows:
        if row["loss.beta"] == "-1":
            assert row["status"] == "failed" and row["reason"] == "loss.beta=-1: must be greater than 0."
            assert row["nll_per_token"] == ""
            continue
        game = json.loads((Path(row["folder"]) / "game.json").read_text())
        last = game["evaluations"][-1]
        assert row["status"] == "done" and row["policy"] == last["policy"] == "iter0"
        assert float(row["nll_per_token"]) == last["nll_per_token"]
        assert [float(row["rouge_l_low"]), float(row["rouge_l_high"])] == last["rouge_l_interval"]
        assert "mauve" not in row and "classifier_auc" not in row  # too few prompts
        assert game["iterations"][0]["beta"] == float(row["loss.beta"])
        assert game["iterations"][0]["lr"] == float(row["optimizer.lr"])
    shares = [abs(float(row["human_likelier"]) - 0.5) for row in rows if row["status"] == "done"]
    assert shares == sorted(shares) and [row["status"] for row in rows] == ["done"] * 4 + ["failed"] * 2
    (start,) = [row for row in table(folder) if row["kind"] == "start"]
    assert start["policy"] == "sft"
    assert (folder / "figures" / "heatmap.png").is_file()
    page = (folder / "sweep.md").read_text()
    note = f"MAUVE: needs {MEASURES['mauve'].min_prompts} held-out prompts, there are 8"
    assert note in page and note in done.stdout
    assert "figures/heatmap.png" in page and "failed: loss.beta=-1: must be greater than 0." in page
    for link in re.findall(r"\[report\]\(<(.*?)>\)", page):
        assert (folder / link).is_file()
    summary = done.stdout[done.stdout.index("Sweep, 6 points") :]
    assert "loss.beta=-1, optimizer.lr=0.001: failed: loss.beta=-1: must be greater than 0." in summary


def test_second_sweep_plays_missing_points(swept):
    folder = swept.folder / "sweep"
    before, text = swept.stages(), (folder / "sweep.csv").read_text()
    repeated = sweep(swept, *BETA_LR, status=1)
    assert "4 done before, 0 to play, 2 that can't be played" in repeated.stdout
    assert "Launching" not in repeated.stdout and "reused" not in repeated.stdout  # not even looked up in the store
    assert (folder / "sweep.csv").read_text() == text and swept.stages() == before
    (point,) = folder.glob("*loss.beta=2*lr=0.001")
    stages = json.loads((point / "stages.json").read_text())["stages"]
    (training,) = [stage for stage in stages if stage.startswith("train/")]
    shutil.rmtree(swept.folder / "store" / training)
    wider = sweep(swept, "loss.beta=2,0.1,3", "optimizer.lr=1e-3", name="sweep")
    assert "3 points" in wider.stdout and "1 done before, 2 to play" in wider.stdout
    assert swept.stages() - before == {
        "train": 1,
        "evaluate": 1,
    }  # of beta 3; the lost stage was computed again with the same content
    assert (folder / "figures" / "lines.png").is_file() and not (folder / "figures" / "heatmap.png").exists()


def test_failing_point(swept):
    """A point whose sequences do not fit the model fails, and a table is written although nothing is measured."""
    words = ("evaluation=none", "generation.max_new_tokens=8,3000")
    done = sweep(swept, *words, status=1, name="failing")
    assert "this point failed: sequences of up to" in done.stdout
    assert done.stderr.startswith("error: 1 of 2 points have no result") and len(done.stderr.splitlines()) == 1
    rows = {row["generation.max_new_tokens"]: row for row in table(swept.folder / "failing")}
    assert rows["8"]["status"] == "done" and rows["8"]["reason"] == ""
    assert rows["3000"]["status"] == "failed" and "do not fit the model's context of 1024" in rows["3000"]["reason"]
    assert not list((swept.folder / "failing" / "figures").iterdir())


def test_invalid_point(swept):
    words = ("optimizer=rmsprop,adamw", "optimizer.alpha=0.8,0.9", "plan=true")
    done = sweep(swept, *words, name="planned")
    assert len(re.findall(r"optimizer.alpha=0.[89]: has no effect with optimizer=adamw", done.stdout)) == 2
    assert done.stdout.count("stages to reuse") == 2 and not (swept.folder / "planned").exists()
    done = sweep(swept, "loss.betta=1,2", status=1, name="typo")
    assert done.stderr == "error: loss.betta: there is no such setting. Did you mean loss.beta?\n" and not done.stdout
    assert not (swept.folder / "typo").exists()


def test_plan_continues_after_a_point_that_fails(swept):
    words = ("evaluation=none", "generation.max_new_tokens=3000,8", "plan=true")
    done = sweep(swept, *words, status=1, name="unplanned")
    assert "error: sequences of up to" in done.stdout and done.stdout.count("stages to reuse") == 1
    assert done.stderr == "error: 1 of 2 points can't be planned.\n" and not (swept.folder / "unplanned").exists()


def test_stopped_sweep_continues(swept):
    words = ("evaluation=none", "loss.beta=4,5,6", "tracking.wandb=disabled", f"hydra.sweep.dir={swept.folder}/stopped")
    game = swept.start("-m", "iter=0", *words)
    folder = swept.folder / "stopped"
    while not list(folder.glob(f"*/{RECORD}")):
        assert game.poll() is None, game.wait()
        time.sleep(0.02)
    game.kill(signal.SIGTERM)
    done = game.wait(60)
    assert done.returncode == 128 + signal.SIGTERM and len(done.stderr.splitlines()) == 1
    assert len(list(folder.glob(f"*/{RECORD}"))) < 3 and not (folder / "sweep.csv").exists()
    sweep(swept, "evaluation=none", "loss.beta=4,5,6", name="stopped")
    assert [row["status"] for row in table(folder)] == ["done"] * 3


def test_points_are_a_wandb_group(swept, tmp_path):
    model = next((swept.folder / "cache").glob("tiny-*[0-9]"))
    shutil.copytree(model, tmp_path / "mine")
    words = [
        word
        for word in swept.words("-m", "evaluation=none", "iter=0", "loss.beta=7")
        if not word.startswith(("tracking", "hydra.run"))
    ]
    words += [f"model.path={tmp_path}/mine,{tmp_path}/gone", "tracking.wandb=offline", "name='${model.name}-x'"]
    done = swept.games.play(*words, f"hydra.sweep.dir={tmp_path}/models-of-mine")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row["model.path"]: row for row in table(tmp_path / "models-of-mine")}
    assert rows[f"{tmp_path}/mine"]["status"] == "done" and "no such folder" in rows[f"{tmp_path}/gone"]["reason"]
    wandb_logs = list((tmp_path / "models-of-mine").glob("**/offline-run-*/*.wandb"))
    assert len(wandb_logs) == 2  # the point that was played, and the leaderboard
    assert all(b"models-of-mine" in path.read_bytes() for path in wandb_logs)


def test_standard_sweep(tmp_path, games):
    words = ["experiment=beta_lr", "model=tiny", "data=tiny", "plan=true", "tracking.wandb=disabled", "evaluation=none"]
    done = games.play(
        *words, f"cache.path={tmp_path}", f"store.path={tmp_path}/store", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert done.returncode == 0, done.stderr
    points = re.findall(r"#\d+ : .*loss.beta=(\S+) optimizer.lr=(\S+)", done.stdout)
    assert len({*points}) == 9 and {float(beta) for beta, _ in points} == {0.05, 0.1, 0.5}
    assert composed("experiment=beta_lr").name == "smollm2-sharegpt"


# --- a point's record -------------------------------------------------------------------------------------------------


def test_is_done(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    words = ["model=tiny", "data=local", f"data.path={data}", "stage=evaluate"]
    config = load(*words)
    folder = tmp_path / "point"
    folder.mkdir()
    assert not is_done(folder, config)
    stage = tmp_path / "store" / "evaluate" / "0"
    stage.mkdir(parents=True)
    for path in (folder / "game.json", folder / "report.md", folder / "report.html", stage / "manifest.json"):
        path.write_text("{}")
    (folder / "stages.json").write_text(json.dumps({"store": str(tmp_path / "store"), "stages": ["evaluate/0"]}))
    record_status(folder, "playing", made_of=content_hash(config))
    assert not is_done(folder, config)
    record_status(folder, "done", made_of=content_hash(config))
    assert is_done(folder, config)
    assert is_done(folder, load(*words, "tracking.project=other", "checkpoint.minutes=9"))  # no result depends on them
    assert not is_done(folder, load(*words, "evaluation.bootstrap=999"))
    questions = ["stage=evaluate", f"evaluation.questions={question_file(tmp_path)}"]
    before = content_hash(load(*words, *questions))
    (tmp_path / "data" / "judge_prompts.jsonl").write_text("{}")
    assert content_hash(load(*words, *questions)) != before
    os.utime(data, ns=(1, 1))
    assert not is_done(folder, config)
    record_status(folder, "done", made_of=content_hash(config))
    assert is_done(folder, config)
    (stage / "manifest.json").unlink()
    assert not is_done(folder, config)
    (folder / RECORD).write_text('{"status": "do')
    assert not is_done(folder, config)


def test_content_hash_of_hub_names():
    assert content_hash(load("data=local", "data.path=some/name")) is None  # its content may change
    assert content_hash(load("data=local", "data.path=some/name", "data.revision=abc")) is not None
    assert content_hash(load("evaluation.judge='http://x/v1'")) is not None


@pytest.mark.parametrize("name", ["head.py", "pair.txt"])  # a judge's prompt, too, determines results
def test_program_hash(tmp_path, monkeypatch, name):
    module = tmp_path / "engines" / name
    module.parent.mkdir()
    monkeypatch.setattr(points, "PACKAGE", tmp_path)
    hashes = set()
    for text in ("x = 1", "x = 2"):
        module.write_text(text)
        hashes.add(points._program_hash.__wrapped__())
    assert len(hashes) == 2


def test_bug_leaves_a_traceback(tmp_path, capsys):
    def broken():
        raise ZeroDivisionError("by nothing")

    play_point(load(), tmp_path / "point", broken)
    (row,) = rows_of([Point({}, tmp_path / "point")])
    assert row["status"] == "failed" and row["reason"].startswith("ZeroDivisionError: by nothing")
    assert "in broken" in read_record(tmp_path / "point")["traceback"] and "in broken" in capsys.readouterr().err
    with pytest.raises(Interrupted):
        play_point(load(), tmp_path / "point", lambda: (_ for _ in ()).throw(Interrupted(signal.SIGTERM)))
    (row,) = rows_of([Point({}, tmp_path / "point")])
    assert row["status"] == "unfinished"


def test_signal_survives_pickling():
    import pickle

    stop = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert isinstance(stop, Interrupted) and stop.signal is signal.SIGTERM


def test_launcher_cannot_start(swept):
    words = ("-m", "iter=0", "loss.beta=1,2", "hydra/launcher=cluster", f"hydra.sweep.dir={swept.folder}/slurm")
    done = swept.play(*words, status=1, env={"PATH": str(swept.folder)})  # without SLURM's programs
    assert "no point can be launched" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm", "cluster"])
def test_launcher_not_installed(launcher):
    """A missing launcher is reported. Hydra's search path for plugins is reduced to the project's own."""
    script = "import runpy, sys, hydra_plugins; hydra_plugins.__path__ = ['hydra_plugins'];"
    script += "sys.argv[0] = 'run.py'; runpy.run_path('run.py', run_name='__main__')"
    words = ["-m", "experiment=smoke", f"hydra/launcher={launcher}", "loss.beta=1,2"]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    requirement = LAUNCHERS[{"cluster": "submitit_slurm"}.get(launcher, launcher)]
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith(f"pip install {requirement}\n")
    assert requirement in (ROOT / "requirements.txt").read_text()


def test_slurm_settings():
    """The batch script that submitit writes contains the launcher's settings."""
    from submitit.slurm.slurm import _make_sbatch_string

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["hydra/launcher=cluster", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=30"]
        launcher = compose("config", words, return_hydra_config=True).hydra.launcher
    settings = OmegaConf.to_container(launcher)
    assert settings.pop("_target_").endswith("SlurmLauncher") and settings.pop("max_num_timeout") > 0
    for key, submitit_key in (("name", "job_name"), ("timeout_min", "time"), ("tasks_per_node", "ntasks_per_node")):
        settings[submitit_key] = settings.pop(key)
    settings |= {"mem": f"{settings.pop('mem_gb')}GB", "folder": settings.pop("submitit_folder"), "map_count": 2}
    lines = _make_sbatch_string("python", **settings).splitlines()
    for line in ("--partition=gpu", "--time=30", "--signal=USR2@300", "--requeue", "--array=0-1%2", "--mem=64GB"):
        assert f"#SBATCH {line}" in lines, (line, lines)
    assert "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" in lines[: lines.index("# command")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_submitit_job_is_preempted(tmp_path):
    """submitit starts jobs from another folder, with relative paths, that share their stages. The first receives its
    timeout signal and is requeued, the second is killed and launched again, the third is terminated and not restarted."""
    words = ["experiment=smoke", "iter=0", "schedule.epochs=20", "schedule.batch_size=4", "evaluation=none"]
    words += ["cache.path=cache", "store.path=store", "hydra.sweep.dir=sweep", "tracking.wandb=disabled"]
    words += ["-m", "loss.beta=0.1,0.2,0.3,-1", "hydra/launcher=submitit_local", "checkpoint.minutes=60"]

    def start() -> subprocess.Popen:
        with (tmp_path / "out").open("w") as out:
            command = [sys.executable, str(ROOT / "run.py"), *words]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, env=env)

    def children(pid: int) -> list[int]:
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def logs() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*_log.out"))

    def rows() -> dict[str, dict]:
        return {row["loss.beta"]: row for row in table(tmp_path / "sweep") if row["kind"] == "point"}

    game = start()
    signals = {0: signal.SIGUSR2, 1: signal.SIGKILL, 2: signal.SIGTERM}
    while signals:
        assert game.poll() is None, (tmp_path / "out").read_text()
        for number, beta in enumerate(("0.1", "0.2", "0.3")):
            metrics = list((tmp_path / "sweep").glob(f"*loss.beta={beta}*/metrics.jsonl"))
            if number in signals and metrics and '"train"' in metrics[0].read_text():
                os.kill(children(children(game.pid)[number])[0], signals.pop(number))  # the job of submitit's process
        time.sleep(0.02)
    assert game.wait(280) == 1, (tmp_path / "out").read_text()
    assert "a point's process died, going on without it" in (tmp_path / "out").read_text()
    row_of = rows()
    assert [row_of[beta]["status"] for beta in ("0.1", "0.2", "0.3", "-1")] == ["done", "done", "unfinished", "failed"]
    assert row_of["0.3"]["reason"] == "stopped by SIGTERM: run the same command to continue"
    assert logs().count("saved the training state at step") == 2 and logs().count("resuming, training up to step") == 1
    assert start().wait(280) == 1
    assert "2 done before, 1 to play, 1 that can't be played" in (tmp_path / "out").read_text()
    assert rows()["0.3"]["status"] == "done" and logs().count("resuming, training up to step") == 2
    stages = Counter(path.parent.parent.name for path in (tmp_path / "store").glob("*/*/manifest.json"))
    assert stages == {"sft": 1, "generate": 1, "score": 1, "train": 3}


@pytest.mark.slow
def test_killed_joblib_worker(tmp_path):
    """A sweep survives when a worker is killed, with which joblib's pool of interpreters ends."""
    words = ["experiment=smoke", "iter=0", "schedule.epochs=12", "evaluation=none", "tracking.wandb=disabled"]
    words += [f"cache.path={tmp_path}/cache", f"store.path={tmp_path}/store", f"hydra.sweep.dir={tmp_path}/sweep"]
    words += ["-m", "loss.beta=0.1,0.2,0.3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "run.py", *words]
        game = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(tmp_path.glob(f"sweep/*/{RECORD}")):
        assert game.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.1)
    children = Path(f"/proc/{game.pid}/task/{game.pid}/children").read_text().split()
    workers = [pid for pid in children if b"popen_loky" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    assert game.wait(280) == 0, (tmp_path / "out").read_text()
    assert "a point's process died, going on without it" in (tmp_path / "out").read_text()
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["done"] * 3
