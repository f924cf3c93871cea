"""Answers that can be checked: `data.check`."""

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


# exact: the same text but for whitespace and case. number: the last number in both is the same (a sum, GSM8K's answers).
CHECKS: dict[str, Callable[[str, str], bool]] = {"exact": _same_text, "number": _same_number}


def correct(pairs: Sequence[Pair], check: str) -> np.ndarray | None:
    """[prompts]: 1 where the model answer is right by `check` (a name in `CHECKS`), else 0; None for "none"."""
    return None if check == "none" else np.array([float(CHECKS[check](p.generated, p.real)) for p in pairs])
