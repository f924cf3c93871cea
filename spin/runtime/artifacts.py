"""Folders that are complete or absent: filled under another name, checksummed, renamed, and verified on reading.

The checksums detect damage (a truncated file, a flipped bit, a file edited by hand), not an attacker.
"""

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
BLOCK = 1 << 20


class CorruptArtifact(Exception):
    """A committed folder has changed; the message says how."""


def commit_atomically(beside: Path, folder: Path, facts: dict) -> dict:
    """Rename the filled folder `beside` to `folder` (same disk, not there yet) and return its manifest.

    The manifest holds `facts` and a checksum of every file. Everything is flushed to the disk before the rename, so that a
    power failure leaves a complete folder or none.
    """
    files = {}
    for path in sorted(path for path in beside.rglob("*") if path.is_file() and path != beside / MANIFEST):
        files[path.relative_to(beside).as_posix()] = {"bytes": path.stat().st_size, "xxh3": file_digest(path)}
        path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        _flush(path)
    manifest: dict[str, Any] = {**facts, "files": files}
    manifest["xxh3"] = _digest_of(manifest)
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (beside / MANIFEST, *(path for path in beside.rglob("*") if path.is_dir()), beside):
        _flush(path)
    beside.rename(folder)
    _flush(folder.parent)
    return manifest


def verify_artifact(folder: Path) -> dict:
    """Return the manifest of a committed folder after comparing every file with it. Raises CorruptArtifact."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                raise CorruptArtifact(f"{name} has {size} bytes, not {expected['bytes']}")
            if file_digest(path) != expected["xxh3"]:
                raise CorruptArtifact(f"the content of {name} has changed")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptArtifact(f"{name} is missing") from error
        except PermissionError:
            raise  # no sign of damage
        except OSError as error:  # a sector that the disk can't read
            raise CorruptArtifact(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def read_manifest(folder: Path) -> dict:
    """Return the manifest, checked against its own checksum, without reading the files. Raises CorruptArtifact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = manifest.pop("xxh3")
        if not isinstance(manifest["files"], dict):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptArtifact(f"{MANIFEST} is missing") from error
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptArtifact(f"{MANIFEST} cannot be read") from error
    if expected != _digest_of(manifest):
        raise CorruptArtifact(f"the content of {MANIFEST} has changed")
    return manifest


def file_digest(path: Path) -> str:
    """Hash a file's content with xxh3, which is about as fast as memory."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def folder_size(folder: Path) -> int:
    """Return the bytes of all files under `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _digest_of(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network disks cannot flush folders
            raise
    finally:
        os.close(descriptor)
