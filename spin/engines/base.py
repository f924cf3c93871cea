"""What all engines share: devices, precision, the interface."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from spin.config.schema import EngineConfig
from spin.engines.logps import Forward
from spin.engines.packing import Batch, Continuations
from spin.runtime.errors import UserError
from spin.runtime.process_group import ProcessGroup

# Of a checkpoint: the masters by name, and what the optimiser keeps, "<state>.<name>", flat.
MASTERS, OPTIMIZER = "masters.safetensors", "optimizer.safetensors"


def select_device(config: EngineConfig) -> torch.device:
    """The device to compute on. Raises UserError if the one asked for is not there."""
    name = config.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"engine.device={name}: {str(error).splitlines()[0]}. Use engine.device=auto or cpu."
        ) from error
    return torch.device(name)


def select_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The type that products are computed in. "auto" is bf16 where the processor has instructions for it.

    By capability and not by a measurement: a measurement could turn out differently in the next run, and with it the bits.
    """
    if config.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


class Engine(Protocol):
    """What the training loop asks for: of one process (`SingleEngine`), or of several together (`DeepSpeedEngine`)."""

    model: PreTrainedModel
    dtype: torch.dtype
    device: torch.device
    ranks: ProcessGroup

    def micro_batches(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]: ...
    def logps(self, batch: Batch, forward: Forward) -> Tensor: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr: float) -> float: ...
    def skip_step(self) -> float: ...
    def mean(self, values: Sequence[Tensor]) -> float: ...
    def save(self, folder: Path) -> None: ...
    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...
    def close(self) -> None: ...


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have the layers of `model` compute their activations again in the backward pass, where they would be kept."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        # Its layers checkpoint in train mode only. What is in them stays in evaluation mode, dropout off.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
