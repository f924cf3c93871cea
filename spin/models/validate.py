"""Checks of a model folder before anything is loaded from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from spin.models import adapters
from spin.models.policy import read_json_object, weight_files
from spin.runtime.errors import UserError, brief

INDEX = "model.safetensors.index.json"


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError, beginning with `name`, for a folder that no causal LM can be loaded from; no code of it is run."""
    if adapters.is_adapter(folder):
        raise UserError(f"{name}: a LoRA adapter, not a whole model; give one that is merged into its base.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: there is no config.json in it, so it is not a Hugging Face model folder.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name}: no *.safetensors weights in it; convert them first (pickled weights are not read).")
    settings = read_json_object(folder / "config.json", name)
    if kernel := hub_kernel(settings):
        raise UserError(
            f"{name}: its config.json asks for {brief(kernel)}, code from the hub, which is not run; "
            "take *_implementation out of it."
        )
    check_weights(folder, settings, name)
    try:
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        is_known = type(architecture) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    except Exception as error:  # a library reads a user's file: whatever it raises is about it
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name}: its architecture is Python code of its own (auto_map in config.json), which is not run; "
                "give a model that transformers itself knows."
            ) from error
        raise UserError(f"{name}: its config.json can't be used: {brief(error, 300)}") from error
    if getattr(architecture, "quantization_config", None):
        raise UserError(f"{name}: its weights are quantised and can't be trained; give the full-precision model.")
    if not is_known:
        raise UserError(f"{name}: {brief(architecture.model_type)} is no causal language model.")


def hub_kernel(settings: dict[str, Any]) -> str | None:
    """A hub name that a configuration gives for its attention or experts: transformers would load native code there."""
    pending: list[Any] = [settings]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            for key, value in part.items():
                texts = value.values() if isinstance(value, dict) else [value]
                names = [text for text in texts if isinstance(text, str) and "/" in text]
                if names and key.removesuffix("_internal").endswith("_implementation"):
                    return names[0]
        pending += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return None


def check_weights(folder: Path, settings: Mapping[str, Any], name: str) -> None:
    """Raise UserError unless the files that `from_pretrained` will read are here, whole, and part of `content_id`."""
    files = {path.name: path for path in weight_files(folder)}
    default = "model.safetensors" if "model.safetensors" in files else INDEX
    entry = settings.get("transformers_weights") or default
    shards = [str(entry)]
    if entry == INDEX:
        if not (folder / INDEX).is_file():
            raise UserError(f"{name}: neither model.safetensors nor {INDEX} is in it, so its weights can't be found.")
        index = read_json_object(folder / INDEX, name)
        if not isinstance(index.get("weight_map"), dict) or not isinstance(index.get("metadata"), dict):
            raise UserError(f"{name}: its {INDEX} has no weight_map or no metadata; fetch it again.")
        shards = list(dict.fromkeys(map(str, index["weight_map"].values())))
    if missing := [shard for shard in shards if shard not in files]:
        raise UserError(f"{name}: its weights are not whole: {brief(', '.join(missing))} is not in the folder.")
    for path in files.values():
        try:
            with safe_open(path, "pt"):  # reads the header, and whether the file is as long as that says
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{name}: its {brief(path.name)} is broken ({brief(error)}); fetch or copy it again."
            ) from error
