"""Check a model folder before anything is loaded from it. No code in the folder is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from spin.models.files import read_json_object, safetensors_keys
from spin.models.policy import ADAPTER_CONFIG, weight_files
from spin.runtime.errors import UserError, brief

INDEX = "model.safetensors.index.json"


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError, starting with `name`, unless a causal LM can be loaded from `folder`."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{name}: a LoRA adapter, not a full model; merge it into its base first.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: there is no config.json in it, so it is not a Hugging Face model folder.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name}: no *.safetensors weights in it; convert them first (pickled weights are not read).")
    settings = read_json_object(folder / "config.json", name)
    if kernel := hub_kernel(settings):
        raise UserError(
            f"{name}: its config.json names {brief(kernel)}, code from the hub, which is not run; remove *_implementation."
        )
    check_weights(folder, settings, name)
    try:
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        is_causal = type(architecture) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    except Exception as error:  # a damaged config can raise anything
        reason = f"cannot be used: {brief(error, 300)}"
        if "trust_remote_code" in str(error):
            reason = "needs Python code of its own (auto_map), which is not run; use a model built into transformers."
        raise UserError(f"{name}: its config.json {reason}") from error
    if getattr(architecture, "quantization_config", None):
        raise UserError(f"{name}: its weights are quantized and cannot be trained; use the full-precision model.")
    if not is_causal:
        raise UserError(f"{name}: {brief(architecture.model_type)} is not a causal language model.")


def hub_kernel(settings: dict[str, Any]) -> str | None:
    """The first hub name in an `*_implementation` setting: transformers would load native code from there."""
    pending: list[Any] = [settings]  # not recursive: a config may be nested deeper than Python's stack
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            for key, value in part.items():
                choices = value.values() if isinstance(value, dict) else [value]
                names = [choice for choice in choices if isinstance(choice, str) and "/" in choice]
                if names and key.removesuffix("_internal").endswith("_implementation"):
                    return names[0]
        pending += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return None


def check_weights(folder: Path, settings: Mapping[str, Any], name: str) -> None:
    """Raise UserError unless all files that `from_pretrained` will read are present, complete and covered by `content_id`."""
    files = {path.name: path for path in weight_files(folder)}
    default = "model.safetensors" if "model.safetensors" in files else INDEX
    entry = settings.get("transformers_weights") or default
    shards = [str(entry)]
    if entry == INDEX:
        if not (folder / INDEX).is_file():
            raise UserError(f"{name}: contains neither model.safetensors nor {INDEX}, so there are no weights to load.")
        index = read_json_object(folder / INDEX, name)
        if not isinstance(index.get("weight_map"), dict) or not isinstance(index.get("metadata"), dict):
            raise UserError(f"{name}: its {INDEX} has no weight_map or no metadata; download it again.")
        shards = list(dict.fromkeys(map(str, index["weight_map"].values())))
    if missing := [shard for shard in shards if shard not in files]:
        raise UserError(f"{name}: its weights are incomplete: {brief(', '.join(missing))} is not in the folder.")
    for path in files.values():
        safetensors_keys(path, name)
