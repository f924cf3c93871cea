"""Disk space that policies and checkpoints need."""

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from spin.config.schema import OptimizerConfig
from spin.engines.optimizers import state_values_per_weight
from spin.models.policy import Policy, weight_files
from spin.runtime.checkpoints import KEPT


def fp32_bytes(folder: Path) -> int:
    """Return the size of a model folder's weights in fp32."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            total += sum(4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


def training_bytes(policy: int, optimizer: OptimizerConfig) -> int:
    """Return the bytes of a training's checkpoints, for a policy of `policy` bytes."""
    return int(KEPT * policy * (1 + state_values_per_weight(optimizer)))


def disk_needed(missing: Sequence[str], start: Policy, policy: int, optimizer: OptimizerConfig, resumable: int) -> int:
    """Return the bytes that the `missing` stages, by name, write to the store beside the `resumable` ones."""
    trainings = sum(name in ("sft", "train") for name in missing)
    merged = fp32_bytes(start.base_or_self.folder) if "merge" in missing else 0
    written = trainings * policy + training_bytes(policy, optimizer) if trainings else 0
    return merged + max(0, written - resumable)
