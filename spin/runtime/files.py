"""Atomic file replacement, links, and locks that are released when their process ends."""

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
    """Hold the lock file `path`. If another process holds it, print `reason` once with `say` and wait."""
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would remain when its process is killed
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{reason}: waiting for it to end ({path})")
        while not lock.is_locked:
            if number := pending_signal():  # end the wait even while signals are deferred
                raise_signal(number)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=1)
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file atomically. Secrets in `text` are hidden."""
    with _replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.write(hide(text))
        file.flush()
        os.fsync(file.fileno())


def link_tree(source: Path | None, target: Path) -> None:
    """Mirror the files of `source` in `target`. Files in `target` that no earlier call created stay as they are.

    Weights are hard links (copies on another disk), small files are copies, so that editing them does not change `source`.
    Only files that differ are replaced. Files of an earlier call that `source` does not have are removed; with source=None
    all files of earlier calls. `.<target's name>.linked` beside `target` lists the created files.
    """
    record = target.with_name(f".{target.name}.linked")
    earlier: list[str] = []
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # if damaged, nothing is removed
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
        with contextlib.suppress(OSError):  # does not exist, or has files of the user
            target.rmdir()


def link_file(source: Path, target: Path) -> None:
    """Replace `target` by a hard link to `source`, or by a copy if it is on another disk."""
    try:
        _replace(source, target, os.link)
    except OSError:
        _replace(source, target, shutil.copy2)


def _replace(source: Path, target: Path, make: Callable[[Path, Path], object]) -> None:
    """Replace `target` atomically with `make(source, path)`, unless size and modification time are equal."""
    if target.is_file():
        old, new = target.stat(), source.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            return
    with _replacing(target) as beside:
        make(source, beside)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`. The file written there replaces `target`, or is removed after an error."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    try:
        yield beside
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
