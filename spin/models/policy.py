"""A policy: a model folder on disk, and the hash of its content."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin.models import adapters
from spin.runtime.errors import UserError, brief

TRAINED_ON = "trained_on.json"  # in a policy's folder: hashes of the prompts that it was trained on
RECORD = "content.json"  # in a folder of the cache: what was in its files when they were written


@dataclass(frozen=True)
class Policy:
    """A model on disk: its label ("start", "sft", "iter0", ...), its folder, and a hash of its weights' content.

    Where the folder holds a LoRA adapter, `base` is the model that it belongs to. `quantization` of a whole model says
    what its linear layers are rounded to when it is loaded ("nf4").
    """

    label: str
    folder: Path
    id: str
    base: "Policy | None" = None
    quantization: str | None = None

    @property
    def base_or_self(self) -> "Policy":
        """The whole model that this one is, or that its adapter belongs to."""
        return self.base or self

    def folder_with(self, name: str) -> Path:
        """The folder with the file `name` that goes with the weights: an adapter that comes without it has its base's."""
        return self.folder if (self.folder / name).is_file() else self.base_or_self.folder

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer and what goes with it."""
        return self.folder_with("tokenizer_config.json")


def with_quantization(policy: Policy, quantization: str) -> Policy:
    """The whole model `policy` with its linear layers rounded: another model, whose identity says so."""
    if quantization == "none":
        return policy
    identity = hashlib.sha256(f"{policy.id} {quantization}".encode()).hexdigest()
    return replace(policy, id=identity, quantization=quantization)


def unquantized_id(policy: Policy) -> str:
    """The identity that a whole model has without quantisation."""
    return policy.id if policy.quantization is None else content_id(policy.folder)


def read_json_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the model folder that errors call `name`."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also bad UTF-8
        raise UserError(f"{name}: its {path.name} is not JSON that can be read ({brief(error)}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: its {path.name} holds no JSON object, but one {type(found).__name__}.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads the weights from."""
    return [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if path.is_file() and not path.name.startswith("consolidated")
    ]


def content_id(folder: Path, base: Policy | None = None) -> str:
    """A hash of the weights' content and the architecture: the same wherever the folder lies and whatever its name.

    With `base` the folder holds an adapter, and the hash covers both."""
    if base is not None:
        return adapters.adapter_content_id(folder, base.id)
    digest = hashlib.sha256()
    architecture = json.loads((folder / "config.json").read_text("utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        architecture.pop(volatile, None)
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def trained_on(folder: Path) -> set[str]:
    """Hashes (`Example.opening`) of the prompts that a policy of ours, or one that it came from, was trained on."""
    try:
        return set(json.loads((folder / TRAINED_ON).read_bytes()))
    except FileNotFoundError:
        return set()
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder / TRAINED_ON} can't be read: remove it, or take the policy from its run again."
        ) from error


def note_trained_on(folder: Path, prompts: set[str]) -> None:
    """Write what `trained_on` reads."""
    (folder / TRAINED_ON).write_text(json.dumps(sorted(prompts)) + "\n")


def auxiliary_files(folder: Path) -> list[Path]:
    """The files that go with a model's weights to every policy that is made of it: configuration, tokenizer, template."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in (".json", ".jinja", ".model", ".txt")
        and not path.name.endswith(".index.json")
        and path.name not in (RECORD, adapters.CONFIG, adapters.BASE)  # of other weights than these
    ]


def copy_auxiliary_files(source: Policy, folder: Path) -> None:
    for path in auxiliary_files(source.tokenizer):
        shutil.copyfile(path, folder / path.name)


def auxiliary_digest(folder: Path) -> str:
    """A hash of the files that `save_model` takes over from a model's folder."""
    digest = hashlib.sha256()
    for path in auxiliary_files(folder):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()
