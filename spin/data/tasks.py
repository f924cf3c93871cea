"""Synthetic tasks with exactly one right answer, for a tiny model."""

import random
from collections.abc import Iterator

from spin.runtime.errors import UserError

TASKS = ("sort", "sum", "reverse")
COUNT = 20_000  # records of a task, including a few duplicates


def records(name: str) -> Iterator[dict[str, str]]:
    """Yield the `COUNT` records {"prompt", "response"} of a task. Raises UserError if it does not exist."""
    if name not in TASKS:
        raise UserError(f"data.path=builtin:{name}: there is no such task; there are {', '.join(TASKS)}.")
    rng = random.Random(name)
    for _ in range(COUNT):
        prompt, response = _exercise(name, rng)
        yield {"prompt": f"{name} {prompt}", "response": response}


def _exercise(name: str, rng: random.Random) -> tuple[str, str]:
    if name == "sum":
        a, b = rng.randrange(100), rng.randrange(100)
        return f"{a} + {b}", str(a + b)
    if name == "sort":
        digits = [str(rng.randrange(10)) for _ in range(5)]
        return " ".join(digits), " ".join(sorted(digits))
    letters = [rng.choice("abcdefghij") for _ in range(5)]
    return " ".join(letters), " ".join(reversed(letters))
