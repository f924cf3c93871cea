"""Optimisers with 8-bit states, by bitsandbytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spin.config.schema import OptimizerConfig
from spin.engines.rounding import combine, residual_bits
from spin.models.quantization import import_bitsandbytes


class EightBit:
    """bitsandbytes' RMSprop or AdamW with the interface of `Optimizer`: one optimiser for each weight."""

    def __init__(self, config: OptimizerConfig, weights: Mapping[str, Tensor]):
        import_bitsandbytes()
        import bitsandbytes

        beta1, beta2 = config.betas
        common: dict[str, Any] = {"eps": config.eps, "weight_decay": config.weight_decay}

        def make(parameter: torch.nn.Parameter) -> Any:
            if config.name == "rmsprop8bit":
                return bitsandbytes.optim.RMSprop8bit([parameter], alpha=config.alpha, **common)
            return bitsandbytes.optim.AdamW8bit([parameter], betas=(beta1, beta2), **common)

        # Each holds its fp32 master during its update only.
        self.parameters = {name: torch.nn.Parameter(torch.empty(0, device=w.device)) for name, w in weights.items()}
        self.optimizers = {name: make(parameter) for name, parameter in self.parameters.items()}

    def step(
        self,
        weights: Mapping[str, Tensor],
        residuals: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        lr: float,
        scale: float,
    ) -> None:
        """As `Optimizer.step`."""
        for name, grad in grads.items():
            weight, residual = weights[name], residuals.get(name)
            parameter, optimizer = self.parameters[name], self.optimizers[name]
            parameter.data = weight if residual is None else combine(weight, residual)
            parameter.grad = grad.float() * scale
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            if residual is not None:
                weight.copy_(parameter.data)
                residual_bits(parameter.data, weight, out=residual)
            parameter.grad = None
            parameter.data = weight.new_empty(0)

    def save(self, file: Path) -> None:
        """Write the states as "<state>.<weight>"."""
        # bitsandbytes counts steps in plain numbers, and its states share their quantisation maps.
        tensors = {
            f"{key}.{name}": value.clone() if isinstance(value, Tensor) else torch.tensor(value)
            for name, optimizer in self.optimizers.items()
            for key, value in optimizer.state[self.parameters[name]].items()
        }
        save_file(tensors, file)

    def load(self, file: Path) -> None:
        """Restore what `save` wrote."""
        with safe_open(file, "pt") as saved:
            for entry in saved.keys():
                key, _, name = entry.partition(".")
                value = saved.get_tensor(entry).clone()
                state = self.optimizers[name].state[self.parameters[name]]
                state[key] = value.item() if value.ndim == 0 else value.to(self.parameters[name].device)
