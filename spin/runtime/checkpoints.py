"""What an interrupted stage resumes from: the state of its training, and a description of what its folder holds."""

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

WRITING_SHARE = 0.03  # of the time between two checkpoints may go into writing one
KEPT = 2  # checkpoints: the newest may turn out to be damaged


@dataclass
class TrainState:
    """What a resume needs beside the engine's tensors: data order and learning rate follow from `step`.

    `step` counts finished steps, `skipped` those without an update (the last `skipped_in_a_row` of them without a break).
    `rows` holds the metrics of each step, `seconds` the time that all took.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)

    def add(self, row: dict, seconds: float) -> None:
        """Count one more step, which was skipped if its gradient norm is not finite."""
        self.step += 1
        skipped = not math.isfinite(row["grad_norm"])
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.seconds += seconds
        self.rows.append({**row, "skipped": self.skipped})


class Engine(Protocol):
    """What a checkpoint needs of an engine."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


class Checkpoints:
    """The checkpoints of one training in `folder`: `step-00000012/`, the last two of them (one during a write).

    One is due every `steps` steps, or else every `minutes`, later where writing would take more than 3 % of the time.
    Without a folder nothing is written. `restored` is the state that `restore` returned.
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
        """Load the newest intact checkpoint into `engine` and return its state; a fresh state if there is none."""
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
        """Whether to write a checkpoint now; the main process decides for all ranks."""
        return self.ranks.broadcast(self._is_due(state))

    def _is_due(self, state: TrainState) -> bool:
        if not self._is_new(state):
            return False
        if self.steps is not None:
            return state.step - self._written_step >= self.steps
        wait = max(60 * self.minutes, self._seconds_to_write / WRITING_SHARE)
        return time.monotonic() - self._written_at >= wait

    def _is_new(self, state: TrainState) -> bool:
        """Whether `state` is worth a checkpoint: skipped steps are no state to return to."""
        return not (self.folder is None or self._closed or state.step == self._written_step or state.skipped_in_a_row)

    def write(self, engine: Engine, state: TrainState) -> bool:
        """Write `state`, that of a finished step. Returns False without writing if it is written or not worth it."""
        if not self._is_new(state):
            return False
        assert self.folder is not None
        started = time.monotonic()
        beside = self.folder / "next.tmp"
        if self.ranks.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            for old in self._folders()[: 1 - KEPT]:  # before writing, so that no more than two take up space
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
        """Write `state` (a step of `steps`) if a stop signal arrives inside the block; `engine` must stay open in it."""
        try:
            yield
        except KeyboardInterrupt:  # Interrupted, or from a notebook's kernel
            with deferred():
                if self.write(engine, state):
                    self.say(f"saved the training state at step {state.step} of {steps}")
            raise

    def close(self) -> None:
        """Write nothing from now on: the engine is about to close, and its state can no longer be read."""
        self._closed = True

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder else []


def describe_progress(resume: Path) -> str | None:
    """Say what an unfinished stage resumes from: "3 shards of answers, training up to step 40"; None if nothing."""
    parts = []
    for name in ("answers", "scores"):
        if count := len(list((resume / name).glob("[0-9]*"))):
            parts.append(f"{count} shard{'s' if count > 1 else ''} of {name}")
    if folders := sorted((resume / "training").glob("step-*")):
        parts.append(f"training up to step {int(folders[-1].name.removeprefix('step-'))}")
    return ", ".join(parts) or None
