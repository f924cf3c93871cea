"""Files that are replaced whole, links, and locks that die with their process."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from spin.runtime.signals import pending_signal, raise_signal


@contextlib.contextmanager
def hold_lock(path: Path, reason: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `path`, which dies with its process; where another holds it, `say` why there is a wait, and wait."""
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{reason}: waiting for it to end ({path})")
        while not lock.is_locked:
            if number := pending_signal():  # in a game of several processes, whose others wait for this one
                raise_signal(number)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=1)
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old or the new text, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def link_tree(source: Path, target: Path) -> None:
    """Make `target` show the files of `source`: weights as hard links, which cost no space (as copies where links can't be
    made), small files as copies, so that nobody who edits one changes the store."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)

    def show(one: str, other: str) -> None:
        if one.endswith(".safetensors"):
            link_file(one, other)
        else:
            shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=show)


def link_file(source: Path | str, target: Path | str) -> None:
    """Make `target` the same file as `source`, replacing what is there."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
