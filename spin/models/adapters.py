"""LoRA adapters (Hu et al., arXiv 2106.09685), read and written in PEFT's format.

An adapted linear layer W x becomes W x + (alpha / rank) B A x. Only A and B are trained, starting with B = 0, so a
fresh adapter does not change the model. PEFT builds the layers and is imported only if needed.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spin.models.files import safetensors_shapes
from spin.models.policy import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, FUNCTION_SETTINGS, Policy, content_id
from spin.models.quantization import import_bitsandbytes
from spin.runtime.errors import UserError, brief, explaining
from spin.runtime.random import seed_of

PREFIX = "base_model.model."  # of weight names in PEFT's files

# Settings that may have any value; all others must have PEFT's default.
ACCEPTED_SETTINGS = (
    *FUNCTION_SETTINGS,
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "lora_dropout",  # off in evaluation mode
)


@dataclass(frozen=True)
class Lora:
    """Settings of a fresh adapter."""

    rank: int
    alpha: int
    targets: str | list[str]  # layer names, or "all-linear" for all but the output layer


def _peft() -> Any:
    import_bitsandbytes()  # before peft, which imports it
    import peft

    return peft


def check_adapter(folder: Path, settings: dict[str, Any], name: str) -> None:
    """Raise UserError, starting with `name`, unless `folder` contains a trainable LoRA adapter."""
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{name}: an adapter of type {brief(settings.get('peft_type'))}; only LoRA can be used.")
    defaults = _as_json(_peft().LoraConfig())
    accepted = {**defaults, **{key: settings.get(key) for key in ACCEPTED_SETTINGS}}
    if settings.get("init_lora_weights") == "gaussian":  # other methods change the base's weights
        accepted["init_lora_weights"] = "gaussian"
    unsupported = [f"{key}={value}" for key, value in settings.items() if value and value != accepted.get(key)]
    if unsupported:
        raise UserError(
            f"{name}: a LoRA adapter with {brief(', '.join(unsupported))}, which cannot be used; merge it into its base "
            "(PEFT's merge_and_unload)."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{name}: an adapter without {ADAPTER_WEIGHTS} (pickled weights are not read).")
    safetensors_shapes(folder / ADAPTER_WEIGHTS, name)  # raises UserError if it is broken


def attach_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Attach the adapter in `folder` to its base `model`, in the model's dtype. Raises UserError if it does not fit.

    Does not use the random number generator.
    """
    weights = {name: weight.to(model.dtype) for name, weight in read_weights(folder, model.device).items()}
    with explaining(f"{folder}: this adapter does not fit its base"):
        _add_layers(model, _peft().LoraConfig.from_pretrained(str(folder)))
        missing, unmatched = model.load_state_dict(weights, strict=False, assign=True)
    if unmatched := [*unmatched, *(name for name in missing if ".lora_" in name)]:
        raise UserError(
            f"{folder}: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} differ in {brief(unmatched[0])}: "
            "the folder is incomplete, or holds weights that are not LoRA matrices."
        )
    return model.eval().requires_grad_(False)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model` with the adapter in `folder` added to its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads a deprecated attribute of transformers
        attached = _peft().PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return attached.merge_and_unload(safe_merge=True)


def _add_layers(model: PreTrainedModel, config: Any) -> None:
    """Add the adapter layers of a PEFT `config` to `model`, with weights on the meta device."""
    peft = _peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Conv1D and fan_in_fan_out, which PEFT corrects itself
        peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer) for layer in embeddings):
        # The log-probs are computed from the output layer's weight, which is often tied to the embeddings.
        raise UserError("embeddings and the output layer cannot be adapted: remove them from the target modules.")


def read_weights(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Return an adapter's weights in fp32, keyed by their names in the model.

    'base_model.model.layer.lora_A.weight' in the file is 'layer.lora_A.default.weight' in the model.
    """
    return {
        key.removeprefix(PREFIX).removesuffix(".weight") + ".default.weight": weight.to(device, torch.float32)
        for key, weight in sorted(load_file(folder / ADAPTER_WEIGHTS).items())
    }


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter weights among `weights`, which are keyed by their names in the model, in PEFT's format."""
    tensors = {
        PREFIX + name.replace(".default.weight", ".weight"): weight.cpu().contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def write_fresh_adapter(base: Path, lora: Lora, seed: int, origin: dict[str, Any], folder: Path) -> None:
    """Write an adapter that does not change the model yet: A is uniform as in torch.nn.Linear, and B is zero.

    Each matrix A has its own random stream, from `seed` and its name. PEFT finds the base by the settings in `origin`.
    """
    model, config = empty_model(base, lora)
    weights = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            bound = 1 / math.sqrt(parameter.shape[1])
            weights[name] = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
        elif ".lora_B." in name:
            weights[name] = torch.zeros(parameter.shape)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights, folder)
    settings = _as_json(config) | origin | {"inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_base_record(base: Policy, origin: dict, folder: Path) -> None:
    """Write the content hash of an adapter's base and `origin`, the settings that locate it."""
    content = base.id if base.quantization is None else content_id(base.folder)
    record = {"content": content, "quantization": base.quantization, "model": origin}
    (folder / ADAPTER_BASE).write_text(json.dumps(record, indent=2) + "\n")


def empty_model(base: Path, lora: Lora) -> tuple[PreTrainedModel, Any]:
    """Return the model in `base` with a fresh adapter, on the meta device, and PEFT's settings for the adapter.

    Raises UserError if the model does not have the targets.
    """
    model = without_weights(base)
    config = _peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with explaining(f"model.lora_targets={lora.targets} does not fit this model"):
        _add_layers(model, config)
    return model, config


def without_weights(folder: Path) -> PreTrainedModel:
    """Return the model in `folder` on the meta device, without reading its weights."""
    architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)


def largest_rank(folder: Path) -> int:
    """Return the largest rank of any matrix of an adapter, according to its settings."""
    settings = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    return max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 1)


def num_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters of the adapter attached to `model`."""
    return sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" in name)


def _as_json(config: Any) -> dict[str, Any]:
    """Return PEFT's settings as JSON values with sets sorted, so that equal settings give equal text."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))
