"""Record formats: extract the conversations in a record and their human answers."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from spin.config.schema import DataConfig
from spin.data.counts import Counts
from spin.data.messages import (
    Exchange,
    Message,
    alternating,
    answers_of,
    broken,
    first_of,
    from_json,
    join,
    messages_of,
    reason_in,
    text_of,
)
from spin.runtime.errors import UserError, brief

Record = dict[str, Any]
SYSTEM, HISTORY, TOOLS, INPUT = ("system", "system_prompt"), "history", "tools", ("input", "context")
QUESTIONS = ("prompt", "question", "query", "problem", "input")
ANSWERS = ("response", "completion", "output", "solution", "answer")
PROMPTS = ("instruction", *QUESTIONS, "conversations", "conversation")  # of preference data
CONTEXT = (*SYSTEM, "id")  # columns read with every format


@dataclass(frozen=True)
class Format:
    """A record format. `data.format=auto` selects the first one whose columns a record has."""

    columns: tuple[str, ...]  # one of them holds the conversation or prompt
    answers: tuple[str, ...] = ()  # one of them holds the answer; if empty, the conversation does
    more: tuple[str, ...] = ()  # optional columns that are read
    rejected: tuple[str, ...] = ()  # one of them holds the rejected answer

    def missing_columns(self, names: Iterable[str]) -> str | None:
        needed = [group for group in (self.columns, self.answers, self.rejected) if group]
        return next((" or ".join(group) for group in needed if not set(names) & set(group)), None)

    @property
    def read(self) -> set[str]:
        """All columns that are read, except `TOOLS`."""
        return {*self.columns, *self.answers, *self.more, *self.rejected, *CONTEXT}


def _chitchat(record: Record) -> list[Message]:
    """Return the messages of two alternating speakers. Each inner list has the texts of one turn."""
    messages: list[Message] = []
    for number, turn in enumerate(_as_list(record.get("messages"))):
        texts = [text.get("text") for text in _as_list(turn) if isinstance(text, dict)]
        content = " ".join(text.strip() for text in texts if isinstance(text, str))
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return messages


def _prompt(record: Record, names: Iterable[str]) -> list[Message]:
    """Return the messages in the first non-null column of `names`; append the inputs to text, as in Alpaca's records."""
    name = next((name for name in names if record.get(name) is not None), "")
    value, inputs = record.get(name), [text_of(record.get(key)) for key in INPUT if key != name]
    if isinstance(value, str) and any(text and text.strip() for text in inputs):
        value = "\n\n".join(text.strip() for text in (value, *inputs) if text and text.strip())
    return messages_of(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


FORMATS = {
    "preference": Format(("chosen", "real"), more=(*PROMPTS, *INPUT), rejected=("rejected", "generated")),
    "messages": Format(("messages", "conversation", "dialogue", "dialog", "contents")),
    "sharegpt": Format(("conversations",)),
    "alpaca": Format(("instruction",), answers=("output", "response"), more=(*INPUT, "label", HISTORY)),
    "prompt": Format(QUESTIONS, answers=ANSWERS, more=(*INPUT, "label", HISTORY)),
    "chitchat": Format(("messages",)),
}


def exchanges(
    records: Iterable[Record], config: DataConfig, counts: Counts, renders_tools: bool, say: Callable[[str], None]
) -> Iterator[Exchange]:
    """Yield the first usable exchange of each record, or all with `config.turns=all`; `say` which columns are not read.

    `counts["read"]` counts answers, and records without any; `counts.drop` counts those that are not yielded.
    With `renders_tools`, the template renders tools, so tool calls and results may be in the history.

    Raises UserError if no record has the columns of the format, or of any known format.
    """
    first: Record | None = None
    unread: dict[str, None] = {}
    formats: set[str] = set()
    for record in records:
        first = record if first is None else first
        name = _detect(record) if config.format == "auto" else config.format
        if name is None or FORMATS[name].missing_columns(record):
            counts["read"] += 1
            counts.drop("unknown columns", record)
            continue
        formats.add(name)
        present = (key for key in record if record[key] is not None)
        read = FORMATS[name].read | ({TOOLS} if renders_tools else set())
        unread |= dict.fromkeys(key for key in present if key not in read)
        answers = _read(record, name, config, renders_tools)
        if config.turns == "first":
            answers = sorted(answers, key=lambda answer: isinstance(answer, str))[:1]  # the first usable one
        for answer in answers:
            counts["read"] += 1
            if isinstance(answer, str):
                counts.drop(answer, record)
            else:
                yield answer
    if first is not None and not formats:
        columns = _column_names(first)
        if config.format == "auto":
            raise UserError(f"data.format=auto: no known format has {columns}; rename them, or set data.format")
        missing = FORMATS[config.format].missing_columns(first)
        raise UserError(f"data.format={config.format}: no column {missing}; there are {columns}")
    if "preference" in formats:
        say("note: of two answers, the chosen (or real) one is the human answer")
    if unread:
        say(f"note: columns of the data that are not read: {_column_names(unread)}")


def _detect(record: Record) -> str | None:
    """Return the first format whose columns the record has, preferably with non-null values, or None."""
    if any(isinstance(turn, list) for turn in _as_list(record.get("messages"))[:1]):
        return "chitchat"
    for names in ([name for name in record if record[name] is not None], record):
        for name, format in FORMATS.items():
            if not format.missing_columns(names):
                return name
    return None


def _read(record: Record, name: str, config: DataConfig, renders_tools: bool) -> list[Exchange | str]:
    """Return the exchange of each answer in a record, or the reason why it is dropped."""
    format, id = FORMATS[name], record.get("id")
    # The pinned data set splits conversations into records with the ids <name>_0, <name>_30, ...
    is_pinned = name == "sharegpt" and config.path is None
    if is_pinned and isinstance(id, str) and re.search(r"_0*[1-9][0-9]*$", id):
        return ["not a conversation's start"]
    tools = from_json(record.get(TOOLS)) if renders_tools else None
    tools = tools if isinstance(tools, list) and tools else None
    if format.rejected:
        return [_preferred(record, format, tools, config.generated)]
    if format.answers:
        if record.get("label") is False:  # an undesirable answer, as in data for KTO
            return ["not to be learnt"]
        messages = _with_context(record, _prompt(record, format.columns), record.get(HISTORY))
        return [_answered(messages, messages_of(first_of(record, format.answers), "assistant"), tools)]
    messages = _chitchat(record) if name == "chitchat" else messages_of(first_of(record, format.columns))
    messages = alternating(messages) if is_pinned else _with_context(record, messages)
    return answers_of(messages, tools)


def _answered(messages: list[Message], answer: list[Message], tools: list[Any] | None) -> Exchange | str:
    """Return the exchange of a prompt and a separate answer, or the reason why there is none."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        return reason_in(messages, "no prompt")
    if not answer or answer[-1]["role"] != "assistant":
        return reason_in(answer, "no answer")
    return answers_of(join([*messages, *answer]), tools)[-1]


def _preferred(record: Record, format: Format, tools: list[Any] | None, generated: str) -> Exchange | str:
    """Return the exchange of the chosen answer, with the other one as `rejected`, or the reason why there is none."""
    columns = (format.columns, format.rejected)
    chosen, rejected = (join(messages_of(first_of(record, names), "assistant")) for names in columns)
    prompt = [] if any(turn["role"] == "user" for turn in chosen) else _prompt(record, PROMPTS)
    messages = [*prompt, *chosen[:-1]]
    exchange = _answered(_with_context(record, messages), chosen[-1:], tools)
    if isinstance(exchange, str) or not rejected or rejected[-1]["role"] != "assistant":
        return exchange
    if generated == "file" and rejected[:-1] not in ([], chosen[:-1], messages):
        return "rejected answer: after another prompt"
    return replace(exchange, rejected=rejected[-1]["content"])


def _with_context(record: Record, messages: list[Message], history: Any = None) -> list[Message]:
    """Return the record's system message, the earlier turns in `history`, and `messages`."""
    history = from_json(history)
    turns = [history] if isinstance(history, dict) else _as_list(history)
    are_pairs = any(isinstance(turn, list) for turn in turns)
    earlier = [message for turn in turns for message in messages_of(turn)] if are_pairs else messages_of(turns)
    if isinstance(history, str) and history.strip():
        earlier = [broken("history that is no list")]
    messages = join([*earlier, *messages])
    system = text_of(first_of(record, SYSTEM))
    if system and system.strip() and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _column_names(names: Iterable[str]) -> str:
    return brief(", ".join(str(name) for name in list(names)[:12]), 300) or "no columns"
