"""`python -m spin store`: list what a store holds, and remove what no run uses."""

import argparse
import contextlib
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from spin.runtime.artifacts import folder_size
from spin.runtime.errors import UserError, user_message
from spin.runtime.store import KEY, PART, RUNS, Store

# --- what a store holds, and making room ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A stage in the store, finished or not: `name` is "train/<key>", `used_by` the run folders that refer to it."""

    name: str
    folder: Path
    finished: bool
    bytes: int
    age: float
    used_by: list[Path]


def entries(store: Store) -> list[Entry]:
    """All that the store holds, largest first. `age` is in seconds since it was last used or worked on."""
    users, found = store.users(), []
    for folder in store.path.glob("*/*"):
        # Nothing but stages, whatever else lies in the folder that somebody takes for a store.
        if folder.parent.name == RUNS or not KEY.fullmatch(folder.name.removesuffix(PART)) or not folder.is_dir():
            continue
        name = f"{folder.parent.name}/{folder.name.removesuffix(PART)}"
        with contextlib.suppress(FileNotFoundError):  # finished, and renamed, in the meantime
            last = max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) if folder.suffix else 0.0
            age = max(0.0, time.time() - max(last, folder.stat().st_mtime))
            found.append(Entry(name, folder, not folder.suffix, folder_size(folder), age, users.get(name, [])))
    return sorted(found, key=lambda entry: -entry.bytes)


def remove(store: Store, entry: Entry) -> bool:
    """Take a stage out of the store; False if a run is at it, or has come to use it."""
    lock = FileLock(str(entry.folder).removesuffix(PART) + ".lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        if entry.name in store.users():
            return False
        shutil.rmtree(entry.folder)
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()
    return True


def main(arguments: list[str]) -> None:
    """`python -m spin store [list | clean] [--path outputs/store] [--yes]`."""
    parser = argparse.ArgumentParser(prog="python -m spin store", description="What a store holds, and making room.")
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "clean"),
        default="list",
        help="list: everything, by size and age (the default); clean: what no run's folder refers to, removed with --yes",
    )
    parser.add_argument("--path", type=Path, default=Path("outputs/store"), help="the store (store.path of your runs)")
    parser.add_argument("--yes", action="store_true", help="with clean: remove it, do not only show it")
    parser.add_argument(
        "--older-than", type=float, default=1.0, metavar="HOURS", help="with clean: leave what was used since (1 hour)"
    )
    given = parser.parse_args(arguments)
    store = Store(given.path)
    if not (store.path / RUNS).is_dir():
        sys.exit(f"error: {store.path}: no such folder, or no store; --path= takes what store.path= says in your runs.")
    try:
        _report(store, given.action == "clean", given.yes, given.older_than)
    except (OSError, UserError) as error:
        sys.exit(f"error: {user_message(error) or error}")


def _report(store: Store, clean: bool, yes: bool, older_than: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from spin.runtime.progress import format_seconds

    shown = entries(store)
    if clean:
        shown = [entry for entry in shown if not entry.used_by and entry.age >= 3600 * older_than]
    table = Table("stage", "size", "last used", "used by", box=None, pad_edge=False)
    for entry in shown:
        users = ", ".join(sorted({str(_near(run)) for run in entry.used_by})) or "no run's folder"
        state = "" if entry.finished else " (unfinished)"
        table.add_row(entry.name + state, _size(entry.bytes), f"{format_seconds(entry.age)} ago", users)
    if shown:
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    total = _size(sum(entry.bytes for entry in shown))
    if not clean:
        free = sum(entry.bytes for entry in shown if not entry.used_by)
        print(f"{len(shown)} stages, {total}; {_size(free)} of them in stages that no run's folder refers to.")
        return
    for run in store.runs():
        if not run.is_dir():
            print(f"not found any more, so that what it alone used counts as unused: {_near(run)}")
    if not yes:
        print(f"{len(shown)} stages, {total}, that no run's folder refers to; --yes removes them.")
        return
    removed = [entry for entry in shown if remove(store, entry)]
    print(f"{len(removed)} stages removed, {_size(sum(entry.bytes for entry in removed))}.")


def _near(path: Path) -> Path:
    """Relative to here where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
