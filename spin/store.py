"""Finished stages, found again by what they were made from. `python -m spin.store` lists them and makes room."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from spin.errors import UserError, explain
from spin.interrupt import check, deferred, pending, stop
from spin.sealed import Damaged, read_manifest, seal, size_of, verify

# Part of every key: another number where the same settings come to give another content.
VERSION = 6
KEY = re.compile("[0-9a-f]{16}")
PART = ".part"  # <key>.part: an unfinished stage
RESUME = "resume"  # in it: what the next try goes on from
BUILT = "stage"  # in it: what becomes the stage
RUNS = "runs"  # the one folder of a store that is no stage: which run folders use it
STAGES = "stages.json"  # in a run's folder: which stages it uses


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, what its manifest says, and whether it was there already."""

    folder: Path
    manifest: dict
    reused: bool

    @property
    def key(self) -> str:
        return self.manifest["key"]

    def rows(self) -> list[dict]:
        """The metrics that the stage left behind."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(inputs: dict) -> str:
    """A hash of everything that decides a stage's content: equal for equal values, whatever the order of the keys."""
    return hashlib.sha256(json.dumps([VERSION, inputs], sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """`<path>/<stage>/<key>/`: one folder a finished stage, complete or not there at all.

    An unfinished one is `<key>.part/`, of which only `resume/` outlives the process that works on it. `say` gets a line
    where a stage is waited for or turns out to be damaged.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print):
        self.path, self.say = path.expanduser(), say

    def folder(self, stage: str, inputs: dict) -> Path:
        return self.path / stage / key_of(inputs)

    def peek(self, stage: str, inputs: dict) -> Stage | None:
        """The finished stage, its files not checked; None if there is none or its manifest is damaged."""
        folder = self.folder(stage, inputs)
        try:
            return Stage(folder, read_manifest(folder), reused=True)
        except Damaged:
            return None

    def resume(self, stage: str, inputs: dict) -> Path:
        """Where an unfinished stage keeps what the next try goes on from; need not exist."""
        return Path(f"{self.folder(stage, inputs)}{PART}") / RESUME

    def get(self, stage: str, inputs: dict, build: Callable[[Path], dict]) -> Stage:
        """The stage made of `inputs`, checked; `build(folder)` makes it if it is not there, and returns facts for its
        manifest (`earlier_seconds` among them: what earlier tries took for what was used of them).

        It is built beside and renamed when whole, under a lock that dies with its process: two runs that want the same
        stage do it once. `build` works beside `resume(stage, inputs)`: what it finds there an earlier try has left, and a
        try that fails leaves it. Raises Interrupted where the process was asked to stop.
        """
        check()
        folder = self.folder(stage, inputs)
        if (found := self._whole(folder)) is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(Path(f"{folder}.lock"), f"another run is at the same {stage} stage", self.say):
            return self._whole(folder, clear=True) or self._build(stage, inputs, folder, build)

    def _whole(self, folder: Path, clear: bool = False) -> Stage | None:
        if not folder.is_dir():
            return None
        try:
            manifest = verify(folder)
        except Damaged as damage:
            if clear:
                self.say(f"{folder}: {damage}: this stage is made again")
                shutil.rmtree(folder)
            return None
        with contextlib.suppress(OSError):  # the store may be somebody else's
            os.utime(folder)  # last used
            shutil.rmtree(f"{folder}{PART}", ignore_errors=True)  # of a process that was killed right after it was done
        return Stage(folder, manifest, reused=True)

    def _build(self, stage: str, inputs: dict, folder: Path, build: Callable[[Path], dict]) -> Stage:
        part = Path(f"{folder}{PART}")
        beside = part / BUILT
        (part / RESUME).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        started = time.time()
        facts = build(beside)
        about = {
            "stage": stage,
            "key": folder.name,
            "made_from": inputs,
            "seconds": round(time.time() - started + facts.pop("earlier_seconds", 0.0), 1),
            "facts": facts,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with deferred():
            manifest = seal(beside, folder, about)
            shutil.rmtree(part, ignore_errors=True)  # only now: until the stage is there, `resume` is all that there is
        return Stage(folder, manifest, reused=False)

    # --- who uses what ------------------------------------------------------------------------------------------------

    def refer(self, run: Path, stages: list[str], only: bool = False) -> None:
        """Note that the run's folder `run` uses `stages` ("train/<key>"); `only`: and no others from now on."""
        path = run / STAGES
        noted = _stages_of(run, self.path)
        wanted = {*stages} if only else noted | {*stages}
        if wanted != noted or not path.is_file():
            about = {"store": str(self.path.resolve()), "stages": sorted(wanted)}
            write_text(path, json.dumps(about, indent=2) + "\n")
        folder = str(run.resolve())
        entry, text = (
            self.path / RUNS / f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}.json",
            json.dumps({"folder": folder}),
        )
        if not entry.is_file() or entry.read_text() != text:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_text(entry, text)

    def users(self) -> dict[str, list[Path]]:
        """For every stage that a run's folder uses: which ones. A run whose folder is gone, or can't be read, uses none."""
        result: dict[str, list[Path]] = {}
        for run in self.runs():
            for stage in _stages_of(run, self.path):
                result.setdefault(stage, []).append(run)
        return result

    def runs(self) -> list[Path]:
        """The run folders that have used this store, whether or not they are still there. Raises UserError for a damaged
        entry: nobody knows what it used."""
        found = []
        for entry in sorted((self.path / RUNS).glob("*.json")):
            try:
                found.append(Path(json.loads(entry.read_bytes())["folder"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{entry} can't be read: remove it, and run its game once more to note it again."
                ) from error
        return found


def _stages_of(run: Path, store: Path) -> set[str]:
    """What a run's folder says that it uses of this store; nothing if it says nothing. Raises UserError if it can't be read."""
    try:
        noted = json.loads((run / STAGES).read_bytes())
        return set(noted["stages"]) if Path(noted["store"]).resolve() == store.resolve() else set()
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run / STAGES} can't be read: remove it, and run the game once more to note it again."
        ) from error


@contextlib.contextmanager
def locked(path: Path, reason: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `path`, which dies with its process; where another holds it, `say` why there is a wait, and wait."""
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{reason}: waiting for it to end ({path})")
        while not lock.is_locked:
            if number := pending():  # in a game of several processes, whose others wait for this one
                stop(number)
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
            found.append(Entry(name, folder, not folder.suffix, size_of(folder), age, users.get(name, [])))
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
    """`python -m spin.store [list | clean] [--path outputs/store] [--yes]`."""
    parser = argparse.ArgumentParser(prog="python -m spin.store", description="What a store holds, and making room.")
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
        sys.exit(f"error: {explain(error) or error}")


def _report(store: Store, clean: bool, yes: bool, older_than: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from spin.track import format_seconds

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


if __name__ == "__main__":
    main(sys.argv[1:])
