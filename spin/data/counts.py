"""Count the exchanges dropped for each reason, and keep the text of the first one."""

import json
from collections import Counter

from spin.data.messages import Exchange, as_text

LONGEST = 1000  # characters of a dropped exchange that are kept


class Counts(Counter[str]):
    """Numbers of exchanges by reason; `examples` has the text of the first one dropped for each reason."""

    def __init__(self, **counts: int):
        super().__init__(**counts)
        self.examples: dict[str, str] = {}

    def drop(self, reason: str, item: object) -> None:
        """Count a dropped exchange or raw record under `reason`."""
        self[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = excerpt_of(item)


def excerpt_of(item: object) -> str:
    """Return the start of an exchange as readable text, or of a raw record as JSON."""
    if isinstance(item, Exchange):
        return as_text([*item.messages, item.answer])[:LONGEST]
    return json.dumps(item, ensure_ascii=False, default=str)[:LONGEST]
