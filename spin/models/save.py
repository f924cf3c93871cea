"""Save policies as Hugging Face folders."""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from spin.models import adapters
from spin.models.load import load_model, quiet_transformers, saved_buffers
from spin.models.policy import ADAPTER_BASE, ADAPTER_CONFIG, Policy, copy_auxiliary_files


def save_model(model: PreTrainedModel, weights: Mapping[str, Tensor], source: Policy, folder: Path) -> None:
    """Write `weights` (by parameter or buffer name), the model's architecture and the auxiliary files of `source`.

    If `source` is an adapter, write only the adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_auxiliary_files(source, folder)
    if source.base is not None:
        (folder / "config.json").unlink(missing_ok=True)  # otherwise transformers would expect a full model
        shutil.copyfile(source.folder / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
        if (source.folder / ADAPTER_BASE).is_file():
            shutil.copyfile(source.folder / ADAPTER_BASE, folder / ADAPTER_BASE)
        else:  # the adapter was saved by PEFT
            adapters.write_base_record(source.base, {"path": str(source.base.folder.resolve())}, folder)
        adapters.write_weights(weights, folder)
        return
    with plain_saving():
        model.save_pretrained(folder, state_dict={name: weight.cpu() for name, weight in weights.items()})
    # Record the type of the saved fp32 masters, not the type that the model computes in.
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_merged(policy: Policy, folder: Path) -> None:
    """Write an adapter merged into its base, W + (alpha / rank) B A for each W, as a full fp32 model.

    A quantized base is dequantized first, since the adapter was trained with the rounded weights. Runs on the CPU.
    """
    full = policy.base_or_self
    model = load_model(full.folder, torch.float32, torch.device("cpu"), full.quantization)
    if full.quantization:
        with quiet_transformers():
            model = model.dequantize()
        model.config.quantization_config = None
    model = adapters.merge_adapter(model, policy.folder)
    weights = {**saved_buffers(model), **dict(model.named_parameters())}
    save_model(model, weights, replace(full, folder=policy.tokenizer), folder)


def write_stop_ids(folder: Path, stop_ids: Collection[int]) -> None:
    """Make `generate` stop at `stop_ids` for the policy in `folder`, by editing its generation_config.json.

    If decoding is greedy by default, sampling settings without effect are removed, since transformers warns about them.
    """
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    stated = settings.get("eos_token_id")
    first = [token for token in (stated if isinstance(stated, list) else [stated]) if token in stop_ids]
    settings["eos_token_id"] = first + sorted(set(stop_ids) - set(first))
    ignored = () if settings.get("do_sample") else ("temperature", "top_p", "top_k", "min_p", "typical_p")
    for name in (*ignored, "_from_model_config"):  # with the last, settings in config.json would override these
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def plain_saving() -> Iterator[None]:
    """Make `save_pretrained` quiet, let it write on every rank, and prevent it from importing DeepSpeed.

    By default only rank 0 writes, and DeepSpeed is imported to unwrap the model, even one that is not wrapped.
    """
    model_class: Any = PreTrainedModel
    module: Any = transformers.modeling_utils
    should_save, unwrap = model_class.should_save_on_this_rank, module.unwrap_model
    model_class.should_save_on_this_rank = lambda self, is_main_process: True
    module.unwrap_model = lambda model, recursive=False: model
    try:
        with quiet_transformers():
            yield
    finally:
        model_class.should_save_on_this_rank = should_save
        module.unwrap_model = unwrap
