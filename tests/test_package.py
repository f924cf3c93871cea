"""The wheel is complete, and its command `spin` plays a game in an empty folder without a checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.games import ROOT

FOLDERS = ("spin", "conf", "hydra_plugins")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that no build folders are left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(source / "dist")]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("spin-*.whl")
    return wheel


def test_wheel_has_every_file_of_the_packages(wheel):
    files = {path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()}
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    expected = {f"spin/{name}" if name.startswith("conf/") else name for name in expected}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_lists_its_requirements(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    required = {line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-")}
    pinned = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert required == {*pinned, "Requires-Python: >=3.11"}
    assert "License-Expression: Apache-2.0" in metadata and "License-File: NOTICE" in metadata


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory) -> Path:
    """Install `spin` in an environment that can import the libraries of this one, and return the path of the command."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder / "bin" / "spin"


def run(command: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "SPIN_CACHE": str(folder.parent / "cache")}
    return subprocess.run([command, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=500)


def test_help_and_a_typo(command, tmp_path):
    assert "Installed with pip, it is `spin`" in run(command, tmp_path, "--help").stdout
    done = run(command, tmp_path, "loss.betta=1")
    assert done.returncode == 1
    assert done.stderr == "error: loss.betta: there is no such setting. Did you mean loss.beta?\n"
    assert not list(tmp_path.iterdir())


SCRIPT = """
import spin
result = spin.play("experiment=smoke", iter=0, tracking={"wandb": "disabled"})
print(spin.__file__, sorted(result.measures))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_game_sweep_store_and_python(command, tmp_path):
    smoke = ["experiment=smoke", "iter=0", "tracking.wandb=disabled"]
    done = run(command, tmp_path, *smoke)
    assert done.returncode == 0, done.stderr
    run_folder = tmp_path / "outputs" / "smoke"
    assert (run_folder / "iter0" / "policy" / "README.md").is_file()
    assert '"command": "spin experiment=smoke iter=0' in (run_folder / "game.json").read_text()
    done = run(command, tmp_path, "-m", *smoke, "loss.beta=0.1,0.2")
    assert done.returncode == 0, done.stderr
    assert "loss.beta" in (tmp_path / "outputs" / "smoke-sweep" / "sweep.md").read_text()
    assert "stages, " in run(command, tmp_path, "store").stdout
    done = run(command.with_name("python"), tmp_path, "-c", SCRIPT)
    assert "nothing was computed again" in done.stdout, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(str(command.parents[1])) and last.endswith("['iter0', 'sft', 'start']")


def pins(name: str) -> dict[str, str]:
    """Return the pinned versions in a requirements file by package."""
    lines = [line.split("#")[0].split(";")[0].strip(" \\") for line in (ROOT / name).read_text().splitlines()]
    return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_lock_file_pins_requirements_with_hashes(name):
    locked, text = pins(f"{name}.lock"), (ROOT / f"{name}.lock").read_text()
    assert pins(f"{name}.txt").items() | pins("requirements.txt").items() <= locked.items()
    assert len(locked) > 60 and "://" not in text and "file:" not in text
    entries = re.split(r"\n(?=[a-z])", text.split("\n", 2)[2])
    assert len(entries) >= len(locked) and all("--hash=sha256:" in entry for entry in entries)
