"""Parse conversations into messages, whatever their role names, keys and shape."""

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from spin.runtime.errors import brief

# "role" is system, user, assistant, tool, or BROKEN, whose "content" is the reason. Optional keys: "reasoning_content"
# (text), "tool_calls" (list), TOOL_KEYS, and "learn", which is False for an answer to exclude from training.
Message = dict[str, Any]
BROKEN = "broken"
NAMES = {
    "system": "system developer system_prompt",
    "user": "user human prompter usr customer client question instruction query prompt input",
    "assistant": "assistant gpt chatgpt bing bard model bot chatbot ai claude gpt4 gpt-4 gemini agent answer response output "
    "completion function_call tool_call",
    "tool": "tool function function_response observation ipython tool_response tool_result tool_results tool_output",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
CALLS = ("function_call", "tool_call")  # roles whose content is a tool call
SPEAKERS = ("role", "from", "speaker", "sender", "author")
CONTENTS = ("content", "value", "text", "message", "parts")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# A message is excluded from training if one of these is 0 or false.
FLAGS = ("weight", "train", "trainable", "training", "train_on_turn", "learn", "loss", "loss_mask", "loss_weight")
TOOL_KEYS = ("name", "tool_call_id")


@dataclass(frozen=True)
class Exchange:
    """A human answer, the messages before it, and the tools that may be called."""

    messages: list[Message]
    answer: Message
    tools: list[Any] | None = None
    rejected: str | None = None  # the other answer of a preference pair


def from_json(value: Any) -> Any:
    """Return the list or object that `value` holds as JSON text, or any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def messages_of(value: Any, role: str = "user") -> list[Message]:
    """Return the messages in a column: a list, a transcript, or any other text or a number as one message of `role`."""
    parsed = from_json(value)
    if isinstance(parsed, dict):
        parsed = [parsed]
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):  # NaN is pandas' null
        value = str(value)
    if isinstance(value, str) and not (isinstance(parsed, list) and any(map(_has_role, parsed))):
        return _transcript(value) or [{"role": role, "content": value}]
    if not isinstance(parsed, list) or (isinstance(value, dict) and not _turns(value)):
        return []
    items = [from_json(item) for item in parsed]
    if role == "user" and all(isinstance(item, str) for item in items):
        return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(items)]
    return [message for item in items for turn in _turns(item) or [item] if (message := _message(turn))]


def _has_role(item: Any) -> bool:
    item = from_json(item)
    return isinstance(item, dict) and str(first_of(item, SPEAKERS)).strip().lower() in ROLES


def _turns(item: Any) -> list[dict[str, Any]]:
    """Return a message as a list; split an object whose keys are roles, such as question and answer, into messages."""
    if not isinstance(item, dict) or first_of(item, SPEAKERS) is not None:
        return [item] if isinstance(item, dict) else []
    roles = sorted((key for key in item if key in ROLES), key=lambda key: list(NAMES).index(ROLES[key]))
    return [{"role": key, "content": item[key]} for key in roles]


def _transcript(text: str) -> list[Message]:
    """Return the messages of a transcript of Human and Assistant, as in Anthropic's data; [] for any other text."""
    opening, *parts = re.split(r"\n\n(Human|Assistant):", f"\n\n{text.lstrip()}")
    if opening or parts[:3:2] != ["Human", "Assistant"]:
        return []
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[name.lower()], "content": text.strip()} for name, text in turns if text.strip()]


def first_of(record: dict[str, Any], names: Iterable[str]) -> Any:
    """Return the first non-null value under the given names, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def _message(item: Any) -> Message | None:
    """Return the message in `item`, a broken message if it cannot be read, or None if it is empty."""
    if item is None:
        return None
    speaker = first_of(item, SPEAKERS) if isinstance(item, dict) else None
    if not isinstance(speaker, str):
        return broken("message without a role")
    speaker = speaker.strip().lower()
    role = ROLES.get(speaker)
    if role is None:
        return broken(f"role {brief(speaker, 20)}")
    content, calls = first_of(item, CONTENTS), _calls(item, speaker)
    text = "" if calls and speaker in CALLS else text_of(content)
    if text is None:
        return broken("content that is no text")
    thought = first_of(item, THOUGHTS)
    if content is None and not calls and not thought:
        return None
    message: Message = {"role": role, "content": text}
    if isinstance(thought, str) and thought.strip():
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: item[key] for key in TOOL_KEYS if isinstance(item.get(key), str)}
    if any(isinstance(item.get(flag), (bool, int, float)) and not item[flag] for flag in FLAGS):
        message["learn"] = False
    return message


def broken(reason: str) -> Message:
    return {"role": BROKEN, "content": reason}


def text_of(content: Any) -> str | None:
    """Return the text of a message's content or of its parts, or None if it has anything but text."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        elif part is not None:
            return None
    return "\n".join(texts)


def _calls(item: dict[str, Any], speaker: str) -> list[Any]:
    """Return the tool calls of a message, with JSON arguments parsed to objects, as chat templates expect."""
    calls = from_json(item.get("tool_calls")) or from_json(item.get("function_call"))
    if speaker in CALLS:
        calls = from_json(first_of(item, CONTENTS))
    tool_calls = []
    for call in calls if isinstance(calls, list) else [calls] if calls else []:
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict):
            function = {**function, "arguments": from_json(function.get("arguments"))}
        id = {"id": call["id"]} if isinstance(call, dict) and isinstance(call.get("id"), str) else {}
        tool_calls.append({"type": "function", "function": function, **id})
    return tool_calls


def join(messages: list[Message]) -> list[Message]:
    """Join adjacent messages of the same role, except tool calls, tool results and broken messages."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else {}
        is_other_role = last.get("role") != message["role"]
        if is_other_role or message["role"] in ("tool", BROKEN) or "tool_calls" in last | message:
            joined.append(message)
            continue
        joined[-1] = last | message
        for key in ("content", "reasoning_content"):
            if key in joined[-1]:
                joined[-1][key] = "\n\n".join(part[key] for part in (last, message) if part.get(key, "").strip())
    return joined


def alternating(messages: list[Message]) -> list[Message]:
    """Insert a broken message at the first place where user and assistant do not alternate, if any."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    expected = ["system"] * start + ["user", "assistant"] * len(messages)
    for number, (message, role) in enumerate(zip(messages, expected, strict=False)):
        if message["role"] != role:
            return [*messages[:number], broken("turns out of order"), *messages[number:]]
    return messages


def answers_of(messages: list[Message], tools: list[Any] | None) -> list[Exchange | str]:
    """Return the exchange of each answer to a user's message, or the reason why it is not used for training.

    If there is no answer, return the reason for that. `tools` is None if there are none or none can be rendered.
    """
    answers: list[Exchange | str] = []
    unreadable = ""  # why this answer and the following ones can't be read
    for number, message in enumerate(messages):
        history = messages[:number]
        if message["role"] == BROKEN:
            unreadable = unreadable or message["content"]
        elif message["role"] == "tool" and tools is None:
            unreadable = unreadable or "tool message"
        elif message["role"] == "assistant":
            if "tool_calls" in message and tools is None:
                unreadable = unreadable or "tool call"
            if not any(turn["role"] == "user" for turn in history):
                continue  # a greeting
            if unreadable:
                answers.append(unreadable)
            elif "tool_calls" in message:
                answers.append("tool call")
            elif not message.get("learn", True):
                answers.append("not to be learnt")
            elif history[-1]["role"] not in ("user", "tool"):
                answers.append("no user's message right before the answer")
            else:
                answers.append(Exchange(history, message, tools))
    has_prompt = any(message["role"] == "user" for message in messages)
    return answers or [reason_in(messages, "no answer" if has_prompt else "no prompt")]


def reason_in(messages: list[Message], default: str) -> str:
    """Return the reason of the first broken message, or `default` if none is broken."""
    return next((message["content"] for message in messages if message["role"] == BROKEN), default)


def as_text(messages: list[Message]) -> str:
    """Return a conversation as readable text."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
