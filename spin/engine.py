"""What stands between the training loop and the machine: passes, logps, backward, step, drop, mean, save, and the state to
go on from."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from spin.activations import keep_less
from spin.config import EngineConfig, OptimizerConfig
from spin.errors import UserError
from spin.logps import Forward, sequence_logps
from spin.memory import give_back
from spin.model import Policy, load_policy, masters_of, save_model, saved_buffers, trained_parameters
from spin.optimizer import join, low_bits, make_optimizer, norm_of
from spin.pairs import Batch, Continuations
from spin.ranks import ALONE, Ranks

# Of a checkpoint: the masters by name, and what the optimiser keeps, "<state>.<name>", flat.
MASTERS, OPTIMIZER = "masters.safetensors", "optimizer.safetensors"


def device_of(config: EngineConfig) -> torch.device:
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


def compute_type(config: EngineConfig, device: torch.device) -> torch.dtype:
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
    ranks: Ranks

    def passes(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]: ...
    def logps(self, batch: Batch, forward: Forward) -> Tensor: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr: float) -> float: ...
    def drop(self) -> float: ...
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


class SingleEngine:
    """One process. The model computes in `dtype`; the optimiser works on fp32 master weights.

    In bf16 a weight of 0.02 has a neighbour 6e-5 away, so updates of a learning rate of 5e-7 would be rounded away. A bf16
    model's weights are therefore kept with the 16 bits that complete them to the fp32 masters (`low`). Gradients are kept
    as the model makes them, in `dtype`; those of further micro-batches are added in fp32.
    """

    ranks = ALONE

    def __init__(
        self, policy: Policy, dtype: torch.dtype, device: torch.device, engine: EngineConfig, optimizer: OptimizerConfig
    ):
        self.model = load_policy(policy, dtype, device)
        if engine.gradient_checkpointing:
            checkpoint_activations(self.model)
        keep_less(self.model, in_checkpoints=engine.gradient_checkpointing)
        self.policy = policy
        self.dtype, self.device = dtype, device
        self.max_grad_norm = optimizer.max_grad_norm
        trained = trained_parameters(self.model, policy)
        self.weights = {name: weight.data for name, weight in trained.items()}
        self.low: dict[str, Tensor] = {}
        self.buffers = saved_buffers(self.model)
        if dtype != torch.float32:
            masters, self.buffers = masters_of(policy, device)
            self._set_masters(masters)
            del masters
        self.grads: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name, weight in trained.items():
            weight.requires_grad_(True)
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._collect(name)))
        self.optimizer = make_optimizer(optimizer, self.weights)
        give_back()  # what loading and rounding took on the way

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights, those of the model itself or made of its halves, on the CPU: a GPU need not hold them at once."""
        return {
            name: (join(weight, self.low[name]) if name in self.low else weight).cpu()
            for name, weight in self.weights.items()
        }

    def _set_masters(self, masters: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(masters[name])
            if weight.dtype == torch.bfloat16:  # some architectures keep a few weights in fp32
                self.low[name] = low_bits(masters[name], weight)

    def _collect(self, name: str) -> Callable[[torch.nn.Parameter], None]:
        def collect(weight: torch.nn.Parameter) -> None:
            assert weight.grad is not None
            if (total := self.grads.get(name)) is None:
                self.grads[name] = weight.grad
            else:
                self.grads[name] = total.float().add_(weight.grad)
            weight.grad = None

        return collect

    def passes(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]:
        """The batches of a step's `items`, each with its weight in the loss: 1, or 0 where ranks wait for others."""
        for batch in forward.batches(items):
            yield batch, 1.0

    def logps(self, batch: Batch, forward: Forward) -> Tensor:
        """[batch.responses], with gradients: see `sequence_logps`."""
        return sequence_logps(self.model, batch.to(self.device), forward)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar, to those of the step."""
        loss.backward()

    def step(self, lr: float) -> float:
        """Clip, update the masters with learning rate `lr`. Returns the norm before clipping.

        Where the norm is not finite nothing is updated, and the gradients are dropped.
        """
        norm = norm_of(self.grads.values())
        if math.isfinite(norm):
            scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
            self.optimizer.step(self.weights, self.low, self.grads, lr, scale)
        self.drop()
        return norm

    def drop(self) -> float:
        """Forget the gradients of the step, which have no norm: NaN."""
        self.grads.clear()
        return math.nan

    def mean(self, values: Sequence[Tensor]) -> float:
        """The mean over all entries of all tensors (and over ranks, where there are several)."""
        return self.ranks.mean(torch.cat([value.reshape(-1).cpu() for value in values]))

    def save(self, folder: Path) -> None:
        """Write the master weights (fp32) and the tokenizer as a Hugging Face model folder."""
        give_back()  # the activations', before the masters are made whole
        save_model(self.model, {**self.buffers, **self.masters}, self.policy, folder)

    def save_state(self, folder: Path) -> None:
        """Write what the next step needs, between two steps: the master weights and the optimiser's states, as they are."""
        give_back()
        save_file(self.masters, folder / MASTERS)
        self.optimizer.save(folder / OPTIMIZER)

    def load_state(self, folder: Path) -> None:
        """Go on from what `save_state` wrote: the same bits as if nothing had come between."""
        with safe_open(folder / MASTERS, "pt") as file:
            self._set_masters({name: file.get_tensor(name).to(self.device) for name in file.keys()})
        self.optimizer.load(folder / OPTIMIZER)

    def close(self) -> None:
        """Take away the hooks: weights and engine hold each other through them where no collector sees it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
