"""Atomic file replacement, links, and locks that end with their process."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from spin.runtime.output import hide
from spin.runtime.signals import pending_signal, raise_signal


@contextlib.contextmanager
def hold_lock(path: Path, reason: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`. If another process holds it, `say` the reason once and wait."""
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{reason}: waiting for it to end ({path})")
        while not lock.is_locked:
            if number := pending_signal():  # deferred signals must end the wait: the other ranks wait for this one
                raise_signal(number)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=1)
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old text or the new one. Secrets are hidden."""
    with _replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.write(hide(text))
        file.flush()
        os.fsync(file.fileno())


def link_tree(source: Path | None, target: Path) -> None:
    """Show the files of `source` in `target`, and leave the user's own files there alone.

    Weights are hard links (copies on another disk), small files copies, so that editing them leaves `source` intact. Only
    files that differ are replaced. Files that an earlier call made and that `source` does not have are removed; with
    source=None all of these. `.<target's name>.linked` beside `target` lists what was made.
    """
    record = target.with_name(f".{target.name}.linked")
    earlier: list[str] = []
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # damaged: nothing is removed
        earlier = [str(name) for name in json.loads(record.read_bytes())]
    files = [path for path in source.rglob("*") if path.is_file()] if source else []
    names = [str(path.relative_to(str(source))) for path in files]
    for stale in {*earlier} - {*names}:
        (target / stale).unlink(missing_ok=True)
    for path, name in zip(files, names, strict=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            link_file(path, target / name)
        else:
            _replace(path, target / name, shutil.copy2)
    if names:
        write_text(record, json.dumps(names))
    else:
        record.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or with files of the user
            target.rmdir()


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy on another disk, replacing what is there."""
    try:
        _replace(source, target, os.link)
    except OSError:
        _replace(source, target, shutil.copy2)


def _replace(source: Path, target: Path, make: Callable[[Path, Path], object]) -> None:
    """Make `target` by `make`, atomically, unless it is the same file or has its size and its time of the last change."""
    if target.is_file():
        old, new = target.stat(), source.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            return
    with _replacing(target) as beside:
        make(source, beside)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`. What the block writes there replaces `target`; if anything fails, it is removed."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    try:
        yield beside
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
