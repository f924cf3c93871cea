"""The common interface of the engines, and the choice of device and precision."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from spin.config.schema import EngineConfig
from spin.engines.activations import save_less_for_backward
from spin.engines.logps import Forward
from spin.engines.packing import Batch, Continuations
from spin.models.load import load_policy, saved_buffers, trained_parameters
from spin.models.policy import Policy
from spin.runtime.errors import explaining
from spin.runtime.process_group import ProcessGroup

# Files of a checkpoint: the fp32 masters by name, and the flattened optimiser states as "<state>.<name>".
MASTERS, OPTIMIZER = "masters.safetensors", "optimizer.safetensors"


def select_device(config: EngineConfig) -> torch.device:
    """Return the device to compute on. Raises UserError if `engine.device` is not available."""
    name = config.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with explaining(f"engine.device={name} is not available", "use engine.device=auto or cpu"):
        torch.empty(1, device=name)
    return torch.device(name)


def select_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """Return the model's compute type. "auto" selects bf16 if the processor has instructions for it.

    A choice based on timings could differ between runs and change the results.
    """
    if config.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32


class Engine(ABC):
    """A model in training and its optimiser, in one process (`SingleEngine`) or several (`DeepSpeedEngine`).

    With several ranks, all ranks must call the same methods in the same order.
    """

    def __init__(
        self, policy: Policy, dtype: torch.dtype, device: torch.device, engine: EngineConfig, ranks: ProcessGroup
    ):
        """Load the policy to compute in `dtype` on `device`."""
        self.policy, self.dtype, self.device, self.ranks = policy, dtype, device, ranks
        # ZeRO 3 partitions the weights one by one from the CPU, so no device has to hold all of them.
        is_partitioned = engine.name == "deepspeed" and engine.zero_stage == 3
        self.model = load_policy(policy, dtype, torch.device("cpu") if is_partitioned else device)
        if engine.gradient_checkpointing:
            checkpoint_activations(self.model)
        if engine.compile:  # each layer is compiled at its first use, once for all lengths
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(dynamic=True)
        else:
            save_less_for_backward(self.model, in_checkpoints=engine.gradient_checkpointing)
        self.trained = trained_parameters(self.model, policy)
        self.buffers = saved_buffers(self.model)

    @abstractmethod
    def micro_batches(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]:
        """Yield this rank's batches of one step's `items`, each with its weight in the loss.

        The weight is 1, or 0 for a batch that is only added because all ranks must process equally many.
        """

    @abstractmethod
    def logps(self, batch: Batch, forward: Forward) -> Tensor:
        """Return the log-prob of each response, fp32 [batch.responses] (see `sequence_logps`)."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the scalar `loss` to those of the current step."""

    @abstractmethod
    def step(self, lr: float | None) -> float:
        """Clip the gradients, update the masters with learning rate `lr`, and clear the gradients.

        Returns the norm before clipping. Nothing is updated if it is not finite or if `lr` is None.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the fp32 masters and the tokenizer as a Hugging Face model folder."""

    @abstractmethod
    def save_state(self, folder: Path) -> None:
        """Write the masters and the optimiser states, from which training can resume."""

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Restore the state that `save_state` wrote. Training then continues bitwise identically."""

    @abstractmethod
    def close(self) -> None:
        """Release hooks and memory that would otherwise outlive the engine."""


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing: the layers of `model` recompute their activations in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        # Layers checkpoint only in training mode. Submodules stay in evaluation mode, and dropout is set to 0.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
