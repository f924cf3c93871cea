"""Find the model that a run starts from: a local folder, a Hugging Face hub model, or an embedded model."""

from pathlib import Path

from spin.config.schema import ModelConfig
from spin.models import adapters
from spin.models.bundled import from_package, tiny_model
from spin.models.files import read_json_object
from spin.models.policy import ADAPTER_BASE, ADAPTER_CONFIG, Policy, content_id, copy_auxiliary_files, with_quantization
from spin.models.validate import check_folder
from spin.runtime.errors import UserError, brief, explaining

ORIGIN = ("path", "revision", "package", "package_sha256", "file", "file_sha256")  # the settings that locate a model


def find_model(config: ModelConfig, cache: Path) -> Policy:
    """Return the model that `config` names as a checked local folder, with its base if it is an adapter.

    Raises UserError if there is no such folder or hub model, weights are missing or broken, the configuration is
    unreadable or needs code from the model, the model is not a causal LM, or the base of an adapter cannot be found.
    """
    name = f"model.path={brief(config.path or config.name, 300)}"
    folder, identity = _locate(config, cache)
    if (folder / ADAPTER_CONFIG).is_file():
        base = _find_base(folder, name, config, cache)
        adapters.attach_adapter(adapters.without_weights(base.folder), folder)  # on the meta device, as a check
        return Policy("start", folder, content_id(folder, base), base)
    check_folder(folder, name)
    return with_quantization(Policy("start", folder, identity or content_id(folder)), config.quantization)


def _locate(config: ModelConfig, cache: Path) -> tuple[Path, str | None]:
    """Return the local folder of a model, and its `content_id` if that is already known."""
    if config.path is None:
        return from_package(config, cache)
    if config.path == "builtin:tiny":
        return tiny_model(cache)
    return _local_folder(config.path) or _download(config.path, config.revision), None


def _find_base(folder: Path, name: str, config: ModelConfig, cache: Path) -> Policy:
    """Return the base of the adapter in `folder`, which PEFT's settings or ADAPTER_BASE locate.

    Raises UserError if there is none whose content hash equals the one in ADAPTER_BASE, if given.
    """
    settings = read_json_object(folder / ADAPTER_CONFIG, name)
    adapters.check_adapter(folder, settings, name)
    record = read_json_object(folder / ADAPTER_BASE, name) if (folder / ADAPTER_BASE).is_file() else {}
    stated = {"path": settings.get("base_model_name_or_path") or None, "revision": settings.get("revision")}
    recorded = {key: record.get("model", {}).get(key) for key in ORIGIN}
    problems = []
    for location in (ModelConfig.from_defaults(**stated), ModelConfig.from_defaults(**recorded)):
        if location.path is None and location.package is None:
            continue
        shown = brief(location.path or location.package, 300)
        try:
            base_folder, identity = _locate(location, cache)
            check_folder(base_folder, f"its base {shown}")
            identity = identity or content_id(base_folder)
            if record.get("content") not in (None, identity):
                raise UserError(f"{shown} holds other weights")
        except UserError as error:
            problems.append(str(error).removeprefix("model.path=").rstrip("."))
        else:
            quantization = record.get("quantization") or config.quantization
            return with_quantization(Policy("base", base_folder, identity), quantization)
    raise UserError(
        f"{name}: the base of this adapter cannot be found ({'; '.join(problems) or 'it names none'}): set "
        f"base_model_name_or_path in its {ADAPTER_CONFIG} to the base's folder or hub name."
    )


def fresh_adapter(start: Policy, lora: adapters.Lora, seed: int, config: ModelConfig, folder: Path) -> Policy:
    """Write a fresh adapter for `start`, the full model that `config` names, and return both as a policy."""
    origin = {key: getattr(config, key) for key in ORIGIN}
    stated = {"base_model_name_or_path": str(start.folder.resolve()), "revision": None}
    if config.path is not None and config.path != "builtin:tiny":
        if _local_folder(config.path) is None:  # a hub name
            stated = {"base_model_name_or_path": config.path, "revision": config.revision}
        else:
            origin["path"] = str(Path(config.path).expanduser().resolve())
    adapters.write_fresh_adapter(start.folder, lora, seed, stated, folder)
    adapters.write_base_record(start, origin, folder)
    copy_auxiliary_files(start, folder)
    (folder / "config.json").unlink()  # otherwise transformers would expect a full model
    return Policy(start.label, folder, content_id(folder, start), start)


def _local_folder(path: str) -> Path | None:
    try:
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # the name is too long, or a user's home does not exist
        raise UserError(f"model.path={brief(path, 300)}: cannot be read ({brief(error)}).") from error


def _download(path: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if path.startswith((".", "/", "~")):
        raise UserError(f"model.path={path}: no such folder.")
    with explaining(
        f"model.path={path}: no such folder, and the Hugging Face hub does not have it or cannot be reached",
        "check the name, model.revision, the licence on its hub page, the network and HF_HUB_OFFLINE",
    ):
        folder = snapshot_download(
            path,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"],
            ignore_patterns=["consolidated*", "original/*"],  # a second copy of the weights, in the publisher's format
        )
    return Path(folder)
