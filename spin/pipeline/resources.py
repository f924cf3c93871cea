"""Disk and memory that a run needs, checked before long work starts."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from spin.engines.optimizers import state_values_per_weight
from spin.models.policy import weight_files
from spin.pipeline.context import Run
from spin.pipeline.probes import adapter_size
from spin.runtime.checkpoints import KEPT
from spin.runtime.errors import UserError
from spin.runtime.store import Store


def fp32_bytes(folder: Path) -> int:
    """The size of a model folder's weights in fp32."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            total += sum(4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


def training_bytes(run: Run, stages: int) -> int:
    """Disk that this many training stages need: one policy each, and the checkpoints of one at a time."""
    if run.start.base or run.config.model.adapter == "none":
        policy = fp32_bytes(run.start.folder)
    else:
        policy = 4 * adapter_size(run.config, run.start)
    return stages * policy + int(KEPT * policy * (1 + state_values_per_weight(run.config.optimizer)))


def disk_needed(run: Run, missing: Sequence[str], resumable_bytes: int) -> int:
    """Bytes that the `missing` stages, by name, may write to the store; `resumable_bytes` of them are already there."""
    trainings = sum(name in ("sft", "train") for name in missing)
    merged = fp32_bytes(run.start.base_or_self.folder) if "merge" in missing else 0
    return merged + (max(0, training_bytes(run, trainings) - resumable_bytes) if trainings else 0)


def check_disk(store: Store, needed: int, purpose: str) -> None:
    """Raise UserError if the store's disk has fewer than `needed` bytes left for `purpose`."""
    store.path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.path).free
    if free < needed:
        raise UserError(
            f"store.path={store.path}: {free / 2**30:.1f} GiB are free, but {purpose} may take {needed / 2**30:.1f} GiB. "
            "Free some space (`python -m spin store clean`) or give another store.path."
        )
