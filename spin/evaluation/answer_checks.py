"""Checks of model answers against human answers, for `data.check`."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from spin.method.pairs import Pair


def _same_text(answer: str, real: str) -> bool:
    return answer.casefold().split() == real.casefold().split()


def _same_number(answer: str, real: str) -> bool:
    expected = _last_number(real)
    return expected is not None and _last_number(answer) == expected


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


# exact: equal texts up to whitespace and case. number: equal last numbers (sums, answers to GSM8K).
CHECKS: dict[str, Callable[[str, str], bool]] = {"exact": _same_text, "number": _same_number}


def correct(pairs: Sequence[Pair], check: str) -> np.ndarray | None:
    """Return [prompts]: 1 if a model answer is right by `check` (a key of `CHECKS`), else 0; return None for "none"."""
    return None if check == "none" else np.array([float(CHECKS[check](p.generated, p.real)) for p in pairs])
