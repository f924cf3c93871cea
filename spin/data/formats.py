"""Record formats: records to messages and answers."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from spin.config.schema import DataConfig
from spin.runtime.errors import UserError, brief

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Exchange = tuple[list[Message], str]  # messages that end with the user's, and the human answer to them
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
ANSWERS = ("response", "completion", "answer")  # names for the answer's column in the format `prompt`


# ------------------------------------------------------------------------------------------ records -> exchanges


def exchanges(records: Iterable[dict[str, Any]], config: DataConfig, counts: Counter[str]) -> Iterator[Exchange]:
    """The exchanges in `records`: one a record with `config.turns=first`, one an answer with `all`.

    A conversation is read up to the first message that is out of turn or is no text. The formats `prompt` and `alpaca`
    hold exactly one answer a record, whose history (if the prompt is a list of messages) belongs to it in either case.
    `counts` gets `read` (exchanges, and records without any) and the reason for each record without any.

    Raises UserError: the first record does not have the format's columns, or fits no known format.
    """
    name = None
    for record in records:
        if name is None:
            name = _detect(record) if config.format == "auto" else config.format
            _require_columns(record, name)
        found, reason = _READERS[name](record)
        if config.turns == "first" and name not in ("prompt", "alpaca"):
            found = found[:1]
        counts["read"] += max(len(found), 1)
        if not found:
            counts[reason] += 1
        yield from found


def _detect(record: dict[str, Any]) -> str:
    if "messages" in record:
        messages = record["messages"]
        nested = isinstance(messages, list) and messages and isinstance(messages[0], list)
        return "chitchat" if nested else "messages"
    for name in ("sharegpt", "alpaca", "prompt"):
        if all(any(column in record for column in columns) for columns in _COLUMNS[name]):
            return name
    raise UserError(f"data.format=auto: no known format has {column_names(record)}; rename them, or set data.format")


def _require_columns(record: dict[str, Any], name: str) -> None:
    for columns in _COLUMNS[name]:
        if not any(column in record for column in columns):
            raise UserError(f"data.format={name}: no column {' or '.join(columns)}; there are {column_names(record)}")


def _from_messages(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    return _turns(_parse(record.get("messages"), "user"))


def _from_sharegpt(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    name = record.get("id")
    part = re.search(r"_([0-9]+)$", name) if isinstance(name, str) else None  # long ones come in parts: xxxx_0, xxxx_30
    if part and part[1].strip("0"):
        return [], "not a conversation's start"
    return _turns(_parse(record.get("conversations"), "user"))


def _from_chitchat(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    """Two people by turns: the inner lists are one speaker's consecutive texts."""
    messages: list[Message] = []
    for number, turn in enumerate(_list(record.get("messages"))):
        texts = [text.get("text") for text in _list(turn) if isinstance(text, dict)]
        content = " ".join(text.strip() for text in texts if isinstance(text, str))
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return _turns(messages)


def _from_prompt(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    answer = next((record[name] for name in ANSWERS if record.get(name) is not None), None)
    history, answers = _parse(record.get("prompt"), "user"), _parse(answer, "assistant")
    if not history or history[-1]["role"] != "user":
        return [], "no prompt"
    if not answers or answers[0]["role"] != "assistant":
        return [], "no answer"
    return [(history, answers[0]["content"])], ""


def _from_alpaca(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    instruction, extra, output = (record.get(name) for name in ("instruction", "input", "output"))
    if not isinstance(instruction, str):
        return [], "no prompt"
    if not isinstance(output, str):
        return [], "no answer"
    if isinstance(extra, str) and extra.strip():
        instruction = f"{instruction.strip()}\n\n{extra.strip()}"
    return [([{"role": "user", "content": instruction}], output)], ""


_COLUMNS: dict[str, list[tuple[str, ...]]] = {
    "messages": [("messages",)],
    "sharegpt": [("conversations",)],
    "chitchat": [("messages",)],
    "prompt": [("prompt",), ANSWERS],
    "alpaca": [("instruction",), ("output",)],
}
_READERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "chitchat": _from_chitchat,
    "prompt": _from_prompt,
    "alpaca": _from_alpaca,
}


def _parse(value: Any, role: str) -> list[Message]:
    """A text (spoken by `role`) or a list of messages -> messages, up to the first that is none."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages: list[Message] = []
    for message in _list(value):
        if not isinstance(message, dict):
            break
        speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(speaker, str) or speaker.lower() not in ROLES or not isinstance(content, str):
            break
        messages.append({"role": ROLES[speaker.lower()], "content": content})
    return messages


def _turns(messages: list[Message]) -> tuple[list[Exchange], str]:
    """Every answer with what stands before it, as long as user and assistant take turns; or why there is none."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    found: list[Exchange] = []
    for number, message in enumerate(messages[start:]):
        if message["role"] != ("user", "assistant")[number % 2]:
            break
        if message["role"] == "assistant":
            found.append((messages[: start + number], message["content"]))
    has_prompt = len(messages) > start and messages[start]["role"] == "user"
    return found, "no answer" if has_prompt else "no prompt"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def column_names(record: dict[str, Any]) -> str:
    return brief(", ".join(str(name) for name in list(record)[:12]), 300) or "no columns"
