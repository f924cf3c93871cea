"""The SFT set -> examples: text checks, the one template, token ids, and which prompts are held out."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.config.schema import DataConfig
from spin.data.formats import Exchange, Message, exchanges
from spin.data.prose import is_prose, is_prose_answer
from spin.data.sources import read_records
from spin.data.templates import encode_prompts, encode_responses, end_of_turn, special_texts
from spin.runtime.errors import UserError
from spin.runtime.random import seed_of

BLOCK = 512  # prompts tokenised at a time: keeps a tokenizer's threads busy, wastes little once enough are kept

# Ends of an answer that data sets carry over from some model's template, whatever the tokenizer at hand.
END_MARKS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")


@dataclass(frozen=True)
class Example:
    """A prompt and the human answer to it, as text to read and as the token ids that everything computes with."""

    id: str  # of the content, not of file or position
    prompt: str  # to read: the last user message, after what went before it if anything did
    prompt_ids: tuple[int, ...]  # template included; for generation and for training alike
    real: str
    real_ids: tuple[int, ...]  # with one end token at the end, unless the answer was cut
    opening: str = ""  # a hash of the first user message: what makes two prompts one


@dataclass
class Dataset:
    """`counts["read"]` is the sum of all other counts; `counts["kept"]` is `len(train) + len(held_out)`.

    `seen`: how many prompts were not held out because the model was trained on them.
    """

    train: list[Example]
    held_out: list[Example]
    counts: dict[str, int]
    seen: int = 0


@dataclass(frozen=True, slots=True)
class _Candidate:
    id: str
    messages: list[Message]
    response: str

    @property
    def opening(self) -> str:
        """A hash of what makes two prompts one. Of the first turn: no later turn may show a held-out answer as its history."""
        first = next(message["content"] for message in self.messages if message["role"] == "user")
        return hashlib.sha256(" ".join(first.split()).casefold().encode()).hexdigest()[:16]


def load_dataset(
    config: DataConfig,
    tokenizer: Any,
    stop_ids: Collection[int],
    seed: int,
    cache: Path,
    seen: Collection[str] = frozenset(),
) -> Dataset:
    """Read, check, tokenise and divide the data set.

    Candidates are taken in an order that only their content and `seed` decide. The first `config.held_out` prompts
    are held out with everything that answers them (one example a prompt is kept); the next `config.size` examples are
    the training set. So the held-out set is the same for every size, and a smaller training set is part of a larger
    one. `stop_ids` are the tokens at which the model stops when it generates; `seen` the openings of the prompts that it
    was trained on, which are never held out.

    Raises UserError: the source cannot be read, the template does not fit the tokenizer, or too little survives.
    """
    counts: Counter[str] = Counter(read=0, kept=0)
    end = end_of_turn(tokenizer, stop_ids, config.template)  # first: a wrong template fails before the reading
    found = exchanges(read_records(config, cache, counts), config, counts)
    candidates = _check_texts(found, special_texts(tokenizer), config.filter, counts)
    candidates.sort(key=lambda candidate: seed_of(seed, candidate.id))
    if config.filter == "prose":
        candidates = _unique_prompts(candidates, counts)

    train: list[Example] = []
    held_out: list[Example] = []
    held_openings: set[str] = set()
    tried = met = 0
    for candidate, example in _encode_lazily(candidates, tokenizer, end, config):
        tried += 1
        if isinstance(example, str):
            counts[example] += 1  # the reason why there is none
        elif candidate.opening in held_openings:
            counts["of a held-out prompt"] += 1
        elif len(held_out) < config.held_out and candidate.opening not in seen:
            held_openings.add(candidate.opening)
            held_out.append(example)
        else:
            met += len(held_out) < config.held_out
            if len(train) == config.size:
                counts["trained on before"] += 1  # and no more are needed to train on
            else:
                train.append(example)
        if len(train) == config.size and len(held_out) == config.held_out:
            break
    counts["not needed"] = len(candidates) - tried
    counts["kept"] = len(train) + len(held_out)
    counts = Counter({reason: count for reason, count in counts.items() if count or reason in ("read", "kept")})
    if not train:
        raise UserError(
            f"data: too little is left: data.held_out={config.held_out} prompts and one to train on are needed "
            f"({', '.join(f'{reason}: {count}' for reason, count in counts.items())}); "
            "give more data, or loosen the data settings that drop it"
        )
    return Dataset(train, held_out, dict(counts), met)


# --------------------------------------------------------------------------------------------------- text checks


def _check_texts(
    found: Iterator[Exchange], specials: Sequence[str], filter: str, counts: Counter[str]
) -> list[_Candidate]:
    """The checks that need no tokenizer: on everything, so that their counts do not depend on the set's size."""
    candidates: list[_Candidate] = []
    seen: set[str] = set()
    for messages, response in found:
        messages = [_clean(message, specials) for message in messages]
        messages = [message for message in messages if message["content"] or message["role"] != "system"]
        response = _strip_ends(response, specials)
        reason = _fault(messages, response, specials, filter)
        if reason is None:
            candidate = _Candidate(_content_id(messages, response), messages, response)
            reason = "duplicate" if candidate.id in seen else None
        if reason is not None:
            counts[reason] += 1
            continue
        seen.add(candidate.id)
        candidates.append(candidate)
    return candidates


def _clean(message: Message, specials: Sequence[str]) -> Message:
    is_answer = message["role"] == "assistant"
    content = _strip_ends(message["content"], specials) if is_answer else message["content"].strip()
    return {"role": message["role"], "content": content}


def _strip_ends(answer: str, specials: Sequence[str]) -> str:
    """The answer without blanks around it and without end marks at its end: the one end token comes as an id."""
    marks = (*specials, *END_MARKS)
    answer = answer.strip()
    end = len(answer)
    # Positions, not copies: an answer may be a million end marks long.
    while mark := next((mark for mark in marks if answer.endswith(mark, 0, end)), None):
        end -= len(mark)
        while end and answer[end - 1].isspace():
            end -= 1
    return answer[:end]


def _fault(messages: list[Message], response: str, specials: Sequence[str], filter: str) -> str | None:
    texts = [*(message["content"] for message in messages), response]
    if not all(texts):
        return "empty"
    if not all(_is_unicode(text) for text in texts):
        return "broken characters"
    if any(special in text for text in texts for special in specials):
        return "special token in text"
    if filter == "prose" and not (is_prose(messages[-1]["content"]) and is_prose_answer(response)):
        return "not prose"
    return None


def _is_unicode(text: str) -> bool:
    # JSON can hold half a surrogate pair ("\ud83d"), which no tokenizer takes.
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def _content_id(messages: list[Message], response: str) -> str:
    """16 hex digits of the sha256 of what the example says."""
    content = json.dumps([[[message["role"], message["content"]] for message in messages], response])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _unique_prompts(candidates: list[_Candidate], counts: Counter[str]) -> list[_Candidate]:
    first: dict[tuple[str, ...], _Candidate] = {}
    for candidate in candidates:
        prompt = tuple(message["content"] for message in candidate.messages)
        first.setdefault(prompt, candidate)
    counts["repeated prompt"] += len(candidates) - len(first)
    return list(first.values())


def _encode_lazily(
    candidates: list[_Candidate], tokenizer: Any, end: int, config: DataConfig
) -> Iterator[tuple[_Candidate, Example | str]]:
    """Each candidate with its example, or with the reason why there is none; a block is tokenised when its turn comes."""
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        prompts = encode_prompts(tokenizer, [candidate.messages for candidate in block], config.template)
        responses = encode_responses(tokenizer, prompts, [candidate.response for candidate in block], config.template)
        for candidate, (_, prompt_ids), response_ids in zip(block, prompts, responses, strict=True):
            yield candidate, _fit(candidate, prompt_ids, response_ids, end, config)


def _fit(
    candidate: _Candidate, prompt_ids: list[int], response_ids: list[int], end: int, config: DataConfig
) -> Example | str:
    # A prompt is never cut: its end is the template's header for the answer, its start may be the question.
    if len(prompt_ids) > config.max_prompt_length:
        return "prompt too long"
    if end in response_ids:
        return "special token in text"  # some spelling of it that only the tokenizer knows
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
    return Example(
        candidate.id,
        _readable(candidate.messages),
        tuple(prompt_ids),
        candidate.response,
        tuple(real_ids),
        candidate.opening,
    )


def _readable(messages: list[Message]) -> str:
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in turns)
