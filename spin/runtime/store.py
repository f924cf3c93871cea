"""Finished stages, found again by what they were made from. `python -m spin store` lists them and makes room."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spin.runtime.artifacts import CorruptArtifact, commit_atomically, read_manifest, verify_artifact
from spin.runtime.errors import UserError
from spin.runtime.files import hold_lock, write_text
from spin.runtime.signals import deferred, raise_if_stopped

# Part of every key: another number where the same settings come to give another content.
VERSION = 6
KEY = re.compile("[0-9a-f]{16}")
PART = ".part"  # <key>.part: an unfinished stage
RESUME = "resume"  # in it: what the next try goes on from
BUILT = "stage"  # in it: what becomes the stage
RUNS = "runs"  # the one folder of a store that is no stage: which run folders use it
STAGES = "stages.json"  # in a run's folder: which stages it uses


@dataclass(frozen=True)
class Artifact:
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

    def peek(self, stage: str, inputs: dict) -> Artifact | None:
        """The finished stage, its files not checked; None if there is none or its manifest is damaged."""
        folder = self.folder(stage, inputs)
        try:
            return Artifact(folder, read_manifest(folder), reused=True)
        except CorruptArtifact:
            return None

    def resume(self, stage: str, inputs: dict) -> Path:
        """Where an unfinished stage keeps what the next try goes on from; need not exist."""
        return Path(f"{self.folder(stage, inputs)}{PART}") / RESUME

    def get(self, stage: str, inputs: dict, build: Callable[[Path], dict]) -> Artifact:
        """The stage made of `inputs`, checked; `build(folder)` makes it if it is not there, and returns facts for its
        manifest (`earlier_seconds` among them: what earlier tries took for what was used of them).

        It is built beside and renamed when whole, under a lock that dies with its process: two runs that want the same
        stage do it once. `build` works beside `resume(stage, inputs)`: what it finds there an earlier try has left, and a
        try that fails leaves it. Raises Interrupted where the process was asked to stop.
        """
        raise_if_stopped()
        folder = self.folder(stage, inputs)
        if (found := self._whole(folder)) is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(Path(f"{folder}.lock"), f"another run is at the same {stage} stage", self.say):
            return self._whole(folder, clear=True) or self._build(stage, inputs, folder, build)

    def _whole(self, folder: Path, clear: bool = False) -> Artifact | None:
        if not folder.is_dir():
            return None
        try:
            manifest = verify_artifact(folder)
        except CorruptArtifact as damage:
            if clear:
                self.say(f"{folder}: {damage}: this stage is made again")
                shutil.rmtree(folder)
            return None
        with contextlib.suppress(OSError):  # the store may be somebody else's
            os.utime(folder)  # last used
            shutil.rmtree(f"{folder}{PART}", ignore_errors=True)  # of a process that was killed right after it was done
        return Artifact(folder, manifest, reused=True)

    def _build(self, stage: str, inputs: dict, folder: Path, build: Callable[[Path], dict]) -> Artifact:
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
            manifest = commit_atomically(beside, folder, about)
            shutil.rmtree(part, ignore_errors=True)  # only now: until the stage is there, `resume` is all that there is
        return Artifact(folder, manifest, reused=False)

    def check_free(self, needed: int, purpose: str) -> None:
        """Raise UserError if the disk has fewer than `needed` bytes left for `purpose`."""
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"store.path={self.path}: {free / 2**30:.1f} GiB are free, but {purpose} may take "
                f"{needed / 2**30:.1f} GiB. Free some space (`python -m spin store clean`) or give another store.path."
            )

    # --- who uses what ------------------------------------------------------------------------------------------------

    def refer(self, run: Path, stages: list[str], only: bool = False) -> None:
        """Note that the run's folder `run` uses `stages` ("train/<key>"); `only`: and no others from now on."""
        path = run / STAGES
        noted = stages_used_by(run, self.path)
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
            for stage in stages_used_by(run, self.path):
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


def stages_used_by(run: Path, store: Path) -> set[str]:
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
