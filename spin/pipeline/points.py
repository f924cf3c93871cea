"""Play the points of a sweep, and detect those that are done."""

import functools
import hashlib
import json
import traceback
from collections.abc import Callable
from os.path import exists, expanduser
from pathlib import Path
from typing import Any

from spin.config.schema import Config
from spin.reporting.sweep_rows import RECORD, read_record
from spin.runtime.errors import brief, user_message
from spin.runtime.files import write_text
from spin.runtime.signals import Interrupted
from spin.runtime.store import STAGES, VERSION

PACKAGE = Path(__file__).parents[1]


def record_status(folder: Path, status: str, **more: Any) -> None:
    """Record that the point in `folder` is "playing", "done", "failed" or "stopped" (by a signal)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECORD, json.dumps({"status": status, **more}, indent=2) + "\n")


def play_point(config: Config, folder: Path, play: Callable[[], object]) -> None:
    """Play the point in `folder` and record its status. Failures are not raised, so that other points follow."""
    made_of = content_hash(config)
    record_status(folder, "playing")
    try:
        play()
    except Interrupted as stop:
        record_status(folder, "stopped", reason=f"stopped by {stop.signal.name}: run the same command to continue")
        raise
    except Exception as error:
        trace = {}
        if (reason := user_message(error)) is None:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {brief(error)} (a bug in spin; {RECORD} in its folder has the traceback)"
            trace = {"traceback": traceback.format_exc()}
        record_status(folder, "failed", reason=reason, **trace)
        print(f"this point failed: {reason}", flush=True)
    else:
        record_status(folder, "done", made_of=made_of)


def content_hash(config: Config) -> str | None:
    """Return a hash of all that determines a point's results: settings, this program, and size and time of every file
    that a setting names. Return None if a model or data set on the hub has no revision: its content may change.
    """
    settings = config.model_dump()
    for name in ("plan", "tracking", "checkpoint"):  # they do not affect results
        del settings[name]
    sources = [(settings[group]["path"], settings[group]["revision"]) for group in ("model", "data")]
    if any(path and ":" not in path and not exists(expanduser(path)) and not revision for path, revision in sources):
        return None
    named = [path for path, _ in sources] + [v for v in settings["evaluation"].values() if isinstance(v, str)]
    if questions := settings["evaluation"]["questions"]:  # MT-Bench's other files
        folder = Path(questions).parent
        named += [str(folder.parent / "judge_prompts.jsonl"), str(folder / "reference_answer")]
    files = [_stats_of_files(Path(expanduser(path))) for path in named if path and exists(expanduser(path))]
    return hashlib.sha256(json.dumps([VERSION, settings, files, _program_hash()], sort_keys=True).encode()).hexdigest()


def _stats_of_files(path: Path) -> list:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


@functools.cache
def _program_hash() -> str:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def is_done(folder: Path, config: Config) -> bool:
    """Return whether this point was played to the end with the same `content_hash` and all results still exist."""
    record = read_record(folder)
    if record.get("status") != "done" or record.get("made_of") is None or record["made_of"] != content_hash(config):
        return False
    results = ["game.json", "report.md", "report.html"]
    try:
        game = json.loads((folder / "game.json").read_bytes())
        results += [iteration["policy"] for iteration in game.get("iterations", [])[-1:]]
        stages = json.loads((folder / STAGES).read_bytes())
        manifests = [folder / stages["store"] / stage / "manifest.json" for stage in stages["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(path.exists() for path in [*(folder / name for name in results), *manifests])
