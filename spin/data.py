"""The SFT set -> examples: text checks, the one template, token ids, and which prompts are held out."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.config import DataConfig
from spin.errors import UserError, brief
from spin.readers import Exchange, Message, exchanges, read_records

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
BLOCK = 512  # prompts tokenised at a time: keeps a tokenizer's threads busy, wastes little once enough are kept

# Ends of an answer that data sets carry over from some model's template, whatever the tokenizer at hand.
END_MARKS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")
ANCHOR = "\n"  # see encode_responses
SENTINEL = "Sentinel"  # an answer that end_of_turn looks for in a rendered conversation


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


def load(
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
    candidates.sort(key=lambda candidate: hashlib.sha256(f"{seed}:{candidate.id}".encode()).digest())
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


# Blanks before a list's mark, but no line feeds: a text of many empty lines would take minutes.
_MARKUP = re.compile(
    r"[`<>{}\[\]|\\#*=_~^@]|https?:|www\.|\.(?:com|org|net|io)\b|^[^\S\n]*(?:[-•–]|\d+[.)])\s", re.I | re.M
)
_OF_ITSELF = re.compile(
    r"\b(?:as|i'?m|i am|being|just) an? (?:ai|artificial|large language|language model|text-based)\b"
    r"|\blanguage model\b|\bopenai\b|\bchatgpt\b",
    re.I,
)
_SENTENCE_END = re.compile(r"[.!?][\"')]?$")
_ENGLISH = frozenset(
    "the a an of to in is are and or for on with that this it i you he she we they my your be was were do does did "
    "have has can could would should will what how why who when where which not as at by from if about me "
    "than more there some any all so but one please tell give write make need like".split()
)


def is_prose(text: str) -> bool:
    """Whether `text` is English prose: no code, markup, list or link; ASCII letters but for a few; English words."""
    letters = [character for character in text if character.isalpha()]
    if _MARKUP.search(text) or not letters:
        return False
    if sum(letter.isascii() for letter in letters) < 0.95 * len(letters):
        return False
    words = re.findall(r"[a-z']+", text.casefold())
    return sum(word in _ENGLISH for word in words) >= 0.12 * len(words)


def is_prose_answer(text: str) -> bool:
    """Whether `text` is prose that ends as a sentence does and speaks of its subject, not of being a model."""
    return bool(_SENTENCE_END.search(text)) and not _OF_ITSELF.search(text) and is_prose(text)


# ---------------------------------------------------------------------------------------- template and token ids


def encode(tokenizer: Any, conversations: Sequence[list[Message]], template: str) -> list[tuple[str, list[int]]]:
    """Render and tokenise prompts: for each list of messages, which ends with the user's, its text and its token ids.

    The one place where a prompt becomes token ids. `template` is `chat` (the tokenizer's own), `paper`, or a text with
    `{prompt}` in it. Earlier turns of a text template are rendered as template, answer, end token; a system message
    goes before the first user message. A beginning-of-sequence token is there once, if the tokenizer uses one.

    Raises UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    texts = [render(tokenizer, messages, template) for messages in conversations]
    return list(zip(texts, _tokenise(tokenizer, texts, template), strict=True))


def render(tokenizer: Any, messages: list[Message], template: str) -> str:
    """The prompt's text, up to where the answer starts. Raises UserError as `encode` does."""
    if template == "chat":
        return render_chat(tokenizer, messages, add_generation_prompt=True)
    pattern = PAPER_TEMPLATE if template == "paper" else template.replace("\\n", "\n")  # as a command line has it
    system = ""
    text = ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            # replace, not format: a template may hold other braces
            text += pattern.replace("{prompt}", system + message["content"])
            system = ""
        else:
            text += message["content"] + tokenizer.eos_token
    return text


def render_chat(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "data.template=chat: the model's tokenizer has no chat template; set data.template=paper or a text with "
            "{prompt} in it"
        )
    try:
        # Some templates print today's date: then no two days would give the same prompts.
        pattern = tokenizer.get_chat_template()
        if "strftime_now" in pattern:
            pattern = "{% macro strftime_now(format) %}01 Jan 2026{% endmacro %}" + pattern
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=pattern, **options)
    except Exception as error:  # a template is a program of the model's maker: whatever it raises is about it
        roles = brief(", ".join(message["role"] for message in messages))
        raise UserError(
            f"data.template=chat: the tokenizer's chat template refuses messages of {roles} ({brief(error)}); "
            "set data.template=paper or a text with {prompt} in it"
        ) from error


def _tokenise(tokenizer: Any, texts: list[str], template: str) -> list[list[int]]:
    """Ids of whole texts that start with a rendered prompt: with one BOS if the tokenizer adds one, never an EOS."""
    found = plain_ids(tokenizer, texts)
    bos = tokenizer.bos_token_id
    # A chat template's text contains the BOS where the model expects one. A text template's does not, as a rule.
    if template != "chat" and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        found = [ids if ids[:1] == [bos] else [bos, *ids] for ids in found]
    return found


def plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode_responses(
    tokenizer: Any, prompts: Sequence[tuple[str, list[int]]], responses: Sequence[str], template: str
) -> list[list[int]]:
    """Token ids of each response after its prompt (text and ids, from `encode`), without an end token.

    The ids of a prompt are a prefix of the sequence, always: a response is what follows them in the tokenised whole if
    they are a prefix of it. If text and prompt merge at the boundary, the response is tokenised after a line feed whose
    ids are then taken off, so that a sentencepiece tokenizer puts no blank of its own before it; else by itself.
    """
    wholes = _tokenise(
        tokenizer, [text + response for (text, _), response in zip(prompts, responses, strict=True)], template
    )
    found = []
    for (_, prompt_ids), whole, response in zip(prompts, wholes, responses, strict=True):
        if whole[: len(prompt_ids)] == prompt_ids:
            found.append(whole[len(prompt_ids) :])
            continue
        anchor, anchored = plain_ids(tokenizer, [ANCHOR, ANCHOR + response])
        if anchored[: len(anchor)] == anchor:
            found.append(anchored[len(anchor) :])
        else:
            found.append(plain_ids(tokenizer, [response])[0])
    return found


def end_of_turn(tokenizer: Any, stop_ids: Collection[int], template: str) -> int:
    """The token that ends an answer.

    For the chat template it is the first of `stop_ids` after a rendered assistant message, for it is the template that
    the model was trained with; where there is none, and for text templates, the tokenizer's end-of-sequence token.

    Raises UserError: there is no such token, or no chat template.
    """
    if template == "chat":
        messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": SENTINEL}]
        tail = render_chat(tokenizer, messages).rpartition(SENTINEL)[2]
        for token in plain_ids(tokenizer, [tail])[0]:
            if token in stop_ids:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token: set its eos_token, or take another model")
    return tokenizer.eos_token_id


def special_texts(tokenizer: Any) -> list[str]:
    """The texts that this tokenizer turns into control tokens wherever they stand, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = {text for text in [*tokenizer.all_special_tokens, *added] if text.strip()}
    return sorted(found, key=lambda text: (-len(text), text))


def _encode_lazily(
    candidates: list[_Candidate], tokenizer: Any, end: int, config: DataConfig
) -> Iterator[tuple[_Candidate, Example | str]]:
    """Each candidate with its example, or with the reason why there is none; a block is tokenised when its turn comes."""
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        prompts = encode(tokenizer, [candidate.messages for candidate in block], config.template)
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
