"""Load models, policies and tokenizers from local folders."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spin.models import adapters
from spin.models.files import read_json_object
from spin.models.policy import Policy
from spin.models.quantization import keep_gradients, quantized_loading
from spin.runtime.bounded import try_out
from spin.runtime.errors import UserError, brief, explaining

# To save a model, transformers imports DeepSpeed, if installed, which then logs that it did not find an accelerator.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> PreTrainedModel:
    """Load the model in `folder` in `dtype`, in evaluation mode (no dropout) and without gradients.

    `quantization` is described at `quantized_loading`. Raises UserError if the weights cannot be read or do not match
    the configuration, or if bitsandbytes is needed and not installed.
    """
    extra = {} if quantization is None else quantized_loading(quantization, dtype, device)
    with explaining(f"{folder}: no model can be loaded from it"), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,  # never a pickle, even if there is one
            ignore_mismatched_sizes=True,  # `_check_loading` reports them, with the sizes
            output_loading_info=True,
            **extra,
        )
    model, info = loaded
    _check_loading(folder, info)
    if quantization is not None:
        keep_gradients(model)
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


def _check_loading(folder: Path, info: dict[str, Any]) -> None:
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{folder}: its weights lack {brief(names)}: the folder is incomplete.")
    if info["mismatched_keys"]:
        name, actual, expected = min(info["mismatched_keys"])
        raise UserError(
            f"{folder}: its weights do not match its config.json: {brief(name)} is {list(actual)}, not {list(expected)}."
        )
    if unused := sorted(info["unexpected_keys"]):
        print(f"{folder}: the model does not use {len(unused)} weights: {brief(', '.join(unused))}", file=sys.stderr)


def load_policy(policy: Policy, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the model of a policy; for an adapter, its base with the adapter attached.

    Raises UserError as `load_model` does, and if a forward pass fails.
    """
    full = policy.base_or_self
    model = load_model(full.folder, dtype, device, full.quantization)
    problem, advice = f"{full.folder}: a forward pass fails", "a value in its config.json may be wrong"
    with explaining(problem, advice), torch.no_grad():  # many settings are first read here
        model(torch.zeros((1, 4), dtype=torch.long, device=device))
    return adapters.attach_adapter(model, policy.folder) if policy.base else model


def trained_parameters(model: PreTrainedModel, policy: Policy) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters of a loaded policy by name: those of its adapter, or all without one."""
    return {name: weight for name, weight in model.named_parameters() if not policy.base or ".lora_" in name}


def masters_of(policy: Policy, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the fp32 values of `trained_parameters`, and `saved_buffers`, both by name."""
    if policy.base:
        return adapters.read_weights(policy.folder, device), {}
    model = load_model(policy.folder, torch.float32, device)
    return {name: weight.data for name, weight in model.named_parameters()}, saved_buffers(model)


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the buffers in a model's state dict, by name (for example Gemma's layer scalars)."""
    names = dict(model.named_buffers())
    return {name: value for name, value in model.state_dict().items() if name in names}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`. Raises UserError if there is none, or it needs code from the folder."""
    load = partial(AutoTokenizer.from_pretrained, folder, trust_remote_code=False)

    def use() -> None:
        tokenizer = load()
        tokenizer.decode(tokenizer(["Hello, world.", "a"])["input_ids"][0] + tokenizer.all_special_ids)

    try_out(use, f"no tokenizer can be loaded from {folder}", "Python code in it is not run")
    return load()


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the token ids at which the model stops, from the tokenizer and the generation config."""
    path = folder / "generation_config.json"
    stated = read_json_object(path, str(folder)).get("eos_token_id") if path.is_file() else None
    stated = stated if isinstance(stated, list) else [stated]
    ids = [token for token in (tokenizer.eos_token_id, *stated) if token is not None]
    if not ids or not all(type(token) is int for token in ids):
        raise UserError(f"{folder}: its eos_token_id is {brief(ids)}, no token id; correct its generation_config.json.")
    return frozenset(ids)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and its table of mismatched weights, which `load_model` reports."""
    show_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_not_load_report)  # a higher level would make transformers print its sharding plan
    try:
        yield
    finally:
        logger.removeFilter(_is_not_load_report)
        if show_bars:
            transformers.utils.logging.enable_progress_bar()


def _is_not_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
