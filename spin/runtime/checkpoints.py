"""Training checkpoints, from which an interrupted stage resumes."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from spin.runtime.artifacts import CorruptArtifact, commit_atomically, verify_artifact
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.shards import Say
from spin.runtime.signals import deferred

WRITING_SHARE = 0.03  # largest share of the training time that is spent on writing checkpoints
KEPT = 2  # number of checkpoints on disk, in case the newest is damaged


@dataclass
class TrainState:
    """The state of a training beside the engine's tensors; data order and learning rate follow from `step`.

    `step` counts finished steps, `skipped` the steps without an update, and `skipped_in_a_row` the latest in a row.
    `rows` holds the metrics of each step, `seconds` the total time.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)

    def add(self, row: dict, seconds: float) -> None:
        """Add a finished step. It was skipped if its gradient norm is not finite."""
        self.step += 1
        skipped = not math.isfinite(row["grad_norm"])
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.seconds += seconds
        self.rows.append({**row, "skipped": self.skipped})


class Engine(Protocol):
    """The part of an engine's interface that checkpoints use."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


class Checkpoints:
    """The checkpoints of one training in `folder`: the last two as `step-00000012/` (one during a write).

    One is due every `steps` steps if given, else every `minutes`, or less often if writing would take more than 3 % of the
    time. Without a folder nothing is written. `restored` is the state that `restore` returned.
    """

    def __init__(
        self,
        folder: Path | None = None,
        minutes: float = 5.0,
        steps: int | None = None,
        say: Say = print,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ):
        self.folder, self.minutes, self.steps, self.say, self.ranks = folder, minutes, steps, say, ranks
        self.restored = TrainState()
        self._written_at = time.monotonic()
        self._seconds_to_write = 0.0
        self._written_step = 0
        self._closed = False

    def restore(self, engine: Engine) -> TrainState:
        """Load the newest intact checkpoint into `engine`. Return its state, or a fresh state if there is none."""
        folder = self.ranks.broadcast(self._newest() if self.ranks.is_main_process else None)
        if folder is not None:
            self.restored = TrainState(**json.loads((folder / "state.json").read_bytes()))
            engine.load_state(folder)
            self._written_step = self.restored.step
        self._written_at = time.monotonic()
        return replace(self.restored, rows=list(self.restored.rows))

    def _newest(self) -> Path | None:
        for folder in reversed(self._folders()):
            try:
                verify_artifact(folder)
                return folder
            except CorruptArtifact as damage:
                self.say(f"{folder}: {damage}: this checkpoint is not used")
                shutil.rmtree(folder)
        return None

    def due(self, state: TrainState) -> bool:
        """Return whether to write a checkpoint now. The main process decides for all ranks."""
        return self.ranks.broadcast(self._is_due(state))

    def _is_due(self, state: TrainState) -> bool:
        if not self._is_new(state):
            return False
        if self.steps is not None:
            return state.step - self._written_step >= self.steps
        wait = max(60 * self.minutes, self._seconds_to_write / WRITING_SHARE)
        return time.monotonic() - self._written_at >= wait

    def _is_new(self, state: TrainState) -> bool:
        """Return whether `state` needs a checkpoint: it is not stored yet and does not end with skipped steps."""
        return not (self.folder is None or self._closed or state.step == self._written_step or state.skipped_in_a_row)

    def write(self, engine: Engine, state: TrainState) -> bool:
        """Write `state`, that of a finished step. Return False if it needs no checkpoint."""
        if not self._is_new(state):
            return False
        assert self.folder is not None
        started = time.monotonic()
        beside = self.folder / "next.tmp"
        if self.ranks.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            for old in self._folders()[: 1 - KEPT]:  # before writing, so that at most two take up space
                shutil.rmtree(old, ignore_errors=True)  # a network disk may keep a file that is open
            beside.mkdir(parents=True)
        engine.save_state(beside)
        if self.ranks.is_main_process:
            (beside / "state.json").write_text(json.dumps(asdict(state)))
            commit_atomically(beside, self.folder / f"step-{state.step:08d}", {"step": state.step})
        self._written_at, self._written_step = time.monotonic(), state.step
        self._seconds_to_write = self._written_at - started
        return True

    @contextmanager
    def write_on_interrupt(self, engine: Engine, state: TrainState, steps: int) -> Iterator[None]:
        """Write `state`, of `steps` steps, if a stop signal arrives inside the block, in which `engine` must be open."""
        try:
            yield
        except KeyboardInterrupt:  # Interrupted, or from a notebook's kernel
            with deferred():
                if self.write(engine, state):
                    self.say(f"saved the training state at step {state.step} of {steps}")
            raise

    def close(self) -> None:
        """Stop writing: the state of a closed engine cannot be read."""
        self._closed = True

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder else []


def describe_progress(resume: Path) -> str | None:
    """Describe what an unfinished stage resumes from ("3 shards of answers, training up to step 40"); None if nothing."""
    parts = []
    for name in ("answers", "scores", "verdicts"):
        if count := len(list((resume / name).rglob("[0-9]*/manifest.json"))):
            parts.append(f"{count} shard{'s' if count > 1 else ''} of {name}")
    if folders := sorted((resume / "training").glob("step-*")):
        parts.append(f"training up to step {int(folders[-1].name.removeprefix('step-'))}")
    return ", ".join(parts) or None
