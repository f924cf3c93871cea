"""What stands between the training loop and the machine: backward, step, drop, mean, save, and the state to go on from."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from spin import adapters
from spin.config import EngineConfig, OptimizerConfig
from spin.errors import UserError
from spin.model import Policy, load_policy, masters_of, save_model, saved_buffers, trained_parameters


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


# What an optimiser keeps for each weight, in numbers of four bytes.
STATES = {"rmsprop": 1.0, "adamw": 2.0, "rmsprop8bit": 0.254, "adamw8bit": 0.508}


class SingleEngine:
    """One process. The model computes in `dtype`; the optimiser works on fp32 master weights.

    In bf16 a weight of 0.02 has a neighbour 6e-5 away, so updates of a learning rate of 5e-7 would be rounded away:
    they are added to the masters, from which the model's weights are rounded after each step. Gradients of
    micro-batches are summed in fp32 as they appear, and the model's own are freed at once.
    """

    def __init__(
        self, policy: Policy, dtype: torch.dtype, device: torch.device, engine: EngineConfig, optimizer: OptimizerConfig
    ):
        self.model = load_policy(policy, dtype, device)
        if engine.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            for module in self.model.modules():
                # Its layers checkpoint in train mode only. What is in them stays in evaluation mode, dropout off.
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
                    for name, value in vars(module).items():
                        if "drop" in name and isinstance(value, float):
                            setattr(module, name, 0.0)
        self.policy = policy
        self.dtype, self.device = dtype, device
        self.max_grad_norm = optimizer.max_grad_norm
        self.weights = trained_parameters(self.model, policy)
        if dtype == torch.float32:
            self.masters = {name: weight.data for name, weight in self.weights.items()}
            self.buffers = saved_buffers(self.model)
        else:
            found, self.buffers = masters_of(policy, device)
            self.masters = {name: found[name] for name in self.weights}
        self.grads = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        for name, weight in self.weights.items():
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(_collect_into(self.grads[name]))
        self.optimizer = _optimizer(list(self.masters.values()), optimizer)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar, to those of the step."""
        loss.backward()

    def step(self, lr: float) -> float:
        """Clip, update the masters with learning rate `lr`, round them into the model. Returns the norm before clipping.

        Where the norm is not finite nothing is updated, and the gradients are dropped.
        """
        for name, master in self.masters.items():
            master.grad = self.grads[name]
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm).item()
        if not math.isfinite(norm):
            self.drop()
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for name, master in self.masters.items():
            if self.dtype != torch.float32:
                self.weights[name].data.copy_(master)
            self.grads[name].zero_()
        return norm

    def drop(self) -> float:
        """Forget the gradients of the step, which have no norm: NaN."""
        for grad in self.grads.values():
            grad.zero_()
        return math.nan

    def mean(self, values: Iterable[Tensor]) -> float:
        """The mean over all entries of all tensors (and over ranks, where there are several)."""
        return torch.cat([value.reshape(-1).cpu().double() for value in values]).mean().item()

    def save(self, folder: Path) -> None:
        """Write the master weights (fp32) and the tokenizer as a Hugging Face model folder."""
        save_model(self.model, {**self.buffers, **self.masters}, self.policy, folder)

    def save_state(self, folder: Path) -> None:
        """Write what the next step needs, between two steps: the master weights and the optimiser's states, as they are."""
        save_file(self.masters, folder / "masters.safetensors")
        states = [self.optimizer.state.get(master, {}) for master in self.masters.values()]
        tensors = {
            f"{index}.{name}": _saved(name, value)
            for index, state in enumerate(states)
            for name, value in state.items()
        }
        save_file(tensors, folder / "optimizer.safetensors")

    def load_state(self, folder: Path) -> None:
        """Go on from what `save_state` wrote: the same bits as if nothing had come between."""
        with safe_open(folder / "masters.safetensors", "pt") as file:
            for name, master in self.masters.items():
                master.copy_(file.get_tensor(name))
                self.weights[name].data.copy_(master)
        # Copies: what safetensors gives is the file, mapped, which would hold its space for as long as we train.
        states: dict[int, dict[str, Any]] = {}
        with safe_open(folder / "optimizer.safetensors", "pt") as file:
            for key in file.keys():
                index, _, name = key.partition(".")
                value = file.get_tensor(key).clone()
                is_count = value.ndim == 0 and value.dtype == torch.int64
                states.setdefault(int(index), {})[name] = value.item() if is_count else value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _saved(name: str, value: Any) -> Tensor:
    """An entry of an optimiser's state as a tensor of its own: bitsandbytes counts steps in plain numbers, and its states
    share the maps of their 8 bits."""
    return (value.clone() if name.startswith("qmap") else value) if isinstance(value, Tensor) else torch.tensor(value)


def _collect_into(total: Tensor):
    def collect(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    return collect


def _optimizer(masters: list[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    beta1, beta2 = config.betas
    if config.name.endswith("8bit"):
        adapters.import_bitsandbytes()
        import bitsandbytes

        common: dict[str, Any] = {"eps": config.eps, "weight_decay": config.weight_decay}
        if config.name == "rmsprop8bit":
            return bitsandbytes.optim.RMSprop8bit(masters, alpha=config.alpha, **common)
        return bitsandbytes.optim.AdamW8bit(masters, betas=(beta1, beta2), **common)
    # Tensor by tensor: all at once would need another copy of the weights for what lies between.
    common = {"eps": config.eps, "weight_decay": config.weight_decay, "foreach": False}
    if config.name == "rmsprop":
        return torch.optim.RMSprop(masters, alpha=config.alpha, **common)
    return torch.optim.AdamW(masters, betas=(beta1, beta2), **common)
