"""Training in several processes with DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054), as an `Engine`.

Each rank processes a share of each step's items. The ZeRO stage determines what is partitioned over the ranks: nothing
(0), masters and optimiser states (1), also gradients (2), also weights (3). Policies and checkpoints are saved
unpartitioned, in the format of `SingleEngine`.
"""

import contextlib
import importlib.util
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from spin.config.schema import EngineConfig, OptimizerConfig
from spin.engines.base import MASTERS, OPTIMIZER, Engine
from spin.engines.head import OutputLayer
from spin.engines.logps import Forward, sequence_logps
from spin.engines.optimizers import STATES
from spin.engines.packing import Batch, Continuations, balance_by_tokens, collate
from spin.models.load import masters_of
from spin.models.policy import Policy
from spin.models.save import save_model
from spin.runtime.errors import UserError
from spin.runtime.process_group import ProcessGroup

DEEPSPEED = "deepspeed==0.19.8"
BUCKET = 500_000_000  # elements that are reduced or gathered at a time (DeepSpeed's default)


def check_deepspeed() -> None:
    """Raise UserError if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"engine=deepspeed: DeepSpeed is not installed: pip install {DEEPSPEED}")


def _deepspeed() -> Any:
    """Import DeepSpeed and silence it. On a CPU, disable its own transport, which is compiled on first use."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # from its own calls
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, module in list(sys.modules.items()):  # `see_memory_usage` prints, and resets the peak memory
        if name.startswith("deepspeed.") and "see_memory_usage" in vars(module):
            module.see_memory_usage = lambda message, force=False: None  # type: ignore[attr-defined]
    return deepspeed


class _Root(torch.nn.Module):
    """A module that computes log-probs, because DeepSpeed gathers weights around the forward of each module."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.head = OutputLayer(model.get_output_embeddings())

    def forward(self, batch: Batch, forward: Forward) -> Tensor:
        return sequence_logps(self.model, batch, forward, self.head)


class DeepSpeedEngine(Engine):
    """An `Engine` of several processes. DeepSpeed is initialised at the first use, after any `load_state`."""

    def __init__(
        self,
        policy: Policy,
        dtype: torch.dtype,
        device: torch.device,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        ranks: ProcessGroup,
    ):
        super().__init__(policy, dtype, device, engine, ranks)
        self.stage, self.offload = engine.zero_stage, engine.offload_optimizer
        self.config = optimizer
        self.shapes = {name: weight.shape for name, weight in self.trained.items()}
        self.updates = 0
        self._checkpoint: Path | None = None  # to resume from
        self._initialized: Any = None
        self._closed = False

    # --- DeepSpeed's own engine ---------------------------------------------------------------------------------------

    @property
    def _ds(self) -> Any:
        assert not self._closed, "this engine is closed"
        if self._initialized is None:
            self._initialized = self._initialize()
            self._set_state()
        return self._initialized

    def _initialize(self) -> Any:
        deepspeed = _deepspeed()
        if self._checkpoint:
            with safe_open(self._checkpoint / MASTERS, "pt") as file:
                for name, weight in self.trained.items():
                    weight.data.copy_(file.get_tensor(name))
        for weight in self.trained.values():
            weight.requires_grad_(True)
        c = self.config
        options: dict[str, Any] = {"lr": 0.0, "eps": c.eps, "weight_decay": c.weight_decay, "foreach": False}
        if c.name == "rmsprop":
            self.optimizer: Any = torch.optim.RMSprop(self.trained.values(), alpha=c.alpha, **options)
        else:
            self.optimizer = torch.optim.AdamW(self.trained.values(), betas=(c.betas[0], c.betas[1]), **options)
        # DeepSpeed rounds buffers to bf16, so rotary embeddings would differ from those in scoring.
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the free memory
            deepspeed.init_distributed(verbose=False)  # uses the existing process group of `ranks`
            ds, *_ = deepspeed.initialize(model=_Root(self.model), optimizer=self.optimizer, config=self._settings())
        for name, value in buffers.items():
            module, _, leaf = name.rpartition(".")
            self.model.get_submodule(module)._buffers[leaf] = value.to(self.device)
        return ds

    def _settings(self) -> dict[str, Any]:
        size = sum(shape.numel() for shape in self.shapes.values())
        bucket = min(BUCKET, size + size % 2)
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        settings: dict[str, Any] = {
            # The training loop forms the batches, and `micro_batches` marks the end of a step.
            "train_batch_size": self.ranks.size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "steps_per_print": None,
        }
        if self.stage > 0:  # sum micro-batches and ranks in fp32
            settings |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
        return settings

    def _set_state(self) -> None:
        """Set the optimiser states, and the masters, which DeepSpeed has made from rounded weights."""
        if self._checkpoint is None:
            if self.dtype != torch.float32:
                masters, self.buffers = masters_of(self.policy, torch.device("cpu"))
                self._set_masters(masters.__getitem__)
            for part in self._parts():  # at stage 0 DeepSpeed makes an empty update, which AdamW counts
                if "step" in (state := self.optimizer.state.get(part, {})):
                    state["step"].zero_()
            return
        with safe_open(self._checkpoint / OPTIMIZER, "pt") as file:
            self.updates = int(file.metadata()["updates"])
            for part in self._parts():
                self.optimizer.state[part] = {"step": torch.tensor(float(self.updates))}
            for state in STATES[self.config.name]:

                def value_of(name: str, state: str = state) -> Tensor:
                    return file.get_tensor(f"{state}.{name}").view(self.shapes[name])

                # States are partitioned like masters: set the masters to their values, then copy each rank's part.
                self._set_masters(value_of)
                for part in self._parts():
                    self.optimizer.state[part][state] = part.detach().clone()
        with safe_open(self._checkpoint / MASTERS, "pt") as file:
            self._set_masters(file.get_tensor)

    def _parts(self) -> list[Tensor]:
        """Return this rank's parts of the fp32 masters, which are the keys of the optimiser's states."""
        if self.stage == 3:  # DeepSpeed passes them to the optimiser one at a time
            return self._ds.optimizer.fp32_partitioned_groups_flat
        return [part for group in self.optimizer.param_groups for part in group["params"]]

    def _set_masters(self, value_of: Callable[[str], Tensor]) -> None:
        """Set each master, or this rank's part of it, from the full tensor `value_of(name)`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        masters = self._whole_masters()
        for name, weight in self.trained.items():
            value = value_of(name).float()
            if self.stage == 0:
                masters[name].data.copy_(value)
            elif self.stage < 3:
                safe_set_full_fp32_param(weight, value.to(self.device))
            else:  # all parts have the same length, and the last is padded
                length = weight.ds_tensor.numel()  # type: ignore[attr-defined]
                flat = torch.nn.functional.pad(value.flatten(), (0, length * self.ranks.size - value.numel()))
                safe_set_local_fp32_param(weight, flat[self.ranks.rank * length :][:length].to(self.device))

    def _gather_masters(self) -> dict[str, Tensor]:
        """Return the full masters by name on rank 0, in main memory, and an empty dict on other ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        masters, gathered = self._whole_masters(), {}
        for name, weight in self.trained.items():
            value = masters[name].detach() if self.stage == 0 else safe_get_full_fp32_param(weight)
            if self.ranks.is_main_process:
                gathered[name] = value.view(self.shapes[name]).to("cpu", copy=True).contiguous()
        return gathered

    def _whole_masters(self) -> Mapping[str, Tensor]:
        """Return the full masters by name at stage 0. At other stages return the weights, which callers do not use."""
        optimizer = self._ds.optimizer  # initialises DeepSpeed if necessary
        if self.stage > 0 or self.dtype == torch.float32:
            return self.trained
        masters = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
        master_of = {id(weight): master for weight, master in masters}
        return {name: master_of[id(weight)] for name, weight in self.trained.items()}

    # --- the engine's interface ---------------------------------------------------------------------------------------

    def micro_batches(self, items: Sequence[Continuations], forward: Forward) -> Iterator[tuple[Batch, float]]:
        # All ranks must run equally many forward passes. A rank with fewer batches repeats an item with weight 0.
        shares = balance_by_tokens(items, self.ranks.size)
        plans = [forward.plan([items[i] for i in share]) for share in shares]
        share, plan = shares[self.ranks.rank], plans[self.ranks.rank]
        batches = [[share[k] for k in chosen] for chosen in plan]
        shortest = min(range(len(items)), key=lambda i: items[i].tokens)
        count = max(map(len, plans))
        for k in range(count):
            self._ds.set_gradient_accumulation_boundary(k == count - 1)
            chosen, weight = (batches[k], 1.0) if k < len(batches) else ([shortest], 0.0)
            yield collate(items, forward.layout, chosen), weight

    def logps(self, batch: Batch, forward: Forward) -> Tensor:
        return self._ds(batch.to(self.device), forward)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks, and skips a step whose gradients are not finite.
        scale = self.ranks.size if loss.isfinite() else math.nan
        self._ds.backward(loss * scale)

    def step(self, lr: float | None) -> float:  # if `lr` is None, gradients are not finite: see `backward`
        norm = None
        if self.stage == 0 and self.dtype == torch.float32:  # DeepSpeed does not check the norm
            grads = [weight.grad for weight in self.trained.values() if weight.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads, foreach=False).item()
            if not math.isfinite(norm):
                self._ds.zero_grad()
                return norm
        for group in self._ds.optimizer.param_groups:
            group["lr"] = 0.0 if lr is None else lr
        self._ds.step()
        if not self._ds.was_step_applied():
            return math.nan
        assert lr is not None, "a step with non-finite gradients was applied"
        self.updates += 1
        return float(self._ds.get_global_grad_norm()) if norm is None else norm

    def save(self, folder: Path) -> None:
        masters = self._gather_masters()
        if self.ranks.is_main_process:
            save_model(self.model, {**self.buffers, **masters}, self.policy, folder)

    def save_state(self, folder: Path) -> None:
        masters = self._gather_masters()
        if self.ranks.is_main_process:
            save_file(masters, folder / MASTERS)
        del masters
        states: dict[str, Tensor] = {}
        parts = self._parts()
        saved = [part.detach().clone() for part in parts]
        for state in STATES[self.config.name]:  # gathered like masters (see `_set_state`)
            for part in parts:
                part.data.copy_(self.optimizer.state[part][state])
            states |= {f"{state}.{name}": value.view(-1) for name, value in self._gather_masters().items()}
        for part, value in zip(parts, saved, strict=True):
            part.data.copy_(value)
        if self.ranks.is_main_process:
            save_file(states, folder / OPTIMIZER, {"updates": str(self.updates)})

    def load_state(self, folder: Path) -> None:
        """Resume from a checkpoint of any number of ranks. Must be called before the engine's first use."""
        assert self._initialized is None and not self._closed
        self._checkpoint = folder

    def close(self) -> None:
        ds, self._initialized, self._closed = self._initialized, None, True
        if ds is None:
            return
        from deepspeed.runtime.zero import parameter_offload

        ds.destroy()
        # Its module stack, hooks and caches would hold weights, gradients and states until the process ends.
        parameter_offload.FWD_MODULE_STACK.clear()
        for holder in (ds.optimizer, self.optimizer, *self.model.parameters()):
            vars(holder).clear()
        for weight in self.model.parameters():
            weight.data, weight.grad = weight.new_empty(0), None
