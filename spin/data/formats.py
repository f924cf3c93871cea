"""Record formats: from a record to conversations and the human answers in them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spin.config.schema import DataConfig
from spin.runtime.errors import UserError, brief

Record = dict[str, Any]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Exchange = tuple[list[Message], str]  # messages that end with the user's, and the human answer to them
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}


def messages_of(value: Any, role: str = "user") -> list[Message]:
    """The messages in a column: a text is one message of `role`, a list is read up to its first invalid item."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages: list[Message] = []
    for message in _as_list(value):
        if not isinstance(message, dict):
            break
        speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(speaker, str) or speaker.lower() not in ROLES or not isinstance(content, str):
            break
        messages.append({"role": ROLES[speaker.lower()], "content": content})
    return messages


def _chitchat(record: Record) -> list[Message]:
    """Two speakers who alternate; each inner list holds the consecutive texts of one of them."""
    messages: list[Message] = []
    for number, turn in enumerate(_as_list(record.get("messages"))):
        texts = [text.get("text") for text in _as_list(turn) if isinstance(text, dict)]
        content = " ".join(text.strip() for text in texts if isinstance(text, str))
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return messages


def _instruction(record: Record) -> list[Message]:
    """An Alpaca instruction, followed by its input if there is one."""
    instruction, context = record.get("instruction"), record.get("input")
    if isinstance(instruction, str) and isinstance(context, str) and context.strip():
        instruction = f"{instruction.strip()}\n\n{context.strip()}"
    return messages_of(instruction)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


@dataclass(frozen=True)
class Format:
    """A record format. `data.format=auto` takes the first one whose columns a record has."""

    column: str  # holds the conversation
    answers: tuple[str, ...] = ()  # columns that may hold the answer; none: the answers stand in the conversation
    parse: Callable[[Record], list[Message]] | None = None  # for another layout than `messages_of` reads
    in_parts: bool = False  # a long conversation is several records with the ids <name>_0, <name>_30, ...

    def missing_columns(self, record: Record) -> str | None:
        needed = [(self.column,), self.answers] if self.answers else [(self.column,)]
        return next((" or ".join(names) for names in needed if not record.keys() & set(names)), None)


FORMATS = {
    "messages": Format("messages"),
    "sharegpt": Format("conversations", in_parts=True),
    "alpaca": Format("instruction", answers=("output",), parse=_instruction),
    "prompt": Format("prompt", answers=("response", "completion", "answer")),
    "chitchat": Format("messages", parse=_chitchat),
}


def exchanges(records: Iterable[Record], config: DataConfig, counts: Counter[str]) -> Iterator[Exchange]:
    """Yield the first exchange of each record, or with `config.turns=all` every one.

    `counts["read"]` grows by the number of exchanges, and by one for each record without any, whose reason is counted.

    Raises UserError: the first record lacks the format's columns, or fits no known format.
    """
    name = None
    for record in records:
        if name is None:
            name = _detect(record) if config.format == "auto" else config.format
            if missing := FORMATS[name].missing_columns(record):
                raise UserError(f"data.format={name}: no column {missing}; there are {_column_names(record)}")
        found, reason = _read(record, FORMATS[name])
        if config.turns == "first":
            found = found[:1]
        counts["read"] += max(len(found), 1)
        if not found:
            counts[reason] += 1
        yield from found


def _detect(record: Record) -> str:
    if any(isinstance(turn, list) for turn in _as_list(record.get("messages"))[:1]):
        return "chitchat"
    for name, format in FORMATS.items():
        if not format.missing_columns(record):
            return name
    raise UserError(f"data.format=auto: no known format has {_column_names(record)}; rename them, or set data.format")


def _read(record: Record, format: Format) -> tuple[list[Exchange], str]:
    """The exchanges in a record, and the reason if there are none."""
    name = record.get("id")
    if format.in_parts and isinstance(name, str) and re.search(r"_0*[1-9][0-9]*$", name):
        return [], "not a conversation's start"
    messages = format.parse(record) if format.parse else messages_of(record.get(format.column))
    if not format.answers:
        return _alternating(messages)
    column = next((name for name in format.answers if record.get(name) is not None), format.answers[0])
    answer = messages_of(record.get(column), "assistant")
    if not messages or messages[-1]["role"] != "user":
        return [], "no prompt"
    if not answer or answer[0]["role"] != "assistant":
        return [], "no answer"
    return [(messages, answer[0]["content"])], ""


def _alternating(messages: list[Message]) -> tuple[list[Exchange], str]:
    """Every answer with the messages before it, as long as user and assistant alternate; and the reason if none."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    found: list[Exchange] = []
    for number, message in enumerate(messages[start:]):
        if message["role"] != ("user", "assistant")[number % 2]:
            break
        if message["role"] == "assistant":
            found.append((messages[: start + number], message["content"]))
    has_prompt = len(messages) > start and messages[start]["role"] == "user"
    return found, "no answer" if has_prompt else "no prompt"


def _column_names(record: Record) -> str:
    return brief(", ".join(str(name) for name in list(record)[:12]), 300) or "no columns"
