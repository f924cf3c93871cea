"""Folders that are computed once and found again by what they are made from, whatever run needs them."""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from spin.runtime.artifacts import CorruptArtifact, commit_atomically, verify_artifact
from spin.runtime.files import hold_lock
from spin.runtime.signals import deferred
from spin.runtime.store import key_of

UNUSED_DAYS = 30  # after which an entry is removed
Say = Callable[[str], None]


def cached_folder(cache: Path, name: str, inputs: dict, build: Callable[[Path], dict], say: Say) -> tuple[Path, dict]:
    """Return the folder `<cache>/<name>/<key>` with what `build(folder)` puts there, and the facts that `build` returns.

    It is built once by all processes, complete or absent, and verified when it is found. An entry that no run has used for
    UNUSED_DAYS is removed. Where `cache` can't be written to, the folder lasts as long as the process.
    """
    parent = cache.expanduser() / name
    if not _is_writable(parent):
        parent = Path(tempfile.mkdtemp(prefix="spin-"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        say(f"note: {cache} can't be written to, so that the next run prepares the data again; set cache.path")
    folder = parent / key_of(inputs)
    parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(Path(f"{folder}.lock"), f"another run prepares the same {name}", say):
        if folder.is_dir():
            try:
                facts = verify_artifact(folder)["facts"]
                with suppress(OSError):  # another user's
                    os.utime(folder)  # time of last use
                return folder, facts
            except CorruptArtifact as damage:
                say(f"{folder}: {damage}: it is made again")
                shutil.rmtree(folder)
        _remove_unused(parent)
        beside = Path(f"{folder}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            facts = build(beside)
            with deferred():
                commit_atomically(beside, folder, {"made_from": inputs, "facts": facts})
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder, facts


def _is_writable(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _remove_unused(parent: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for entry in parent.iterdir():
        with suppress(OSError):  # another process removed it
            if entry.is_dir() and entry.stat().st_mtime < oldest:
                shutil.rmtree(entry)
