"""How many exchanges were dropped for which reason, and the first one of each reason to look at."""

import json
from collections import Counter

from spin.data.messages import Exchange

LONGEST = 1000  # characters of an example that are kept


class Counts(Counter[str]):
    """Exchanges by reason; `examples` has the text of the first one that was dropped for each reason."""

    def __init__(self, **counts: int):
        super().__init__(**counts)
        self.examples: dict[str, str] = {}


def drop(counts: Counter[str], reason: str, item: object) -> None:
    """Count an exchange, or a record as it was read, that is dropped for a reason."""
    counts[reason] += 1
    if isinstance(counts, Counts) and reason not in counts.examples:
        counts.examples[reason] = text_of(item)


def text_of(item: object) -> str:
    turns = [*item.messages, item.answer] if isinstance(item, Exchange) else []
    text = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    return (text or json.dumps(item, ensure_ascii=False, default=str))[:LONGEST]
