"""The optimisers: PyTorch's own updates, on fp32 weights, in pieces that stay in the processor's cache.

A piece of the weights is read and written once for all operations of an update, and what lies between takes a piece's memory.
The weights may be stored as bf16 and the 16 bits that complete them (`low_bits`): together they are the fp32 master, in the
memory of the master alone, and the model computes with the one half.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop

from spin.config.schema import OptimizerConfig

if TYPE_CHECKING:
    from spin.engines.eight_bit import EightBit

STATES = {"rmsprop": ("square_avg",), "adamw": ("exp_avg", "exp_avg_sq")}  # what is kept for each weight
# In 8 bits, with a scale for each 256 weights: numbers of four bytes a weight.
EIGHT_BIT = {"rmsprop8bit": 0.254, "adamw8bit": 0.508}
PIECE = {"cpu": 2**17}  # weights updated together: those of a CPU's cache
LARGE_PIECE = 2**26  # of a GPU's memory


def make_optimizer(config: OptimizerConfig, weights: Mapping[str, Tensor]) -> "Optimizer | EightBit":
    from spin.engines.eight_bit import EightBit

    return EightBit(config, weights) if config.name in EIGHT_BIT else Optimizer(config, weights)


def state_values_per_weight(config: OptimizerConfig) -> float:
    """What is kept for each weight, in numbers of four bytes."""
    if config.name in EIGHT_BIT:
        return EIGHT_BIT[config.name]
    return len(STATES[config.name]) * (1.0 if config.states == "fp32" else 0.5)


class Optimizer:
    """RMSprop or AdamW. `states` are fp32, or bf16 rounded at random (in the mean the value itself, so that changes too
    small for bf16 still add up), from a stream that the number of the update decides."""

    def __init__(self, config: OptimizerConfig, weights: Mapping[str, Tensor]):
        self.config = config
        self.updates = 0
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.states]
        self.states = {
            name: {state: torch.zeros_like(weight, dtype=kind).view(-1) for state in STATES[config.name]}
            for name, weight in weights.items()
        }

    def step(
        self,
        weights: Mapping[str, Tensor],
        low: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        lr: float,
        scale: float,
    ) -> None:
        """Update the weights, and their low bits where they have any, by `scale` times the gradients."""
        self.updates += 1
        for name, grad in grads.items():
            weight, bits, states = weights[name].view(-1), low.get(name), self.states[name]
            generator = torch.Generator(weight.device).manual_seed(self.updates)
            for part in _parts(weight):
                master = weight[part] if bits is None else combine(weight[part], bits.view(-1)[part])
                kept = [states[state][part].float() for state in states]
                self._update(master, grad.view(-1)[part].float() * scale, kept, lr)
                for state, value in zip(states, kept, strict=True):
                    if self.config.states == "bf16":
                        states[state][part] = _rounded_at_random(value, generator)
                if bits is not None:
                    weight[part] = master
                    residual_bits(master, weight[part], out=bits.view(-1)[part])

    def _update(self, master: Tensor, grad: Tensor, states: list[Tensor], lr: float) -> None:
        c = self.config
        common: dict[str, Any] = {
            "lr": lr,
            "eps": c.eps,
            "weight_decay": c.weight_decay,
            "foreach": False,
            "maximize": False,
        }
        # Told as of before the update, which counts it.
        step = torch.tensor(float(self.updates - 1))
        if c.name == "rmsprop":
            squares = states
            rmsprop([master], [grad], squares, [], [], [step], alpha=c.alpha, momentum=0.0, centered=False, **common)
        else:
            beta1, beta2 = c.betas
            first, second = ([state] for state in states)
            adamw([master], [grad], first, second, [], [step], beta1=beta1, beta2=beta2, amsgrad=False, **common)

    def save(self, file: Path) -> None:
        tensors = {f"{state}.{name}": value for name, states in self.states.items() for state, value in states.items()}
        save_file(tensors, file, {"updates": str(self.updates)})

    def load(self, file: Path) -> None:
        with safe_open(file, "pt") as saved:
            self.updates = int(saved.metadata()["updates"])
            for name, states in self.states.items():
                for state, value in states.items():
                    value.copy_(saved.get_tensor(f"{state}.{name}"))


def _parts(weight: Tensor) -> Iterator[slice]:
    size = PIECE.get(weight.device.type, LARGE_PIECE)
    for start in range(0, len(weight), size):
        yield slice(start, start + size)


def global_norm(grads: Iterable[Tensor]) -> float:
    """The norm of all gradients together, in fp32: in pieces, for PyTorch widens a whole tensor first."""
    norms = [
        torch.linalg.vector_norm(grad.view(-1)[part], dtype=torch.float32)
        for grad in grads
        for part in _parts(grad.view(-1))
    ]
    return torch.linalg.vector_norm(torch.stack(norms)).item()


def residual_bits(master: Tensor, rounded: Tensor, out: Tensor | None = None) -> Tensor:
    """int16: what `rounded` (bf16, the nearest to `master`, fp32) lacks of `master`, as a difference of their bits.

    A master exactly half-way below an even bf16 (one in 131,072) is off by 2^-15 of bf16's last bit: its fp32 neighbour.
    """
    difference = (master.view(torch.int32) - rounded.float().view(torch.int32)).clamp_(max=2**15 - 1)
    return difference.to(torch.int16) if out is None else out.copy_(difference)


def combine(rounded: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its low bits."""
    return rounded.float().view(torch.int32).add_(low).view(torch.float32)


def _rounded_at_random(value: Tensor, generator: torch.Generator) -> Tensor:
    """bf16, up or down with the probabilities that make `value` (fp32, finite) its mean."""
    noise = torch.randint(0, 2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return ((value.view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)
