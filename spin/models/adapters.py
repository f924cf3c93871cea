"""LoRA adapters (Hu et al., arXiv 2106.09685): a frozen base and two thin matrices beside each of its linear layers.

W x becomes W x + (alpha / rank) B A x, of which A and B alone are trained. B starts at zero, so that a fresh adapter
changes nothing. The folder is peft's: `adapter_config.json` and `adapter_model.safetensors`; `base.json`, ours, says by
its content which model the adapter belongs to.
"""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spin.models.bitsandbytes import import_bitsandbytes
from spin.runtime.errors import UserError, brief, user_message
from spin.runtime.random import seed_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
PREFIX = "base_model.model."  # of a weight's name in a file of peft's

# What decides the function that an adapter's weights stand for. The rest of peft's settings must be as they are by default.
DECIDING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")
HARMLESS = (
    *DECIDING,
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "init_lora_weights", "loftq_config"),  # of the adapter's beginnings, or off in evaluation mode
)


@dataclass(frozen=True)
class Lora:
    """A fresh adapter: its rank, its alpha, and the names of the layers beside which it stands ("all-linear": all but the
    output layer)."""

    rank: int
    alpha: int
    targets: str | list[str]


def _peft() -> Any:
    import_bitsandbytes()  # peft does where it is installed
    import peft

    return peft


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def check_adapter(folder: Path, settings: dict[str, Any], name: str) -> None:
    """Raise UserError, beginning with `name`, unless `settings` and weights in `folder` are those of a LoRA adapter that
    can be trained on. No weight is read."""
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{name}: an adapter of the kind {brief(settings.get('peft_type'))}; only LoRA can be used.")
    usual = _plain(_peft().LoraConfig())
    odd = [key for key, value in settings.items() if key not in HARMLESS and value and value != usual.get(key)]
    start = settings.get("init_lora_weights", True)
    if odd or (isinstance(start, str) and start != "gaussian"):  # others change the base's weights
        what = brief(", ".join(sorted(odd)) or f"init_lora_weights={start}")
        raise UserError(
            f"{name}: a LoRA adapter with {what}, which can't be used; merge it into its base (peft's merge_and_unload)."
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{name}: an adapter without {WEIGHTS} (pickled weights are not read).")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name}: its {WEIGHTS} is broken ({brief(error)}); fetch or copy it again.") from error
    if strange := [key for key in keys if not _is_thin(key)]:
        raise UserError(f"{name}: its {WEIGHTS} holds more than LoRA matrices: {brief(strange[0])}.")


def _is_thin(key: str) -> bool:
    return key.startswith(PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight"))


def adapter_content_id(folder: Path, base: str) -> str:
    """A hash of an adapter's weights, of what turns them into a function, and of its base's content hash."""
    settings = json.loads((folder / CONFIG).read_text("utf-8"))
    digest = hashlib.sha256(json.dumps([base, {key: settings.get(key) for key in DECIDING}], sort_keys=True).encode())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def attach_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put the adapter in `folder` beside the layers of `model`, its base, in the type that this computes in.

    Uses no random state. Raises UserError if the adapter was not made for such a model.
    """
    try:
        _inject(model, _peft().LoraConfig.from_pretrained(str(folder)))
    except Exception as error:  # a library reads a user's file: whatever it raises is about it
        if user_message(error) is not None:
            raise
        raise UserError(f"{folder}: this adapter does not fit its base ({brief(error, 300)}).") from error
    slots = {name: weight for name, weight in model.named_parameters() if ".lora_" in name}
    found = read_weights(folder, model.device)
    if missing := slots.keys() ^ found.keys():
        raise UserError(f"{folder}: {CONFIG} and {WEIGHTS} differ in {brief(min(missing))}: the folder is not whole.")
    for name, slot in slots.items():
        if slot.shape != found[name].shape:
            raise UserError(
                f"{folder}: this adapter does not fit its base: {name} is {list(found[name].shape)}, not {list(slot.shape)}."
            )
        owner, _, leaf = name.rpartition(".")
        weight = torch.nn.Parameter(found[name].to(model.dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, weight)
    return model.eval()


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with its adapter added to the weights of its layers, which are plain layers again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer):
            module.merge(safe_merge=True)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, module.get_base_layer())
    vars(model).pop("peft_config", None)
    return model


def _inject(model: PreTrainedModel, config: Any) -> None:
    """Layers of `config` into `model`, their weights still on the meta device."""
    peft = _peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D and fan_in_fan_out, which peft sets right by itself
        peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    layers = peft.tuners.tuners_utils.BaseTunerLayer, peft.tuners.lora.Embedding
    if any(isinstance(end, layers[0]) for end in ends) or any(isinstance(m, layers[1]) for m in model.modules()):
        # Our log-probs read the output layer's own weight, which with many models is that of the embeddings.
        raise UserError(
            "adapters of embeddings or the output layer can't be used: leave them out of the target modules."
        )


def read_weights(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """An adapter's weights by the names that they have in the model, as they are on the disk but for their type: fp32."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {_name(key): file.get_tensor(key).to(device, torch.float32) for key in file.keys()}


def _name(key: str) -> str:
    """'base_model.model.layer.lora_A.weight' in a file is 'layer.lora_A.default.weight' in the model."""
    return key.removeprefix(PREFIX).removesuffix(".weight") + ".default.weight"


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter's weights, by their names in the model, as peft does; those of other names are the base's."""
    ours = {name: weight for name, weight in weights.items() if ".lora_" in name}
    tensors = {PREFIX + name.replace(".default.weight", ".weight"): w.cpu().contiguous() for name, w in ours.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def copy_settings(source: Path, folder: Path) -> None:
    """Take over what `source` says of its adapter and of its base."""
    for name in (CONFIG, BASE):
        shutil.copyfile(source / name, folder / name)


def write_fresh_adapter(
    base: Path, lora: Lora, seed: int, named: dict[str, Any], about: dict[str, Any], folder: Path
) -> None:
    """Write an adapter that changes nothing yet: A uniform as in torch.nn.Linear, each matrix with random numbers of its
    own made of `seed` and its name, and B zero.

    `named`: what peft finds the base by; `about`: what we find it by (`base.json`).
    """
    model, config = empty_model(base, lora)
    weights = {}
    for name, slot in model.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            bound = 1 / math.sqrt(slot.shape[1])
            weights[name] = (torch.rand(slot.shape, generator=generator) * 2 - 1) * bound
        elif ".lora_B." in name:
            weights[name] = torch.zeros(slot.shape)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights, folder)
    settings = _plain(config) | named | {"inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / BASE).write_text(json.dumps(about, indent=2) + "\n")


def empty_model(base: Path, lora: Lora) -> tuple[PreTrainedModel, Any]:
    """The model in `base` with a fresh adapter, without memory for any weight, and peft's settings.

    Raises UserError for targets that the model does not have.
    """
    architecture = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
    return model, insert_adapter(model, lora)


def insert_adapter(model: PreTrainedModel, lora: Lora) -> Any:
    """Put a fresh adapter, whose weights are on the meta device, beside the layers of `model`. Returns peft's settings."""
    config = _peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    head = model.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part) and part is not head}
    try:
        _inject(model, config)
    except UserError as error:
        raise UserError(f"model.lora_targets={lora.targets}: {error}") from error
    except ValueError as error:
        raise UserError(
            f"model.lora_targets={lora.targets}: {brief(error)}; the model's linear layers are {', '.join(sorted(linear))}."
        ) from error
    return config


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def largest_rank(folder: Path) -> int:
    """The largest rank of the matrices of an adapter, as written in its settings."""
    settings = json.loads((folder / CONFIG).read_text("utf-8"))
    return max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 1)


def num_parameters(model: PreTrainedModel) -> int:
    """How many numbers the adapter of a model has."""
    return sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" in name)


def _plain(config: Any) -> dict[str, Any]:
    """peft's settings as JSON, equal for equal ones: sets have no order of their own."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, Iterable) and not isinstance(value, str):
            return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else [plain(part) for part in value]
        return value

    return plain(config.to_dict())
