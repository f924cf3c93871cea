"""What an interrupted stage goes on from: finished shards of answers or scores, and the state of training.

All of it is sealed (`sealed.py`): a shard or checkpoint that is damaged is found out, named and not used.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from spin.runtime.artifacts import CorruptArtifact, commit_atomically, read_manifest, verify_artifact
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.shards import Say

# A checkpoint may take up to this share of the time since the one before it.
WRITING_SHARE = 0.03
KEPT = 2  # checkpoints: the newest may turn out to be damaged


@dataclass
class TrainState:
    """All that a resume needs beside the engine's tensors.

    The order of the data and the learning rate follow from `step`, and the loop uses no random numbers. `step` counts
    finished steps, `skipped` those among them without an update (the last `skipped_in_a_row` of them without a break),
    `rows` are their metrics, `seconds` what they took.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)

    def add(self, row: dict, seconds: float) -> None:
        """One more step is finished; where its gradient was not finite it was without an update."""
        self.step += 1
        updated = math.isfinite(row["grad_norm"])
        self.skipped += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        self.seconds += seconds
        self.rows.append({**row, "skipped": self.skipped})


class Engine(Protocol):
    """What a checkpoint asks of an engine."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


class Checkpoints:
    """The state of one training stage in `folder`: `step-00000012/`, the last two of them (one while the next is written).

    `minutes` after the last one is due, later where writing would take more than 3 % of the time; or every `steps` steps,
    whatever that takes. Without a folder nothing is kept. `restored` is the state that `restore` found.
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
        self._last = time.monotonic()
        self._cost = 0.0  # seconds that the last one took to write
        self._written = 0  # its step

    def restore(self, engine: Engine) -> TrainState:
        """Put the newest checkpoint that is whole into `engine`, and return where training stands."""
        folder = self.ranks.broadcast(self._newest() if self.ranks.is_main_process else None)
        if folder is not None:
            text = (folder / "state.json").read_text()
            engine.load_state(folder)
            self.restored = TrainState(**json.loads(text))
            self._written = self.restored.step
        self._last = time.monotonic()
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
        """Is it time? Ranks are of one mind: rank 0's clock counts."""
        return self.ranks.broadcast(self._due(state))

    def _due(self, state: TrainState) -> bool:
        if self.folder is None or state.skipped_in_a_row:  # what gives no finite loss is no state to go back to
            return False
        if self.steps is not None:
            return state.step - self._written >= self.steps
        return time.monotonic() - self._last >= max(60 * self.minutes, self._cost / WRITING_SHARE)

    def write(self, engine: Engine, state: TrainState) -> bool:
        """Keep `state`, which must be that of a finished step; False where it is kept already or not worth it."""
        if self.folder is None or state.step == self._written or state.skipped_in_a_row:
            return False
        started = time.monotonic()
        beside = self.folder / "next.tmp"
        if self.ranks.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            for old in self._folders()[: 1 - KEPT]:  # first, so that no more than two take up space
                shutil.rmtree(old, ignore_errors=True)  # a network disk may keep a file that somebody has open
            beside.mkdir(parents=True)
        engine.save_state(beside)
        if self.ranks.is_main_process:
            (beside / "state.json").write_text(json.dumps(asdict(state)))
            commit_atomically(beside, self.folder / f"step-{state.step:08d}", {"step": state.step})
        self._last, self._written = time.monotonic(), state.step
        self._cost = self._last - started
        return True

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder else []


# --- what a stage goes on from, in words ------------------------------------------------------------------------------


def describe_progress(resume: Path) -> str | None:
    """What the folder of an unfinished stage holds, for a person: "training up to step 40", "3 shards of answers"."""
    parts = []
    for name in ("answers", "scores"):
        if count := len(list((resume / name).glob("[0-9]*"))):
            parts.append(f"{count} shard{'s' if count > 1 else ''} of {name}")
    for folder in sorted((resume / "training").glob("step-*"), reverse=True):
        try:
            step: Any = read_manifest(folder)["step"]
        except (CorruptArtifact, KeyError):
            continue
        parts.append(f"training up to step {step}")
        break
    return ", ".join(parts) or None
