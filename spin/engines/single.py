"""Training in one process."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spin.config.schema import EngineConfig, OptimizerConfig
from spin.engines.base import MASTERS, OPTIMIZER, Engine
from spin.engines.device_memory import release_free_memory
from spin.engines.eight_bit import EightBit
from spin.engines.logps import Forward, sequence_logps
from spin.engines.optimizers import EIGHT_BIT, Optimizer, combine, global_norm, residual_bits
from spin.engines.packing import Batch, Continuations
from spin.models.load import masters_of
from spin.models.policy import Policy
from spin.models.save import save_model
from spin.runtime.process_group import SINGLE_PROCESS


class SingleEngine(Engine):
    """An `Engine` of one process. The model computes in `dtype`; the optimiser updates fp32 master weights.

    The spacing of bf16 numbers near 0.02 is 1.2e-4, so an update with a learning rate of 5e-7 would be rounded away.
    Each bf16 weight is therefore stored with the 16 `residuals` bits that complete it to the fp32 master. Gradients of
    the first micro-batch stay in `dtype`; those of further micro-batches are added in fp32.
    """

    def __init__(
        self, policy: Policy, dtype: torch.dtype, device: torch.device, engine: EngineConfig, optimizer: OptimizerConfig
    ):
        super().__init__(policy, dtype, device, engine, SINGLE_PROCESS)
        self.max_grad_norm = optimizer.max_grad_norm
        self.weights = {name: weight.data for name, weight in self.trained.items()}
        self.residuals: dict[str, Tensor] = {}
        if dtype != torch.float32:
            masters, self.buffers = masters_of(policy, device)
            self._set_masters(masters)
            del masters  # before the optimiser allocates memory
        self.grads: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name, weight in self.trained.items():
            weight.requires_grad_(True)
            self._hooks.append(weight.register_post_accumulate_grad_hook(partial(self._collect, name)))
        optimizer_class = EightBit if optimizer.name in EIGHT_BIT else Optimizer
        self.optimizer: EightBit | Optimizer = optimizer_class(optimizer, self.weights)
        release_free_memory()  # temporary copies made while loading and rounding

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 master weights by name, on the CPU because a GPU may not have enough memory."""
        return {
            name: (combine(weight, self.residuals[name]) if name in self.residuals else weight).cpu()
            for name, weight in self.weights.items()
        }

    def _set_masters(self, masters: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(masters[name])
            if weight.dtype == torch.bfloat16:  # some architectures keep a few weights in fp32
                self.residuals[name] = residual_bits(masters[name], weight)

    def _collect(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        total = self.grads.get(name)
        self.grads[name] = weight.grad if total is None else total.float().add_(weight.grad)
        weight.grad = None

    def micro_batches(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]:
        return ((batch, 1.0) for batch in forward.batches(items))

    def logps(self, batch: Batch, forward: Forward) -> Tensor:
        return sequence_logps(self.model, batch.to(self.device), forward)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float | None) -> float:
        norm = math.nan if lr is None else global_norm(self.grads.values())
        if lr is not None and math.isfinite(norm):
            scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
            self.optimizer.step(self.weights, self.residuals, self.grads, lr, scale)
        self.grads.clear()
        return norm

    def save(self, folder: Path) -> None:
        release_free_memory()  # of the activations, before the fp32 masters are allocated
        save_model(self.model, {**self.buffers, **self.masters}, self.policy, folder)

    def save_state(self, folder: Path) -> None:
        release_free_memory()
        save_file(self.masters, folder / MASTERS)
        self.optimizer.save(folder / OPTIMIZER)

    def load_state(self, folder: Path) -> None:
        with safe_open(folder / MASTERS, "pt") as file:
            self._set_masters({name: file.get_tensor(name).to(self.device) for name in file.keys()})
        self.optimizer.load(folder / OPTIMIZER)

    def close(self) -> None:
        """Remove the hooks: the garbage collector cannot detect their reference cycle of weights and engine."""
        while self._hooks:
            self._hooks.pop().remove()
