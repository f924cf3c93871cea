"""Artifacts: folders that are either complete or absent, with a checksum of every file.

The checksums detect damage (a truncated file, a flipped bit, a file edited by hand), not an attacker.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from spin.runtime.errors import brief
from spin.runtime.output import hide

MANIFEST = "manifest.json"


class CorruptArtifact(Exception):
    """A committed folder has changed. The message says what differs."""


def commit_atomically(beside: Path, folder: Path, facts: dict) -> dict:
    """Rename the complete folder `beside` to `folder`, which must not exist, on the same disk. Return its manifest.

    The manifest holds `facts` and a checksum of every file. Everything is flushed to disk before the rename, so a power
    failure leaves a complete folder or none.
    """
    files = {}
    for path in sorted(path for path in beside.rglob("*") if path.is_file() and path != beside / MANIFEST):
        files[path.relative_to(beside).as_posix()] = {"bytes": path.stat().st_size, "xxh3": file_digest(path)}
        path.chmod(beside.stat().st_mode & 0o666)  # safetensors ignores the umask
        _flush(path)
    manifest: dict[str, Any] = {**json.loads(hide(json.dumps(facts))), "files": files}
    manifest["xxh3"] = _digest_of(manifest)
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (beside / MANIFEST, *(path for path in beside.rglob("*") if path.is_dir()), beside):
        _flush(path)
    beside.rename(folder)
    _flush(folder.parent)
    return manifest


def verify_artifact(folder: Path) -> dict:
    """Compare every file of a committed folder with its manifest, and return the manifest. Raises CorruptArtifact."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        with _reading(name):
            if (size := (folder / name).stat().st_size) != expected["bytes"]:
                raise CorruptArtifact(f"{name} has {size} bytes, not {expected['bytes']}")
            if file_digest(folder / name) != expected["xxh3"]:
                raise CorruptArtifact(f"the content of {name} has changed")
    return manifest


def read_manifest(folder: Path) -> dict:
    """Return the manifest after verifying its own checksum, without reading the files. Raises CorruptArtifact."""
    with _reading(MANIFEST):
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest.pop("xxh3") != _digest_of(manifest):
            raise CorruptArtifact(f"the content of {MANIFEST} has changed")
    return manifest


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Convert errors from reading the file `name` to CorruptArtifact, except missing permissions."""
    try:
        yield
    except (CorruptArtifact, PermissionError):
        raise
    except Exception as error:
        raise CorruptArtifact(f"{name} cannot be read ({brief(error)})") from error


def file_digest(path: Path) -> str:
    """Return the xxh3 hash of a file's content; computing it is about as fast as reading memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def folder_size(folder: Path) -> int:
    """Return the total size in bytes of all files under `folder`; files removed meanwhile count as 0."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _digest_of(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network disks cannot flush folders
            raise
    finally:
        os.close(descriptor)
