"""Finished stages, found again by what they were made from."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

MANIFEST = "manifest.json"


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
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """`<path>/<stage>/<key>/`: one folder a finished stage, complete or not there at all."""

    def __init__(self, path: Path):
        self.path = path.expanduser()

    def has(self, stage: str, inputs: dict) -> bool:
        return (self.path / stage / key_of(inputs) / MANIFEST).is_file()

    def get(self, stage: str, inputs: dict, build: Callable[[Path], dict]) -> Stage:
        """The stage made of `inputs`; `build(folder)` makes it if it is not there and returns facts for the manifest.

        It is built beside and renamed when whole, under a lock, so two runs that want the same stage do it once.
        """
        folder = self.path / stage / key_of(inputs)
        if not self.has(stage, inputs):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not self.has(stage, inputs):
                    return self._build(stage, inputs, folder, build)
        return Stage(folder, json.loads((folder / MANIFEST).read_text()), reused=True)

    def _build(self, stage: str, inputs: dict, folder: Path, build: Callable[[Path], dict]) -> Stage:
        beside = Path(f"{folder}.{os.getpid()}.tmp")
        # What a killed run left behind is nobody's now: the lock is ours.
        for left in (folder, *folder.parent.glob(f"{folder.name}.*.tmp")):
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir()
        started = time.time()
        try:
            facts = build(beside)
            manifest = {
                "stage": stage,
                "key": folder.name,
                "made_from": inputs,
                "facts": facts,
                "seconds": round(time.time() - started, 1),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            beside.rename(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return Stage(folder, manifest, reused=False)


def link_tree(source: Path, target: Path) -> None:
    """Make `target` show the files of `source`: hard links, which cost no space; copies where links can't be made."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, copy_function=link_file)


def link_file(source: Path | str, target: Path | str) -> None:
    """Make `target` the same file as `source`, replacing what is there."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
