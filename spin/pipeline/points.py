"""The record of a sweep's point."""

import contextlib
import functools
import hashlib
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.config.schema import Config
from spin.runtime.errors import brief, user_message
from spin.runtime.files import write_text
from spin.runtime.signals import Interrupted
from spin.runtime.store import STAGES, VERSION

RECORD = "point.json"  # in a point's folder: what became of it, and what it was made of


@dataclass(frozen=True)
class Point:
    """One point of a sweep: the values of what differs between points, its folder (None: it could not be composed), and why
    there can be no result, where that is known without its folder."""

    swept: dict[str, str]
    folder: Path | None
    problem: str | None = None


# --- what became of a point -------------------------------------------------------------------------------------------


def record_status(folder: Path, status: str, **more: Any) -> None:
    """Write down that the point in `folder` is "playing", "done", "failed" or "stopped" (by a signal)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECORD, json.dumps({"status": status, **more}, indent=2) + "\n")


def play_point(config: Config, folder: Path, play: Callable[[], object]) -> None:
    """Play the point in `folder`, and write down what became of it: where it fails the others go on."""
    ingredients = content_hash(config)
    record_status(folder, "playing")
    try:
        play()
    except Interrupted as stop:
        record_status(folder, "stopped", reason=f"stopped by {stop.signal.name}: run the same command to go on")
        raise
    except Exception as error:
        trace = {}
        if (reason := user_message(error)) is None:
            traceback.print_exc()
            reason = (
                f"{type(error).__name__}: {brief(error)} (no fault of yours; {RECORD} in its folder has the traceback)"
            )
            trace = {"traceback": traceback.format_exc()}
        record_status(folder, "failed", reason=reason, **trace)
        with contextlib.suppress(OSError):  # nobody may be left to read it
            print(f"this point failed: {reason}", flush=True)
    else:
        record_status(folder, "done", made_of=ingredients)


def read_record(folder: Path) -> dict:
    """What `note` wrote last; empty where nothing is there or it can't be read."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def content_hash(config: Config) -> str | None:
    """A hash of all that decides a point's results, as far as it can be had without loading anything: settings, this
    program's text, and the size and time of every file that a setting names. None where that is not enough: a name on the
    hub with no revision may mean something else tomorrow.
    """
    settings = config.model_dump()
    for name in ("plan", "tracking", "checkpoint"):  # they change no result
        del settings[name]
    hub = {"model": settings["model"]["path"], "data": settings["data"]["path"]}
    if any(
        path and ":" not in path and not _exists(path) and not settings[group]["revision"]
        for group, path in hub.items()
    ):
        return None
    named = [*hub.values(), *(value for value in settings["evaluation"].values() if isinstance(value, str))]
    files = [_files(Path(path).expanduser()) for path in named if path and _exists(path)]
    return hashlib.sha256(json.dumps([VERSION, settings, files, _program()], sort_keys=True).encode()).hexdigest()


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # no path at all
        return False


def _files(path: Path) -> list:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(one), one.stat().st_size, one.stat().st_mtime_ns] for one in found if one.is_file()]


@functools.cache
def _program() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()


def is_done(folder: Path, config: Config) -> bool:
    """Has this very point been played to its end, and is what it left still there?"""
    record = read_record(folder)
    if record.get("status") != "done" or record.get("made_of") is None or record["made_of"] != content_hash(config):
        return False
    shown = ["game.json", "report.md"]
    if config.stage == "game":
        shown.append(f"iter{config.iterations - 1}/policy")
    try:
        stages = json.loads((folder / STAGES).read_bytes())
        manifests = [Path(stages["store"]) / stage / "manifest.json" for stage in stages["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(path.exists() for path in [*(folder / name for name in shown), *manifests])
