"""What stands between the training loop and the machine: passes, logps, backward, step, drop, mean, save, and the state to
go on from."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spin.config.schema import EngineConfig, OptimizerConfig
from spin.engines.activations import save_less_for_backward
from spin.engines.base import MASTERS, OPTIMIZER, checkpoint_activations
from spin.engines.device_memory import release_free_memory
from spin.engines.logps import Forward, sequence_logps
from spin.engines.optimizers import combine, global_norm, make_optimizer, residual_bits
from spin.engines.packing import Batch, Continuations
from spin.models.load import load_policy, masters_of, saved_buffers, trained_parameters
from spin.models.policy import Policy
from spin.models.save import save_model
from spin.runtime.process_group import SINGLE_PROCESS


class SingleEngine:
    """One process. The model computes in `dtype`; the optimiser works on fp32 master weights.

    In bf16 a weight of 0.02 has a neighbour 6e-5 away, so updates of a learning rate of 5e-7 would be rounded away. A bf16
    model's weights are therefore kept with the 16 bits that complete them to the fp32 masters (`low`). Gradients are kept
    as the model makes them, in `dtype`; those of further micro-batches are added in fp32.
    """

    ranks = SINGLE_PROCESS

    def __init__(
        self, policy: Policy, dtype: torch.dtype, device: torch.device, engine: EngineConfig, optimizer: OptimizerConfig
    ):
        self.model = load_policy(policy, dtype, device)
        if engine.gradient_checkpointing:
            checkpoint_activations(self.model)
        save_less_for_backward(self.model, in_checkpoints=engine.gradient_checkpointing)
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
        release_free_memory()  # what loading and rounding took on the way

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights, those of the model itself or made of its halves, on the CPU: a GPU need not hold them at once."""
        return {
            name: (combine(weight, self.low[name]) if name in self.low else weight).cpu()
            for name, weight in self.weights.items()
        }

    def _set_masters(self, masters: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(masters[name])
            if weight.dtype == torch.bfloat16:  # some architectures keep a few weights in fp32
                self.low[name] = residual_bits(masters[name], weight)

    def _collect(self, name: str) -> Callable[[torch.nn.Parameter], None]:
        def collect(weight: torch.nn.Parameter) -> None:
            assert weight.grad is not None
            if (total := self.grads.get(name)) is None:
                self.grads[name] = weight.grad
            else:
                self.grads[name] = total.float().add_(weight.grad)
            weight.grad = None

        return collect

    def micro_batches(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]:
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
        norm = global_norm(self.grads.values())
        if math.isfinite(norm):
            scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
            self.optimizer.step(self.weights, self.low, self.grads, lr, scale)
        self.skip_step()
        return norm

    def skip_step(self) -> float:
        """Forget the gradients of the step, which have no norm: NaN."""
        self.grads.clear()
        return math.nan

    def mean(self, values: Sequence[Tensor]) -> float:
        """The mean over all entries of all tensors (and over ranks, where there are several)."""
        return self.ranks.mean(torch.cat([value.reshape(-1).cpu() for value in values]))

    def save(self, folder: Path) -> None:
        """Write the master weights (fp32) and the tokenizer as a Hugging Face model folder."""
        release_free_memory()  # the activations', before the masters are made whole
        save_model(self.model, {**self.buffers, **self.masters}, self.policy, folder)

    def save_state(self, folder: Path) -> None:
        """Write what the next step needs, between two steps: the master weights and the optimiser's states, as they are."""
        release_free_memory()
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
