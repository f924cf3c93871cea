"""Check a model folder before loading anything from it. No code in the folder is run."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from spin.models.files import read_json_object, safetensors_shapes
from spin.models.policy import ADAPTER_CONFIG, weight_files
from spin.runtime.bounded import SECONDS, try_out
from spin.runtime.errors import UserError, brief, explaining

INDEX = "model.safetensors.index.json"
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # names of the number of layers in config.json
Shapes = Mapping[str, list[int]]


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError, starting with `name`, unless a causal LM can be loaded from `folder`."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{name}: a LoRA adapter, not a full model; merge it into its base first.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name}: no *.safetensors weights in it; convert them first (pickled weights are not read).")
    settings = read_json_object(folder / "config.json", name)
    if kernel := hub_kernel(settings):
        raise UserError(
            f"{name}: its config.json names {brief(kernel)}, code from the hub, which is not run; remove *_implementation."
        )
    shapes = check_weights(folder, settings, name)
    with suppress(Exception):  # import transformers' code here, not in each child process
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING[transformers.CONFIG_MAPPING[settings["model_type"]]]
    check = partial(check_architecture, folder, settings, shapes, name)
    try_out(check, f"{name}: no model can be built from its config.json", seconds=SECONDS + len(shapes) / 1000)


def check_architecture(folder: Path, settings: Mapping[str, Any], shapes: Shapes, name: str) -> None:
    """Raise UserError unless a causal LM can be built from the configuration and matches `shapes`.

    Sizes in the configuration are arbitrary, so run this with limits on time and memory.
    """
    for key in LAYERS:  # detect a common error without building the model
        if isinstance(settings.get(key), int) and settings[key] > len(shapes):
            sizes = f"{len(shapes)} tensors for {key}={settings[key]}"
            raise UserError(f"{name}: its weights do not match its config.json: {sizes}.")
    with explaining(f"{name}: its config.json cannot be used", "give an architecture that is built into transformers"):
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        is_causal = type(architecture) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(architecture, "quantization_config", None):
        raise UserError(f"{name}: its weights are quantized and cannot be trained; use the full-precision model.")
    if not is_causal:
        raise UserError(f"{name}: {brief(architecture.model_type)} is not a causal language model.")
    torch.set_num_threads(1)  # a forked child lacks the threads of the parent's pool
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
    for key, weight in sorted(model.state_dict().items()):
        if key in shapes and weight.numel() != prod(shapes[key]):  # loading may transpose
            sizes = f"{brief(key)} is {shapes[key]}, not {list(weight.shape)}"
            raise UserError(f"{name}: its weights do not match its config.json: {sizes}.")
    needed, stored = sum(weight.numel() for weight in model.parameters()), sum(map(prod, shapes.values()))
    if needed > 2 * stored:  # otherwise loading has enough memory, and names the missing ones
        raise UserError(f"{name}: its config.json needs {needed:,} weights, but its files hold {stored:,}.")


def hub_kernel(settings: dict[str, Any]) -> str | None:
    """Return a hub name in an `*_implementation` setting, from which transformers would load native code, or None."""
    pending: list[tuple[str, Any]] = [("", settings)]  # not recursive, since it may be nested too deeply
    while pending:
        key, value = pending.pop()
        if isinstance(value, str) and "/" in value and "_implementation" in key:
            return value
        if isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, dict):
            pending += [(key if "_implementation" in key else name, item) for name, item in value.items()]
    return None


def check_weights(folder: Path, settings: Mapping[str, Any], name: str) -> dict[str, list[int]]:
    """Return the shapes of all weights by name.

    Raises UserError unless all files that `from_pretrained` will read are complete and included in `content_id`.
    """
    files = {path.name: path for path in weight_files(folder)}
    default = "model.safetensors" if "model.safetensors" in files else INDEX
    entry = settings.get("transformers_weights") or default
    shards = [str(entry)]
    if entry == INDEX:
        index = read_json_object(folder / INDEX, name)
        with explaining(f"{name}: its {INDEX} has no weight_map", "download it again"):
            shards = sorted(set(map(str, index["weight_map"].values())))
    if missing := [shard for shard in shards if shard not in files]:
        raise UserError(f"{name}: its weights are incomplete: {brief(', '.join(missing))} is not in the folder.")
    return {key: shape for path in files.values() for key, shape in safetensors_shapes(path, name).items()}
