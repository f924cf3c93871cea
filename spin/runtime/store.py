"""The store of finished stages, found by a hash of their inputs. `python -m spin store` lists and cleans it."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spin.runtime.artifacts import CorruptArtifact, commit_atomically, read_manifest, verify_artifact
from spin.runtime.errors import UserError, explaining
from spin.runtime.files import hold_lock, write_text
from spin.runtime.signals import deferred, raise_if_stopped

VERSION = 7  # part of every key: raise it when equal settings give different content
PART = ".part"  # <key>.part is the folder of an unfinished stage
RESUME = "resume"  # its subfolder with the data that the next run resumes from
BUILT = "stage"  # its subfolder that becomes the finished stage
RUNS = "runs"  # in the store: records of the run folders that use it
STAGES = "stages.json"  # in a run's folder: the stages that it uses


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, its manifest, and whether an earlier run built it."""

    folder: Path
    manifest: dict
    reused: bool

    @property
    def key(self) -> str:
        return self.manifest["key"]

    def rows(self) -> list[dict]:
        """Return the metrics that the stage logged."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(inputs: dict) -> str:
    """Return the hash of the inputs that determine a stage's content; the order of dictionary keys has no effect."""
    return hashlib.sha256(json.dumps([VERSION, inputs], sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Finished stages in `<path>/<stage>/<key>/`, each complete or absent.

    An unfinished stage is in `<key>.part/`; only its subfolder `resume/` is kept when the process ends. `say` gets a line
    when a stage is locked by another run or damaged.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print):
        self.path, self.say = path.expanduser(), say

    def folder(self, stage: str, inputs: dict) -> Path:
        return self.path / stage / key_of(inputs)

    def peek(self, stage: str, inputs: dict) -> Artifact | None:
        """Return the finished stage without verifying its files; None if it is missing or its manifest is damaged."""
        folder = self.folder(stage, inputs)
        try:
            return Artifact(folder, read_manifest(folder), reused=True)
        except CorruptArtifact:
            return None

    def resume(self, stage: str, inputs: dict) -> Path:
        """Return the folder, which may not exist, with the data that an unfinished stage resumes from."""
        return Path(f"{self.folder(stage, inputs)}{PART}") / RESUME

    def get(self, stage: str, inputs: dict, build: Callable[[Path], dict]) -> Artifact:
        """Return the verified stage with these `inputs`; build it first if it is absent or damaged.

        `build(folder)` fills the folder and returns facts for the manifest; their `earlier_seconds` is the time that earlier
        runs spent on reused parts. A lock ensures that concurrent runs build a stage once. `resume(stage, inputs)` is kept
        after a failed build. Raises Interrupted after a stop signal.
        """
        raise_if_stopped()
        folder = self.folder(stage, inputs)
        if (stored := self._verified(folder)) is not None:
            return stored
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(Path(f"{folder}.lock"), f"another run is building the same {stage} stage", self.say):
            return self._verified(folder, remove_damaged=True) or self._build(stage, inputs, folder, build)

    def _verified(self, folder: Path, remove_damaged: bool = False) -> Artifact | None:
        if not folder.is_dir():
            return None
        try:
            manifest = verify_artifact(folder)
        except CorruptArtifact as damage:
            if remove_damaged:
                self.say(f"{folder}: {damage}: rebuilding this stage")
                shutil.rmtree(folder)
            return None
        with contextlib.suppress(OSError):  # the store may be read-only
            os.utime(folder)  # time of last use
            shutil.rmtree(f"{folder}{PART}", ignore_errors=True)  # left by a process that was killed after the commit
        return Artifact(folder, manifest, reused=True)

    def _build(self, stage: str, inputs: dict, folder: Path, build: Callable[[Path], dict]) -> Artifact:
        part = Path(f"{folder}{PART}")
        beside = part / BUILT
        (part / RESUME).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        started = time.time()
        try:
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
                shutil.rmtree(part, ignore_errors=True)  # only after the commit, which `resume` can repeat
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: there is something to resume from
                (part / RESUME).rmdir()
                part.rmdir()
        return Artifact(folder, manifest, reused=False)

    def check_free(self, needed: int, purpose: str) -> None:
        """Raise UserError if fewer than the `needed` bytes for `purpose` are free on the disk."""
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"store.path={self.path}: {free / 2**30:.1f} GiB are free, but {purpose} may take "
                f"{needed / 2**30:.1f} GiB. Free some space (`python -m spin store clean`) or give another store.path."
            )

    # --- which runs use which stages ----------------------------------------------------------------------------------

    def refer(self, run: Path, stages: list[str], only: bool = False) -> None:
        """Record that the run folder `run` uses `stages` ("train/<key>"); with `only`, that it uses no others."""
        used = {*stages}
        if not only:
            with contextlib.suppress(UserError, TypeError):  # a damaged record is rewritten
                used |= stages_used_by(run, self.path)
        folder, path = run.resolve(), self.path.resolve()
        about = {"store": os.path.relpath(path, folder), "stages": sorted(used)}  # relative: both may be moved together
        write_text(run / STAGES, json.dumps(about, indent=2) + "\n")
        entry = self.path / RUNS / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
        if not entry.is_file() and (os.access(self.path, os.W_OK) or not self.path.exists()):  # not another user's
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_text(entry, json.dumps({"folder": os.path.relpath(folder, path)}))

    def users(self) -> dict[str, list[Path]]:
        """Return the run folders that use each stage. A run whose folder was removed uses none."""
        result: dict[str, list[Path]] = {}
        for run in self.runs():
            for stage in stages_used_by(run, self.path):
                result.setdefault(stage, []).append(run)
        return result

    def runs(self) -> list[Path]:
        """Return all run folders that have used this store, existing or not. Raises UserError for a damaged entry."""
        entries, path = sorted((self.path / RUNS).glob("*.json")), self.path.resolve()
        return [(path / _read_record(entry, "folder")[0]).resolve() for entry in entries]


def stages_used_by(run: Path, store: Path) -> set[str]:
    """Return the stages of `store` that a run folder uses. Raises UserError if its record is damaged."""
    if not (run / STAGES).is_file():
        return set()
    stages, kept = _read_record(run / STAGES, "stages", "store")
    return set(stages) if (run / kept).resolve() == store.resolve() else set()


def _read_record(path: Path, *keys: str) -> list:
    with explaining(f"{path} can't be read", "remove it, and run its game again to rewrite it"):
        record = json.loads(path.read_bytes())
        return [record[key] for key in keys]
