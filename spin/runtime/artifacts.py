"""Folders that are whole or not there: filled beside, checksummed, renamed; checked when they are read back.

The checksums find damage (a truncated file, a flipped bit, a file changed by hand), not an attacker.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
BLOCK = 1 << 20


class CorruptArtifact(Exception):
    """A sealed folder is not as it was sealed; the message says what is wrong with it."""


def commit_atomically(beside: Path, folder: Path, facts: dict) -> dict:
    """Make `beside`, filled, the sealed folder `folder` (on the same disk; nothing may be there). Returns its manifest.

    The manifest holds `facts` and a checksum of every file. All of it is on the disk before the name is given, so that
    a machine that loses its power leaves a whole folder or none.
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
    """The manifest of a sealed folder, after comparing every file with it. Raises Damaged."""
    manifest = read_manifest(folder)
    for name, sealed in manifest["files"].items():
        path = folder / name
        try:
            if (size := path.stat().st_size) != sealed["bytes"]:
                raise CorruptArtifact(f"{name} has {size} bytes, not {sealed['bytes']}")
            if file_digest(path) != sealed["xxh3"]:
                raise CorruptArtifact(f"the content of {name} has changed")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptArtifact(f"{name} is missing") from error
        except PermissionError:
            raise  # whole, as far as is known
        except OSError as error:  # a sector that the disk can't read
            raise CorruptArtifact(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def read_manifest(folder: Path) -> dict:
    """The manifest alone, checked against its own checksum; the files are not looked at. Raises Damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stated = manifest.pop("xxh3")
        if not isinstance(manifest["files"], dict):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptArtifact(f"{MANIFEST} is missing") from error
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptArtifact(f"{MANIFEST} cannot be read") from error
    if stated != _digest_of(manifest):
        raise CorruptArtifact(f"the content of {MANIFEST} has changed")
    return manifest


def file_digest(path: Path) -> str:
    """xxh3 of a file's content: about as fast as memory, so that checking costs little more than reading."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def folder_size(folder: Path) -> int:
    """Bytes of all files under `folder`; what goes away in the meantime counts nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _digest_of(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Onto the disk, not only into the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network disks have no such thing for folders
            raise
    finally:
        os.close(descriptor)
