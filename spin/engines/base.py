"""The interface of the engines, and their choice of device and precision."""

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

# The files of a checkpoint: the fp32 masters by name, and the optimiser states as "<state>.<name>", flat.
MASTERS, OPTIMIZER = "masters.safetensors", "optimizer.safetensors"


def select_device(config: EngineConfig) -> torch.device:
    """The device to compute on. Raises UserError if `engine.device` is not available."""
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
    """The type that the model computes in. "auto" is bf16 where the processor has instructions for it.

    The choice rests on capabilities, not on a timing, which could differ in the next run and change the bits.
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
    """Holds a model in training and its optimiser, in one process (`SingleEngine`) or several (`DeepSpeedEngine`).

    With several ranks, every rank calls every method, in the same order.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    device: torch.device
    ranks: ProcessGroup

    def micro_batches(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]:
        """The batches of one step's `items` on this rank, each with its weight in the loss.

        The weight is 1, or 0 for a batch that only keeps this rank in step with the others.
        """

    def logps(self, batch: Batch, forward: Forward) -> Tensor:
        """The log-prob of each response, fp32 [batch.responses], with gradients: see `sequence_logps`."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar, to those of the step."""

    def step(self, lr: float) -> float:
        """Clip the gradients, update the masters with learning rate `lr`, and clear the gradients.

        Returns the norm before clipping. If it is not finite, nothing is updated.
        """

    def skip_step(self) -> float:
        """Clear the gradients without an update. Returns NaN in place of a norm."""

    def mean(self, values: Sequence[Tensor]) -> float:
        """The mean over all entries of all tensors, and over all ranks."""

    def save(self, folder: Path) -> None:
        """Write the fp32 masters and the tokenizer as a Hugging Face model folder."""

    def save_state(self, folder: Path) -> None:
        """Write the masters and the optimiser states, which the next step needs."""

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote: training continues with the same bits."""

    def close(self) -> None:
        """Release the hooks and memory that would outlive the engine."""


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have the layers of `model` recompute their activations in the backward pass (gradient checkpointing)."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        # Layers checkpoint in train mode only; their submodules stay in evaluation mode, and dropout is set to 0.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
