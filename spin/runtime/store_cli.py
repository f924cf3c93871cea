"""`python -m spin store`: list the stages in a store, and remove those that no run uses."""

import argparse
import contextlib
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from spin.runtime.artifacts import folder_size
from spin.runtime.errors import UserError, user_message
from spin.runtime.progress import format_seconds
from spin.runtime.store import PART, RUNS, Store

KEY = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Entry:
    """A stage in the store: `name` is "train/<key>", `age` seconds since its last use, `used_by` the run folders."""

    name: str
    folder: Path
    finished: bool
    bytes: int
    age: float
    used_by: list[Path]


def entries(store: Store) -> list[Entry]:
    """Return all stages of the store, finished or not, the largest first."""
    users, result = store.users(), []
    for folder in store.path.glob("*/*"):
        key = folder.name.removesuffix(PART)
        if folder.parent.name == RUNS or not KEY.fullmatch(key) or not folder.is_dir():
            continue  # not a stage
        name, finished = f"{folder.parent.name}/{key}", not folder.suffix
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile, because it was finished
            used = [folder.stat().st_mtime]
            used += [] if finished else [path.stat().st_mtime for path in folder.rglob("*")]
            age = max(0.0, time.time() - max(used))
            result.append(Entry(name, folder, finished, folder_size(folder), age, users.get(name, [])))
    return sorted(result, key=lambda entry: -entry.bytes)


def remove(store: Store, entry: Entry) -> bool:
    """Remove a stage. Return False if a run is building it or uses it by now."""
    lock = FileLock(str(entry.folder).removesuffix(PART) + ".lock", fallback_to_soft=False)
    with contextlib.suppress(Timeout), lock.acquire(timeout=0):
        if entry.name not in store.users():
            shutil.rmtree(entry.folder)
            Path(lock.lock_file).unlink(missing_ok=True)
            return True
    return False


def main(arguments: list[str]) -> None:
    """Run `python -m spin store [list | clean] [--path outputs/store] [--older-than HOURS] [--yes]`."""
    parser = argparse.ArgumentParser(prog="python -m spin store", description="List and clean a store.")
    actions = "list: everything, by size (the default); clean: what no run folder uses, removed with --yes"
    parser.add_argument("action", nargs="?", choices=("list", "clean"), default="list", help=actions)
    parser.add_argument("--path", type=Path, default=Path("outputs/store"), help="the store (store.path of your runs)")
    parser.add_argument("--yes", action="store_true", help="with clean: remove, do not only show")
    recent = "with clean: keep stages used within the last HOURS (default: 1)"
    parser.add_argument("--older-than", type=float, default=1.0, metavar="HOURS", help=recent)
    options = parser.parse_args(arguments)
    store = Store(options.path)
    if not (store.path / RUNS).is_dir():
        sys.exit(f"error: {store.path}: no such folder, or not a store: set --path to the store.path of your runs.")
    try:
        stages = entries(store)
        if options.action == "list":
            _print_table(stages)
            unused = _size([entry for entry in stages if not entry.used_by])
            print(f"{len(stages)} stages, {_size(stages)}; {unused} of them in stages that no run folder uses.")
        else:
            unused_stages = [entry for entry in stages if not entry.used_by and entry.age >= 3600 * options.older_than]
            _clean(store, unused_stages, options.yes)
    except (OSError, UserError) as error:
        sys.exit(f"error: {user_message(error) or error}")


def _clean(store: Store, unused: list[Entry], yes: bool) -> None:
    _print_table(unused)
    for run in store.runs():
        if not run.is_dir():
            print(f"removed run folder, whose stages count as unused: {run}")
    if yes:
        removed = [entry for entry in unused if remove(store, entry)]
        print(f"{len(removed)} stages removed, {_size(removed)}.")
    else:
        print(f"{len(unused)} stages, {_size(unused)}, that no run folder uses; --yes removes them.")


def _print_table(stages: list[Entry]) -> None:
    table = Table("stage", "size", "last used", "used by", box=None, pad_edge=False)
    for entry in stages:
        users = ", ".join(sorted(str(run) for run in entry.used_by)) or "no run folder"
        state = "" if entry.finished else " (unfinished)"
        table.add_row(entry.name + state, _size([entry]), f"{format_seconds(entry.age)} ago", users)
    if stages:
        Console(width=None if sys.stdout.isatty() else 200).print(table)


def _size(stages: list[Entry]) -> str:
    count = sum(entry.bytes for entry in stages)
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
