"""bf16 numbers that lose nothing of fp32: a weight with its residual bits, and stochastic rounding."""

import torch
from torch import Tensor


def residual_bits(master: Tensor, rounded: Tensor, out: Tensor | None = None) -> Tensor:
    """The int16 difference between the bits of `master` (fp32) and of `rounded`, the nearest bf16.

    A master exactly half-way below an even bf16 (one in 131,072) is stored as its fp32 neighbour.
    """
    difference = (master.view(torch.int32) - rounded.float().view(torch.int32)).clamp_(max=2**15 - 1)
    return difference.to(torch.int16) if out is None else out.copy_(difference)


def combine(rounded: Tensor, residual: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its residual bits."""
    return rounded.float().view(torch.int32).add_(residual).view(torch.float32)


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round `value` (fp32, finite) up or down to bf16, with the probabilities that keep its expected value."""
    noise = torch.randint(0, 2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return ((value.view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)
