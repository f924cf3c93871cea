"""RMSprop and AdamW: PyTorch's own updates of fp32 master weights, computed in pieces that fit the processor's cache.

A weight may be stored as a bf16 number and its residual bits (see `residual_bits`). Together they are the fp32 master;
the model computes with the bf16 half.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop

from spin.config.schema import OptimizerConfig
from spin.runtime.random import seed_of

Tensors = Mapping[str, Tensor]  # by weight name
STATES = {"rmsprop": ("square_avg",), "adamw": ("exp_avg", "exp_avg_sq")}  # per weight
# Size of 8-bit states with one scale per 256 weights, in units of four bytes per weight.
EIGHT_BIT = {"rmsprop8bit": 0.254, "adamw8bit": 0.508}
PIECE = {"cpu": 2**17}  # weights per piece, by device type: a piece fits a CPU's cache
LARGE_PIECE = 2**26  # for GPUs


def state_values_per_weight(name: str, states: str) -> float:
    """Return the size of the states of the optimiser `name` for one weight, in units of four bytes."""
    if name in EIGHT_BIT:
        return EIGHT_BIT[name]
    return len(STATES[name]) * (1.0 if states == "fp32" else 0.5)


class Optimizer:
    """RMSprop or AdamW with states in fp32, or in bf16 with stochastic rounding.

    Stochastic rounding preserves the expected value, so changes too small for bf16 still accumulate. Its noise depends
    only on the number of the update and the name of the weight, so a resumed run draws the same noise.
    """

    def __init__(self, config: OptimizerConfig, weights: Tensors):
        self.config = config
        self.updates = 0
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.states]
        self.states = {
            name: {state: torch.zeros_like(weight, dtype=dtype).view(-1) for state in STATES[config.name]}
            for name, weight in weights.items()
        }

    def step(self, weights: Tensors, residuals: Tensors, grads: Tensors, lr: float, scale: float) -> None:
        """Update the weights, and their residual bits if any, with `scale` times the gradients."""
        self.updates += 1
        for name, grad in grads.items():
            weight, residual, states = weights[name].view(-1), residuals.get(name), self.states[name]
            generator = torch.Generator(weight.device).manual_seed(seed_of(self.updates, name))
            for piece in _pieces(weight):
                master = weight[piece] if residual is None else combine(weight[piece], residual.view(-1)[piece])
                values = [state[piece].float() for state in states.values()]
                self._update(master, grad.view(-1)[piece].float() * scale, values, lr)
                if self.config.states == "bf16":
                    for state, value in zip(states.values(), values, strict=True):
                        state[piece] = round_stochastically(value, generator)
                if residual is not None:
                    weight[piece] = master
                    residual_bits(master, weight[piece], out=residual.view(-1)[piece])

    def _update(self, master: Tensor, grad: Tensor, states: list[Tensor], lr: float) -> None:
        c = self.config
        common = dict[str, Any](lr=lr, eps=c.eps, weight_decay=c.weight_decay, foreach=False, maximize=False)
        step = torch.tensor(float(self.updates - 1))  # PyTorch's functions add 1
        if c.name == "rmsprop":
            rmsprop([master], [grad], states, [], [], [step], alpha=c.alpha, momentum=0.0, centered=False, **common)
        else:
            beta1, beta2 = c.betas
            first, second = ([state] for state in states)
            adamw([master], [grad], first, second, [], [step], beta1=beta1, beta2=beta2, amsgrad=False, **common)

    def save(self, file: Path) -> None:
        """Write the states as "<state>.<weight>", flat, and the number of updates as metadata."""
        tensors = {f"{state}.{name}": value for name, states in self.states.items() for state, value in states.items()}
        save_file(tensors, file, {"updates": str(self.updates)})

    def load(self, file: Path) -> None:
        with safe_open(file, "pt") as saved:
            self.updates = int(saved.metadata()["updates"])
            for name, states in self.states.items():
                for state, value in states.items():
                    value.copy_(saved.get_tensor(f"{state}.{name}"))


def _pieces(weight: Tensor) -> Iterator[slice]:
    size = PIECE.get(weight.device.type, LARGE_PIECE)
    for start in range(0, len(weight), size):
        yield slice(start, start + size)


def global_norm(grads: Iterable[Tensor]) -> float:
    """Return the norm of all gradients in fp32, computed in pieces as PyTorch would copy whole tensors to fp32."""
    flat = [grad.view(-1) for grad in grads]
    norms = [torch.linalg.vector_norm(grad[piece], dtype=torch.float32) for grad in flat for piece in _pieces(grad)]
    return torch.linalg.vector_norm(torch.stack(norms)).item()


# --- conversion of fp32 to bf16 ---------------------------------------------------------------------------------------


def residual_bits(master: Tensor, rounded: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the int16 difference between the bits of `master` (fp32) and of `rounded`, the nearest bf16 number.

    A master exactly half-way below an even bf16 (one in 131,072) is stored as its fp32 neighbour.
    """
    difference = (master.view(torch.int32) - rounded.float().view(torch.int32)).clamp_(max=2**15 - 1)
    return difference.to(torch.int16) if out is None else out.copy_(difference)


def combine(rounded: Tensor, residual: Tensor) -> Tensor:
    """Return the fp32 master from a bf16 weight and its residual bits."""
    return rounded.float().view(torch.int32).add_(residual).view(torch.float32)


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round `value` (fp32, finite) randomly up or down to bf16, so that its expected value is preserved."""
    noise = torch.randint(0, 2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return ((value.view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)
