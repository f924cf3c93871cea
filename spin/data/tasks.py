"""Synthetic tasks whose answers are right or wrong, for a tiny model."""

import random
from collections.abc import Callable, Iterator

from spin.runtime.errors import UserError

COUNT = 20_000  # records of a task; a few come twice


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = [str(rng.randrange(10)) for _ in range(5)]
    return " ".join(digits), " ".join(sorted(digits))


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a} + {b}", str(a + b)


def _reverse(rng: random.Random) -> tuple[str, str]:
    letters = [rng.choice("abcdefghij") for _ in range(5)]
    return " ".join(letters), " ".join(reversed(letters))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"sort": _sort, "sum": _sum, "reverse": _reverse}


def records(name: str) -> Iterator[dict[str, str]]:
    """Yield the `COUNT` records {"prompt", "response"} of a task. Raises UserError: no such task."""
    if name not in TASKS:
        raise UserError(f"data.path=builtin:{name}: there is no such task; there are {', '.join(TASKS)}.")
    rng = random.Random(name)
    for _ in range(COUNT):
        prompt, response = TASKS[name](rng)
        yield {"prompt": f"{name} {prompt}", "response": response}
