"""Check for bitsandbytes, import it safely, and load models in 4 bits."""

import importlib.util
import logging
import sys
from typing import Any

import torch
import transformers

from spin.runtime.errors import UserError

REQUIREMENT = "bitsandbytes==0.50.2"


def check_bitsandbytes(setting: str) -> None:
    """Raise UserError, naming `setting`, if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{setting}: bitsandbytes is not installed: pip install {REQUIREMENT}")


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, without its optional package `kernels`.

    On CPUs with AVX512-bf16 bitsandbytes would use `kernels` to download native code from the hub.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
    importlib.import_module("bitsandbytes")


def quantized_loading(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load all linear layers except the output layer in 4 bits.

    `quantization` is "nf4", with double quantization (Dettmers et al., arXiv 2305.14314). Layers compute in `dtype`.
    """
    check_bitsandbytes(f"model.quantization={quantization}")
    import_bitsandbytes()
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking weights in evaluation mode on CPUs with AVX512-bf16.

    Its kernel for repacked weights has no backward pass, so earlier layers would silently get no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
