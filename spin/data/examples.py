"""Examples: text checks, token ids, and which prompts are held out."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spin.config.schema import DataConfig
from spin.data.formats import exchanges
from spin.data.messages import Exchange, Message
from spin.data.prose import is_prose, is_prose_answer
from spin.data.sources import read_records
from spin.data.templates import ChatTemplate, encode_exchanges, end_of_turn, special_texts
from spin.runtime.errors import UserError
from spin.runtime.random import seed_of

_Candidate = tuple[str, Exchange]  # hash of the content, and the content
REJECTED: Message = {"role": "assistant"}
BLOCK = 512  # prompts tokenised together: enough for the tokenizer's threads, few beyond what a small set needs

# End tokens of common chat templates, which data sets carry over, whatever tokenizer is used here.
END_MARKS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")


@dataclass(frozen=True)
class Example:
    """A prompt and the human answer to it, as text to read and as the token ids that all computations use."""

    id: str  # hash of the content: independent of file and position
    prompt: str  # to read: the last user message, after the earlier turns if there are any
    prompt_ids: tuple[int, ...]  # with the template; for generation and training alike
    real: str
    real_ids: tuple[int, ...]  # ends with one end token, unless the answer was cut
    opening: str = ""  # hash of the first user message: examples that share it count as the same prompt
    rejected: tuple[int, ...] = ()  # with data.generated=file: the token ids of the data's other answer


@dataclass
class Dataset:
    """The training, held-out and validation examples, and how many exchanges were kept or dropped for which reason.

    `counts["read"]` is the sum of all other counts; `counts["kept"]` is the number of examples in the three sets.
    `seen` counts the prompts that could not be held out because the model was trained on them.
    """

    train: list[Example]
    held_out: list[Example]
    counts: dict[str, int]
    seen: int = 0
    validation: list[Example] = field(default_factory=list)

    @property
    def all(self) -> list[Example]:
        return [*self.train, *self.held_out, *self.validation]


def load_dataset(
    config: DataConfig,
    tokenizer: Any,
    stop_ids: Collection[int],
    seed: int,
    cache: Path,
    seen: Collection[str] = frozenset(),
    say: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """Read, check, order, encode and split the data set.

    The order depends on `seed` and content only. The first `config.held_out` prompts are held out, one example each, the
    next `config.validation` prompts are for validation, and all other examples of these prompts are dropped; the next
    `config.size` examples are the training set. So the held-out and validation sets are the same for every size, and a
    smaller training set is part of a larger one.

    `stop_ids` are the tokens at which the model stops generating; `seen` holds the `opening` of the prompts that the
    model was trained on, which are never held out. `cache` keeps downloaded files. `say` gets a line for each thing in the
    data or the template that a user should know of.

    Raises UserError: the source cannot be read, the template does not fit the tokenizer, or too few examples are left.
    """
    counts: Counter[str] = Counter(read=0, kept=0)
    # First: a wrong template fails before the reading.
    end = end_of_turn(tokenizer, stop_ids, config.template, config.template_options)
    chat = ChatTemplate(tokenizer, config.template_options) if config.template == "chat" else None
    for note in chat.notes(stop_ids) if chat else ():
        say(note)
    records = read_records(config, cache, counts)
    found = exchanges(records, config, counts, chat is not None and chat.takes_tools, say)
    checked = _check(found, special_texts(tokenizer), config, counts)
    if chat and not chat.takes_system and any(_has_system(exchange) for exchange in checked.values()):
        say("note: the chat template takes no system message: its text goes before the next user message")
    candidates = sorted(checked.items(), key=lambda candidate: seed_of(seed, candidate[0]))
    if config.filter == "prose":
        candidates = _unique_prompts(candidates, counts)
    dataset = _split(candidates, _encode(candidates, tokenizer, end, config, chat), config, counts, seen)
    if chat and chat.refusal:
        say(f"note: dropped and counted: {chat.refusal}")
    if not dataset.train:
        raise UserError(
            f"data: too little is left: data.held_out={config.held_out} and data.validation={config.validation} prompts "
            "and one to train on are needed "
            f"({', '.join(f'{reason}: {count}' for reason, count in dataset.counts.items())}); "
            "give more data, or loosen the data settings that drop it"
        )
    return dataset


def _check(
    found: Iterator[Exchange], specials: Sequence[str], config: DataConfig, counts: Counter[str]
) -> dict[str, Exchange]:
    """Clean all exchanges, whatever `data.size`; return the valid ones under a hash of their content."""
    checked: dict[str, Exchange] = {}
    keep_blanks = config.template != "chat"  # a chat template strips texts, a text template takes them as they are
    for exchange in found:
        turns = [_clean(turn, specials, keep_blanks) for turn in [*exchange.messages, exchange.answer]]
        turns = [turn for turn in turns if turn["content"].strip() or turn["role"] != "system"]
        exchange = replace(exchange, messages=turns[:-1], answer=turns[-1])
        reason = _why_dropped(exchange, specials, config.filter)
        if reason is None and config.generated == "file":
            other = _clean({"role": "assistant", "content": exchange.rejected or ""}, specials, keep_blanks)
            exchange = replace(exchange, rejected=other["content"])
            reason = _why_dropped(replace(exchange, answer=other), specials, "none")
            reason = reason and f"rejected answer: {reason}"
        tools = [exchange.tools] if exchange.tools else []
        id = _hash(
            json.dumps([[_identity(turn) for turn in turns[:-1]], *_identity(turns[-1])[1:], *tools], default=str)
        )
        if reason is None and id in checked:
            reason = "duplicate"
        if reason is None:
            checked[id] = exchange
        else:
            counts[reason] += 1
    return checked


def _identity(message: Message) -> list[Any]:
    """What makes a message: its role, its text, and whatever else a template may render."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "learn")}
    return [message["role"], message["content"].strip(), *([rest] if rest else [])]


def _has_system(exchange: Exchange) -> bool:
    return any(turn["role"] == "system" for turn in exchange.messages)


def _clean(message: Message, specials: Sequence[str], keep_blanks: bool) -> Message:
    """Return the message without surrounding blanks and, if it is an assistant's, without end marks at its end."""
    text = message["content"]
    bare = text.strip()
    marks = (*specials, *END_MARKS) if message["role"] == "assistant" else ()
    while mark := next((mark for mark in marks if bare.endswith(mark)), None):
        bare = bare.removesuffix(mark).rstrip()
    if keep_blanks:
        start = text[: len(text) - len(text.lstrip())]
        bare = text if bare == text.strip() else start + bare
    return {**message, "content": bare}


def _why_dropped(exchange: Exchange, specials: Sequence[str], filter: str) -> str | None:
    turns = [*exchange.messages, exchange.answer]
    if any(not turn["content"].strip() for turn in turns if turn["role"] != "tool" and "tool_calls" not in turn):
        return "empty"
    texts = [turn["content"] for turn in turns]
    texts += [
        json.dumps(_identity(turn)[2:], ensure_ascii=False, default=str) for turn in turns if len(_identity(turn)) > 2
    ]
    texts += [json.dumps(exchange.tools, ensure_ascii=False, default=str)] * bool(exchange.tools)
    # JSON can hold half a surrogate pair ("\ud83d"), which no tokenizer accepts.
    if any("\ud800" <= character <= "\udfff" for text in texts if not text.isascii() for character in text):
        return "broken characters"
    if any(special in text for text in texts for special in specials):
        return "special token in text"
    if filter == "prose" and not (
        is_prose(texts[len(exchange.messages) - 1]) and is_prose_answer(turns[-1]["content"])
    ):
        return "not prose"
    return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unique_prompts(candidates: list[_Candidate], counts: Counter[str]) -> list[_Candidate]:
    first: dict[tuple[str, ...], _Candidate] = {}
    for candidate in candidates:
        first.setdefault(tuple(turn["content"] for turn in candidate[1].messages), candidate)
    counts["repeated prompt"] += len(candidates) - len(first)
    return list(first.values())


def _encode(
    candidates: list[_Candidate], tokenizer: Any, end: int, config: DataConfig, chat: ChatTemplate | None
) -> Iterator[Example | str]:
    """Yield the example of each candidate, or the reason why it is dropped; tokenise one block at a time."""
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        encoded = encode_exchanges(tokenizer, [exchange for _, exchange in block], config.template, chat)
        examples = [
            ids if isinstance(ids, str) else _example(c, *ids, end, config)
            for c, ids in zip(block, encoded, strict=True)
        ]
        yield from (
            _with_rejected(block, examples, tokenizer, end, config, chat) if config.generated == "file" else examples
        )


def _with_rejected(
    block: list[_Candidate],
    examples: list[Example | str],
    tokenizer: Any,
    end: int,
    config: DataConfig,
    chat: ChatTemplate | None,
) -> Iterator[Example | str]:
    """Yield each example with the ids of its rejected answer, encoded as its human one, or why there are none."""
    others = [(id, replace(exchange, answer=REJECTED | {"content": exchange.rejected})) for id, exchange in block]
    encoded = encode_exchanges(tokenizer, [exchange for _, exchange in others], config.template, chat)
    for example, candidate, ids in zip(examples, others, encoded, strict=True):
        if isinstance(example, str):
            yield example
            continue
        other = ids if isinstance(ids, str) else _example(candidate, *ids, end, config)
        if isinstance(other, str):
            yield f"rejected answer: {other}"
        elif other.prompt_ids != example.prompt_ids:
            yield "rejected answer: after another prompt"
        else:
            yield replace(example, rejected=other.real_ids)


def _example(
    candidate: _Candidate, prompt_ids: list[int], response_ids: list[int], end: int, config: DataConfig
) -> Example | str:
    id, exchange = candidate
    # A prompt is never cut: it ends with the template's header for the answer and may start with the question.
    if len(prompt_ids) > config.max_prompt_length:
        return "prompt too long"
    if end in response_ids:
        return "special token in text"  # in a spelling that only the tokenizer knows
    real_ids = [*response_ids, end]
    limit = config.max_length - len(prompt_ids)
    if config.max_response_length is not None:
        limit = min(limit, config.max_response_length)
    if len(real_ids) > limit:
        if config.overlong == "drop":
            return "answer too long"
        real_ids = real_ids[:limit]  # without the end token: the human did not stop here
    if len(real_ids) < config.min_response_length:
        return "answer too short"
    turns = [turn for turn in exchange.messages if turn["role"] != "system"]
    prompt = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    first = next(turn["content"] for turn in turns if turn["role"] == "user")
    return Example(
        id,
        prompt if len(turns) > 1 else turns[0]["content"],
        tuple(prompt_ids),
        exchange.answer["content"],
        tuple(real_ids),
        # The first user message alone: so no later turn can show a held-out answer as its history.
        opening=_hash(" ".join(first.split()).casefold()),
    )


def _split(
    candidates: list[_Candidate],
    encoded: Iterator[Example | str],
    config: DataConfig,
    counts: Counter[str],
    seen: Collection[str],
) -> Dataset:
    """Take examples in order until the held-out and the training set are full, and count the rest."""
    train: list[Example] = []
    apart: list[Example] = []  # held out, then validation
    openings: set[str] = set()
    needed = config.held_out + config.validation
    tried = trained_before = 0
    for example in encoded:
        tried += 1
        if isinstance(example, str):
            counts[example] += 1
        elif example.opening in openings:
            counts["of a held-out prompt"] += 1
        elif len(apart) < needed and example.opening not in seen:
            openings.add(example.opening)
            apart.append(example)
        else:
            trained_before += len(apart) < needed
            if len(train) == config.size:
                counts["trained on before"] += 1
            else:
                train.append(example)
        if len(train) == config.size and len(apart) == needed:
            break
    counts["not needed"] = len(candidates) - tried
    counts["kept"] = len(train) + len(apart)
    kept_counts = {reason: count for reason, count in counts.items() if count or reason in ("read", "kept")}
    held_out, validation = apart[: config.held_out], apart[config.held_out :]
    return Dataset(train, held_out, kept_counts, trained_before, validation)
