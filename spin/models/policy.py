"""A policy: a model folder on disk, identified by a hash of its content."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin.models.files import file_sha256, read_json_object
from spin.runtime.artifacts import MANIFEST
from spin.runtime.errors import explaining

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's file names
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BASE = "base.json"  # not PEFT's: location and content hash of an adapter's base, beside the adapter
AUXILIARY = (".json", ".jinja", ".model", ".txt")
TRAINED_ON = "trained_on.json"  # in a trained policy's folder: hashes of its training prompts

# The PEFT settings that determine the function computed by given adapter weights.
FUNCTION_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")


@dataclass(frozen=True)
class Policy:
    """A causal language model on disk."""

    label: str  # its name in output: "start", "sft", "iter0", ...
    folder: Path
    id: str  # a hash of its content, see `content_id`
    base: "Policy | None" = None  # the model that the LoRA adapter in `folder` extends
    quantization: str | None = None  # the format of its linear layers once loaded ("nf4")

    @property
    def base_or_self(self) -> "Policy":
        """The base if this is an adapter, otherwise this policy."""
        return self.base or self

    def folder_with(self, name: str) -> Path:
        """Return this policy's folder, or its base's if the file `name` is missing in it."""
        return self.folder if (self.folder / name).is_file() else self.base_or_self.folder

    @property
    def tokenizer(self) -> Path:
        """The folder to load the tokenizer from."""
        return self.folder_with("tokenizer_config.json")


def with_quantization(policy: Policy, quantization: str) -> Policy:
    """Return the full model `policy` with its layers quantized on loading: a different model, with a different id."""
    if quantization == "none":
        return policy
    identity = hashlib.sha256(f"{policy.id} {quantization}".encode()).hexdigest()
    return replace(policy, id=identity, quantization=quantization)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that `from_pretrained` may read."""
    paths = sorted(folder.glob("*.safetensors"))
    return [path for path in paths if path.is_file() and not path.name.startswith("consolidated")]


def content_id(folder: Path, base: Policy | None = None) -> str:
    """Return a hash of weights and architecture; for an adapter of `base`, of weights, settings and the base's id."""
    description: Any
    if base is not None:
        settings = read_json_object(folder / ADAPTER_CONFIG, str(folder))
        description = [base.id, {key: settings.get(key) for key in FUNCTION_SETTINGS}]
        files = [folder / ADAPTER_WEIGHTS]
    else:
        description = json.loads((folder / "config.json").read_text("utf-8"))
        for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            description.pop(volatile, None)
        files = weight_files(folder)
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for path in files:
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def trained_on(folder: Path) -> set[str]:
    """Return the hashes (`Example.opening`) of the prompts that a policy was trained on."""
    path = folder / TRAINED_ON
    with explaining(f"{path} cannot be read", "remove it, or copy the policy from its run again"):
        return set(json.loads(path.read_bytes())) if path.is_file() else set()


def note_trained_on(folder: Path, prompts: set[str]) -> None:
    """Write the file that `trained_on` reads."""
    (folder / TRAINED_ON).write_text(json.dumps(sorted(prompts)) + "\n")


def auxiliary_files(folder: Path) -> list[Path]:
    """Return the configuration, tokenizer and chat template files, which trained policies share with their model."""
    excluded = {folder / name for name in (MANIFEST, ADAPTER_CONFIG, ADAPTER_BASE)}
    excluded |= {*folder.glob("*.index.json")}  # these describe the weights, too
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in AUXILIARY]
    return [path for path in paths if path.is_file() and path not in excluded]


def copy_auxiliary_files(source: Policy, folder: Path) -> None:
    for path in auxiliary_files(source.tokenizer):
        shutil.copyfile(path, folder / path.name)


def auxiliary_digest(folder: Path) -> str:
    """Return a hash of the names and contents of `auxiliary_files`."""
    lines = [f"{path.name}\0{file_sha256(path)}\0" for path in auxiliary_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
