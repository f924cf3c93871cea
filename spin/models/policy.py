"""A policy: a model folder on disk, identified by a hash of its content."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from spin.models.files import file_sha256, read_json_object
from spin.runtime.artifacts import MANIFEST
from spin.runtime.errors import explaining

ADAPTER_CONFIG = "adapter_config.json"  # the file names of PEFT
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BASE = "base.json"  # ours, beside an adapter: where its base comes from, and the base's content hash
TRAINED_ON = "trained_on.json"  # in a trained policy's folder: hashes of its training prompts

# The PEFT settings that determine the function computed by given adapter weights.
FUNCTION_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")


@dataclass(frozen=True)
class Policy:
    """A causal language model on disk.

    `label` names it in output ("start", "sft", "iter0", ...); `id` is a hash of its content (`content_id`). If `folder`
    holds a LoRA adapter, `base` is the model that it extends. `quantization` of a model without a base names the
    format that its linear layers are rounded to when it is loaded ("nf4").
    """

    label: str
    folder: Path
    id: str
    base: "Policy | None" = None
    quantization: str | None = None

    @property
    def base_or_self(self) -> "Policy":
        """The full model: the base of an adapter, otherwise this policy."""
        return self.base or self

    def folder_with(self, name: str) -> Path:
        """The folder to read the file `name` from: this policy's, or its base's if the file is missing here."""
        return self.folder if (self.folder / name).is_file() else self.base_or_self.folder

    @property
    def tokenizer(self) -> Path:
        """The folder to load the tokenizer from."""
        return self.folder_with("tokenizer_config.json")


def with_quantization(policy: Policy, quantization: str) -> Policy:
    """`policy`, a full model, with its linear layers rounded on loading. This is another model, with another id."""
    if quantization == "none":
        return policy
    identity = hashlib.sha256(f"{policy.id} {quantization}".encode()).hexdigest()
    return replace(policy, id=identity, quantization=quantization)


def weight_files(folder: Path) -> list[Path]:
    """The weight files that `from_pretrained` may read."""
    paths = sorted(folder.glob("*.safetensors"))
    return [path for path in paths if path.is_file() and not path.name.startswith("consolidated")]


def content_id(folder: Path, base: Policy | None = None) -> str:
    """A hash of the weights and the architecture that does not depend on where the folder is.

    With `base`, `folder` holds an adapter, and the hash covers the base's id too.
    """
    if base is not None:
        settings = read_json_object(folder / ADAPTER_CONFIG, str(folder))
        described = [base.id, {key: settings.get(key) for key in FUNCTION_SETTINGS}]
        return _digest(described, [folder / ADAPTER_WEIGHTS])
    architecture = json.loads((folder / "config.json").read_text("utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        architecture.pop(volatile, None)
    return _digest(architecture, weight_files(folder))


def _digest(description: object, files: list[Path]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for path in files:
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def trained_on(folder: Path) -> set[str]:
    """Hashes (`Example.opening`) of the prompts that a policy of spin, and the policies before it, were trained on."""
    path = folder / TRAINED_ON
    with explaining(f"{path} cannot be read", "remove it, or copy the policy from its run again"):
        return set(json.loads(path.read_bytes())) if path.is_file() else set()


def note_trained_on(folder: Path, prompts: set[str]) -> None:
    """Write the file that `trained_on` reads."""
    (folder / TRAINED_ON).write_text(json.dumps(sorted(prompts)) + "\n")


def auxiliary_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer and chat template: the files that are copied from a model to each policy trained from it."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in (".json", ".jinja", ".model", ".txt")
        and not path.name.endswith(".index.json")
        and path.name not in (MANIFEST, ADAPTER_CONFIG, ADAPTER_BASE)  # these describe the weights
    ]


def copy_auxiliary_files(source: Policy, folder: Path) -> None:
    for path in auxiliary_files(source.tokenizer):
        shutil.copyfile(path, folder / path.name)


def auxiliary_digest(folder: Path) -> str:
    """A hash of the names and contents of `auxiliary_files`."""
    lines = [f"{path.name}\0{file_sha256(path)}\0" for path in auxiliary_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
