"""Save policies as Hugging Face folders."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from spin.models import adapters
from spin.models.load import load_model, quiet_transformers, saved_buffers
from spin.models.policy import Policy, copy_auxiliary_files


def save_model(model: PreTrainedModel, weights: Mapping[str, Tensor], source: Policy, folder: Path) -> None:
    """Write `weights` (by parameter or buffer name) with the model's architecture, and the tokenizer files of `source`;
    of an adapter its own weights alone."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_auxiliary_files(source, folder)
    if source.base is not None:
        (folder / "config.json").unlink(missing_ok=True)  # with one, transformers would look for a whole model
        adapters.copy_settings(source.folder, folder)
        return adapters.write_weights(weights, folder)
    with plain_saving():
        model.save_pretrained(folder, state_dict={name: weight.cpu() for name, weight in weights.items()})
    # The weights are the masters: the config must not claim the type that the model computes in.
    architecture = json.loads((folder / "config.json").read_text())
    architecture["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n")


def save_merged(policy: Policy, folder: Path) -> None:
    """Write an adapter put into its base as a whole fp32 model folder: W + (alpha / rank) B A in place of each W.

    A quantised base is taken as it was trained beside: rounded, then widened to fp32. Computed on the CPU.
    """
    whole, cpu = policy.base_or_self, torch.device("cpu")
    model = load_model(whole.folder, torch.float32, cpu, whole.quantization)
    if whole.quantization:
        with quiet_transformers():
            model = model.dequantize()
        model.config.quantization_config = None
    merged = adapters.merge_adapter(adapters.attach_adapter(model, policy.folder))
    save_model(
        merged,
        {**saved_buffers(merged), **dict(merged.named_parameters())},
        replace(whole, folder=policy.tokenizer),
        folder,
    )


@contextlib.contextmanager
def plain_saving():
    """`save_pretrained` as it is for a plain model, quiet: it would leave the writing to rank 0 of all processes, and import
    DeepSpeed, where it is installed, to see whether the model is wrapped in its engine."""
    plain: list[tuple[Any, str, Any]] = [
        (PreTrainedModel, "should_save_on_this_rank", lambda self, is_main_process: True),
        (transformers.modeling_utils, "unwrap_model", lambda model, recursive=False: model),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        for owner, name, ours in plain:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ours)
        yield
