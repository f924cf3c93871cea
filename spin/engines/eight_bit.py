"""Optimisers of bitsandbytes, with 8-bit states."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spin.config.schema import OptimizerConfig
from spin.engines.optimizers import Tensors, combine, residual_bits
from spin.models.quantization import import_bitsandbytes


class EightBit:
    """RMSprop or AdamW of bitsandbytes, one optimiser per weight, with the interface of `Optimizer`."""

    def __init__(self, config: OptimizerConfig, weights: Tensors):
        import_bitsandbytes()
        import bitsandbytes

        options: dict[str, Any] = {"eps": config.eps, "weight_decay": config.weight_decay}
        if config.name == "rmsprop8bit":
            make: Any = partial(bitsandbytes.optim.RMSprop8bit, alpha=config.alpha, **options)
        else:
            make = partial(bitsandbytes.optim.AdamW8bit, betas=tuple(config.betas), **options)
        # Each parameter holds its fp32 master only during its update.
        self.parameters = {name: torch.nn.Parameter(torch.empty(0, device=w.device)) for name, w in weights.items()}
        self.optimizers = {name: make([parameter]) for name, parameter in self.parameters.items()}

    def step(self, weights: Tensors, residuals: Tensors, grads: Tensors, lr: float, scale: float) -> None:
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
        """Write the states under the names "<state>.<weight>"."""
        # bitsandbytes counts steps in plain numbers, and its states share quantisation maps (hence the copies).
        tensors = {
            f"{key}.{name}": value.clone() if isinstance(value, Tensor) else torch.tensor(value)
            for name, optimizer in self.optimizers.items()
            for key, value in optimizer.state[self.parameters[name]].items()
        }
        save_file(tensors, file)

    def load(self, file: Path) -> None:
        for entry, value in load_file(file).items():
            key, _, name = entry.partition(".")
            parameter = self.parameters[name]
            state = self.optimizers[name].state[parameter]
            state[key] = value.clone().to(parameter.device) if value.ndim else value.item()
