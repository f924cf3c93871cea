"""How many exchanges were dropped for which reason, and the first one of each reason to look at."""

import json
from collections import Counter

from spin.data.messages import Exchange, as_text

LONGEST = 1000  # characters of an example


class Counts(Counter[str]):
    """Exchanges by reason; `examples` has the text of the first one that was dropped for each reason."""

    def __init__(self, **counts: int):
        super().__init__(**counts)
        self.examples: dict[str, str] = {}

    def drop(self, reason: str, item: object) -> None:
        """Count an exchange, or a record as it was read, that is dropped for a reason."""
        self[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = text_of(item)


def text_of(item: object) -> str:
    if isinstance(item, Exchange):
        return as_text([*item.messages, item.answer])[:LONGEST]
    return json.dumps(item, ensure_ascii=False, default=str)[:LONGEST]
