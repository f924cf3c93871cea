"""Tests of sweep points and batch scripts under a real SLURM, started on this machine by tests/slurm_one_node.sh."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spin.reporting.sweep_rows import read_record
from tests.games import FIXED, ROOT
from tests.pipeline.test_sweep import table
from tests.wandb_log import runs

NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see tests/slurm_one_node.sh)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM is started as root"),
    pytest.mark.skipif(os.cpu_count() < 2, reason="two jobs need two cores"),
]
STARTED: list[subprocess.Popen] = []
RESUMED = "resuming, training up to step"
SETTINGS = """
    experiment=smoke iter=0 evaluation=none schedule.sft_epochs=0 schedule.batch_size=4 checkpoint.minutes=60 tracking.wandb=offline
""".split()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A folder for sweeps while SLURM runs."""
    folder = tmp_path_factory.mktemp("slurm")
    slurm_folder = tempfile.mkdtemp(prefix="slurm-")  # which the database's user can reach
    os.chmod(slurm_folder, 0o755)
    script, env = str(ROOT / "tests" / "slurm_one_node.sh"), {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    subprocess.run([script, "start", slurm_folder], env=env, check=True, timeout=120)
    os.environ["SLURM_CONF"] = f"{slurm_folder}/slurm.conf"
    try:
        yield folder
    finally:
        for process in STARTED:
            process.kill()
        slurm("scancel", "--user=root")
        subprocess.run([script, "stop", slurm_folder], env=env, check=True, timeout=180)
        del os.environ["SLURM_CONF"]
        shutil.rmtree(slurm_folder)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_until(condition: Callable[[], object], sweep: subprocess.Popen | None = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert sweep is None or sweep.poll() is None, sweep.out.read_text()
        assert time.monotonic() < end, sweep and sweep.out.read_text()
        time.sleep(0.2)


class Sweep:
    """A sweep over generation.max_new_tokens in `folder`, as jobs with one core each."""

    def __init__(self, folder: Path, *words: str):
        self.folder = folder
        places = [f"hydra.sweep.dir={folder}/sweep", f"store.path={folder}/store", f"cache.path={folder.parent}/cache"]
        job = ["gpus_per_node=null", "cpus_per_task=1", "mem_gb=2"]
        job = ["hydra/launcher=cluster", *(f"hydra.launcher.{setting}" for setting in job)]
        self.command = [sys.executable, str(ROOT / "run.py"), "-m", *SETTINGS, *places, *job, *words]
        self.out = folder / "out"

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(exist_ok=True)
        env = {**os.environ, **FIXED, "WANDB_SERVICE": ""}
        with self.out.open("w") as out:
            process = subprocess.Popen(self.command, cwd=ROOT, env=env, stdout=out, stderr=out)
        process.out = self.out
        STARTED.append(process)
        return process

    def point(self, tokens: int) -> Path:
        return next((self.folder / "sweep").glob(f"*max_new_tokens={tokens},*"), self.folder / "missing")

    def trains(self, tokens: int) -> bool:
        """Return whether the point has trained for a few steps in its current job."""
        metrics = self.point(tokens) / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count('"stage": "train"') > 3

    def kill(self, tokens: int) -> None:
        """Kill the point's process, as the kernel does when out of memory."""
        lock = str(self.point(tokens) / ".lock")  # open in the point's process only
        files = subprocess.run(
            ["find", *Path("/proc").glob("[0-9]*/fd"), "-lname", lock], capture_output=True, text=True
        )
        (pid,) = {path.split("/")[2] for path in files.stdout.split()}
        os.kill(int(pid), signal.SIGKILL)

    def logs(self, job: str = "*") -> str:
        paths = (self.folder / "sweep" / ".submitit").glob(f"{job}/*_log.*")
        return "".join(path.read_text() for path in sorted(paths))

    def statuses(self) -> dict[str, str]:
        return {
            row["generation.max_new_tokens"]: row["status"]
            for row in table(self.folder / "sweep")
            if row["kind"] == "point"
        }


def preempt() -> None:
    """Preempt all jobs for a second."""
    slurm("srun", "--partition=urgent", f"--ntasks={os.cpu_count()}", "sleep", "1")


def test_points_are_jobs(cluster):
    """Two points are preempted, the second is cancelled after it has resumed, and the last one fails. The sweep's process is
    killed, and in the repeated sweep the second point's process."""
    sweep = Sweep(cluster / "points", "generation.max_new_tokens=64,65,3000", "schedule.epochs=40")
    first = sweep.start()
    wait_until(lambda: sweep.trains(64) and sweep.trains(65), first)
    preempt()
    job = next((sweep.folder / "sweep" / ".submitit").glob("*_1")).name
    wait_until(lambda: RESUMED in sweep.logs(job), first)
    slurm("scancel", job)
    wait_until(lambda: read_record(sweep.point(65))["status"] == "stopped", first)
    first.kill()
    first.wait()

    second = sweep.start()
    wait_until(lambda: sweep.logs().replace(sweep.logs(job), "").count(RESUMED) > 0 and sweep.trains(65), second)
    sweep.kill(65)
    assert second.wait(timeout=600) == 1, sweep.out.read_text()
    text, logs = sweep.out.read_text(), sweep.logs()
    assert sweep.statuses() == {"64": "done", "65": "done", "3000": "failed"}, text
    assert "a point's process died, going on without it" in text and "this point failed: sequences of up to" in logs
    assert "Traceback" not in text + logs and "W&B stopped working" not in text + logs
    for tokens in (64, 65):
        wandb_runs = runs(sweep.point(tokens))
        steps = [row["train/step"] for log in wandb_runs for row in log.rows if "train/step" in row]
        assert len({log.id for log in wandb_runs}) == 1 and {log.group for log in wandb_runs} == {"sweep"}
        assert len(steps) == len({*steps}) and len(steps) >= 240 - 4, (tokens, sorted({*range(240)} - {*steps}))


def test_time_limit(cluster):
    """A job with a time limit of a minute is requeued once and then listed as unfinished."""
    limit = ("timeout_min=1", "signal_delay_s=20", "max_num_timeout=1")
    sweep = Sweep(
        cluster / "limit",
        "generation.max_new_tokens=64",
        "schedule.epochs=2000",
        *(f"hydra.launcher.{setting}" for setting in limit),
    )
    assert sweep.start().wait(timeout=300) == 1
    assert [row["status"] for row in table(sweep.folder / "sweep")] == ["unfinished"]
    assert sweep.logs("*").count(": this job is timed-out.") >= 2 and "Requeued job" in sweep.logs()
    assert "timed-out too many times" in sweep.logs() and "Traceback" not in sweep.logs()


def test_batch_script(cluster):
    """The script of docs/cluster.md with two tasks on one node is preempted, resumed and cancelled."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    folder = cluster / "batch"
    words = [
        *SETTINGS,
        "engine=deepspeed",
        "schedule.epochs=500",
        f"store.path={folder}/store",
        f"hydra.run.dir={folder}/run",
    ]
    sizes = {"--nodes=2": "--nodes=1", "--ntasks-per-node=8": "--ntasks-per-node=2", "--gpus-per-node=8 ": ""}
    sizes |= {"--cpus-per-task=8": "--cpus-per-task=1", "python run.py": f"{sys.executable} run.py"}
    for old, new in (sizes | {"experiment=paper": " ".join([*words, f"cache.path={cluster}/cache"])}).items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    folder.mkdir()
    (folder / "job.sh").write_text(script)
    job = slurm("sbatch", "--parsable", f"--chdir={ROOT}", f"--output={folder}/out", str(folder / "job.sh")).strip()
    out, metrics = folder / "out", folder / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"stage": "train"' in metrics.read_text())
    preempt()
    wait_until(lambda: RESUMED in out.read_text())
    slurm("scancel", job)
    wait_until(lambda: not slurm("squeue", "--noheader").strip(), seconds=150)
    assert out.read_text().count("stopped by SIGTERM: finished work is kept, run the same command to continue.") == 2
    assert "2 processes, ZeRO stage 3" in out.read_text() and "Traceback" not in out.read_text()
