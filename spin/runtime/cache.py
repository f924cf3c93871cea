"""A cache of computed folders that all runs share, found by a hash of their inputs."""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from spin.runtime.store import Store

UNUSED_DAYS = 30  # after which an entry is removed
Say = Callable[[str], None]


def cached_folder(cache: Path, name: str, inputs: dict, build: Callable[[Path], dict], say: Say) -> tuple[Path, dict]:
    """Return the folder `<cache>/<name>/<key>`, which `build(folder)` fills if it is missing, and the facts from `build`.

    The cache is a `Store`. Entries that no run has used for UNUSED_DAYS are removed. If `cache` is not writable, the entry
    goes to a temporary folder.
    """
    path = cache.expanduser()
    if not _is_writable(path / name):
        path = Path(tempfile.mkdtemp(prefix="spin-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        say(f"note: {cache} can't be written to, so the next run prepares the data again; set cache.path")

    def build_entry(folder: Path) -> dict:
        _remove_unused(path / name)
        return build(folder)

    entry = Store(path, say).get(name, inputs, build_entry)
    return entry.folder, entry.manifest["facts"]


def _is_writable(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _remove_unused(parent: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for entry in parent.iterdir():
        with suppress(OSError):  # another process removed it
            if entry.is_dir() and entry.stat().st_mtime < oldest:
                shutil.rmtree(entry)
