"""Load models and tokenizers."""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spin.models import adapters, bitsandbytes
from spin.models.policy import Policy, read_json_object
from spin.models.quantization import check_bitsandbytes
from spin.runtime.errors import UserError, brief, user_message

# Where DeepSpeed is installed transformers imports it to save a model, and it prints which accelerator it has not found.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")


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
        bitsandbytes.import_bitsandbytes()
        four_bits = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        rounding = {"quantization_config": four_bits, "device_map": {"": device}}
    try:
        with quiet_transformers():
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
        if user_message(error) is not None:  # memory is short
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


def load_policy(policy: Policy, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """`load_model` of a policy; where it is an adapter, of its base with the adapter in place."""
    whole = policy.base_or_self
    model = load_model(whole.folder, dtype, device, whole.quantization)
    return adapters.attach_adapter(model, policy.folder) if policy.base else model


def trained_parameters(model: PreTrainedModel, policy: Policy) -> dict[str, torch.nn.Parameter]:
    """What training changes of a loaded policy, by name: its adapter where it has one, else everything."""
    return {name: weight for name, weight in model.named_parameters() if not policy.base or ".lora_" in name}


def masters_of(policy: Policy, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What training starts from, in fp32 and by name: the parameters that it changes, and what else is saved with them."""
    if policy.base:
        return adapters.read_weights(policy.folder, device), {}
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
        stated = read_json_object(folder / "generation_config.json", str(folder)).get("eos_token_id")
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


@contextlib.contextmanager
def quiet_transformers():
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


def _is_no_table(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
