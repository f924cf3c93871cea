"""Disk space needed by policies and checkpoints."""

import math
from pathlib import Path

from safetensors import safe_open

from spin.config.schema import OptimizerConfig
from spin.engines.optimizers import state_values_per_weight
from spin.models.policy import weight_files
from spin.runtime.checkpoints import KEPT


def fp32_bytes(folder: Path) -> int:
    """Return the size in bytes of a model folder's weights in fp32."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            total += sum(4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


def training_bytes(policy: int, optimizer: OptimizerConfig) -> int:
    """Return the size in bytes of a training's checkpoints, for a policy of `policy` bytes."""
    return int(KEPT * policy * (1 + state_values_per_weight(optimizer.name, optimizer.states)))
