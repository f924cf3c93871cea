"""Whether bitsandbytes is installed."""

import importlib.util

from spin.runtime.errors import UserError

BITSANDBYTES = "bitsandbytes==0.50.2"


def check_bitsandbytes(setting: str) -> None:
    """Raise UserError if `setting` needs what is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{setting}: bitsandbytes is not installed: pip install {BITSANDBYTES}")
