"""Import bitsandbytes without fetching native code."""

import importlib.util
import logging
import sys


def import_bitsandbytes() -> None:
    """Import bitsandbytes, where it is installed, so that it does not fetch native code from the hub: on processors with
    AVX512-bf16 it would, with the package `kernels`, and says so where it can't."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = {name: sys.modules.pop(name) for name in ("kernels",) if name in sys.modules}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an ImportError for whoever asks for it
    try:
        importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)
