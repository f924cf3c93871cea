"""Answers that can be checked."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from spin.method.pairs import Pair

# --- answers that can be checked --------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(own: str, real: str) -> bool:
    expected = _last_number(real)
    return expected is not None and _last_number(own) == expected


# exact: the same text, but for blanks and case. number: the last number in both is the same (a sum, GSM8K's answers).
CHECKS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda own, real: _plain(own) == _plain(real),
    "number": _same_number,
}


def correct(pairs: Sequence[Pair], check: str) -> np.ndarray | None:
    """[prompts]: 1 where the own answer is right by `check` (a name in `CHECKS`), 0 where not; None for "none"."""
    return None if check == "none" else np.array([float(CHECKS[check](p.generated, p.real)) for p in pairs])
