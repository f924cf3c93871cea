"""Examples: token ids, and which prompts are held out."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spin.config.schema import DataConfig
from spin.data.candidates import Candidate, Candidates, hash_of, read_candidates
from spin.data.counts import text_of
from spin.data.messages import Exchange, Message
from spin.data.templates import ChatTemplate, encode_exchanges, end_of_turn, special_texts, tokenizer_digest
from spin.runtime.cache import cached_folder
from spin.runtime.errors import UserError
from spin.runtime.progress import with_progress_lines
from spin.runtime.random import seed_of
from spin.runtime.tables import Rows, schema_of, write_arrow

REJECTED: Message = {"role": "assistant"}
BLOCK = 512  # prompts tokenised together: enough for the tokenizer's threads
VERSION = 1  # raise it when equal candidates come to give other token ids


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


# Of a candidate that gives no example: the reason why. Of one that does: its highest token id.
ENCODED = schema_of(Example).append(pa.field("dropped", pa.string())).append(pa.field("highest", pa.int64()))


@dataclass
class Dataset:
    """The training, held-out and validation examples, and how many exchanges were kept or dropped for which reason.

    `counts["read"]` is the sum of all other counts; `counts["kept"]` is the number of examples in the three sets.
    `seen` counts the prompts that could not be held out because the model was trained on them. `dropped` has the text of
    one dropped answer, or record, for each reason.
    """

    train: Rows[Example]
    held_out: Rows[Example]
    counts: dict[str, int]
    seen: int
    validation: Rows[Example]
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> Rows[Example]:
        return self.train + self.held_out + self.validation


@dataclass(frozen=True)
class Encoding:
    """What makes token ids of exchanges: the tokenizer, the token that ends an answer, and the template."""

    tokenizer: Any
    end: int
    chat: ChatTemplate | None
    config: DataConfig

    @property
    def inputs(self) -> dict:
        """All that decides the token ids of an exchange."""
        config = self.config
        names = ("template", "template_options", "max_prompt_length", "max_response_length", "min_response_length")
        settings = config.model_dump(include={*names, "max_length", "overlong", "generated"})
        return {"version": VERSION, "tokenizer": tokenizer_digest(self.tokenizer), "end": self.end, **settings}

    def encode(self, rows: Rows[Candidate]) -> Iterator[dict]:
        """Yield a row of ENCODED for each candidate; tokenise one block at a time."""
        for table in rows.blocks(["id", "exchange"], BLOCK):
            ids = table["id"].to_pylist()
            block = [Exchange(**json.loads(text)) for text in table["exchange"].to_pylist()]
            for id, example in zip(ids, self._examples(ids, block), strict=True):
                if isinstance(example, str):
                    yield vars(Example(id, "", (), "", ())) | {"dropped": example, "highest": 0}
                else:
                    highest = max(*example.prompt_ids, *example.real_ids)
                    yield vars(example) | {"dropped": None, "highest": highest}

    def _examples(self, ids: list[str], block: list[Exchange]) -> Iterator[Example | str]:
        """Yield the example of each exchange, or the reason why it is dropped."""
        encoded = encode_exchanges(self.tokenizer, block, self.config.template, self.chat)
        examples = [
            tokens if isinstance(tokens, str) else self._example(id, exchange, *tokens)
            for id, exchange, tokens in zip(ids, block, encoded, strict=True)
        ]
        return self._with_rejected(block, examples) if self.config.generated == "file" else iter(examples)

    def _with_rejected(self, block: list[Exchange], examples: list[Example | str]) -> Iterator[Example | str]:
        """Yield each example with the ids of its rejected answer, encoded as its human one, or why there are none."""
        others = [replace(exchange, answer=REJECTED | {"content": exchange.rejected}) for exchange in block]
        encoded = encode_exchanges(self.tokenizer, others, self.config.template, self.chat)
        for example, exchange, tokens in zip(examples, others, encoded, strict=True):
            if isinstance(example, str):
                yield example
                continue
            other = tokens if isinstance(tokens, str) else self._example(example.id, exchange, *tokens)
            if isinstance(other, str):
                yield f"rejected answer: {other}"
            elif other.prompt_ids != example.prompt_ids:
                yield "rejected answer: after another prompt"
            else:
                yield replace(example, rejected=other.real_ids)

    def _example(self, id: str, exchange: Exchange, prompt_ids: list[int], response_ids: list[int]) -> Example | str:
        config = self.config
        # A prompt is never cut: it ends with the template's header for the answer and may start with the question.
        if len(prompt_ids) > config.max_prompt_length:
            return "prompt too long"
        if self.end in response_ids:
            return "special token in text"  # in a spelling that only the tokenizer knows
        real_ids = [*response_ids, self.end]
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
            opening=hash_of(" ".join(first.split()).casefold()),
        )


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
    model was trained on, which are never held out. `cache` keeps downloaded files, and what was read and tokenised, by content.
    `say` gets a line for each thing in the data or the template that a user should know of.

    Raises UserError: the source cannot be read, the template does not fit the tokenizer, or too few examples are left.
    """
    # First: a wrong template fails before the reading.
    end = end_of_turn(tokenizer, stop_ids, config.template, config.template_options)
    chat = ChatTemplate(tokenizer, config.template_options) if config.template == "chat" else None
    for note in chat.notes(stop_ids) if chat else ():
        say(note)
    takes_tools = chat is not None and chat.takes_tools
    candidates = read_candidates(config, special_texts(tokenizer), takes_tools, cache, say)
    if chat and not chat.takes_system and "system" in candidates.names:
        say("note: the chat template takes no system message: its text goes before the next user message")
    if "reasoning_content" in candidates.names and not (chat and chat.takes_thoughts):
        say("note: the template has no place for reasoning_content: answers are learnt without these thoughts")
    ids, counts = candidates.rows.column("id"), Counter({"read": 0, "kept": 0} | candidates.counts)
    order = sorted(range(len(ids)), key=lambda row: seed_of(seed, ids[row]))
    if config.filter == "prose":
        order = _unique_prompts(order, candidates, counts)
    encoding = Encoding(tokenizer, end, chat, config)
    dataset = _encode_and_split(np.array(order, np.int64), candidates, encoding, counts, seen, cache, seed, say)
    if not dataset.train:
        raise UserError(
            f"data: too little is left: data.held_out={config.held_out} and data.validation={config.validation} prompts "
            "and one to train on are needed "
            f"({', '.join(f'{reason}: {count}' for reason, count in dataset.counts.items())}); "
            "give more data, or loosen the data settings that drop it"
        )
    return dataset


def _unique_prompts(order: list[int], candidates: Candidates, counts: Counter[str]) -> list[int]:
    prompts, first = candidates.rows.column("prompt"), dict[str, int]()
    for row in order:
        first.setdefault(prompts[row], row)
    counts["repeated prompt"] += len(order) - len(first)
    for row in [row for row in order if first[prompts[row]] != row][:1]:
        candidates.dropped["repeated prompt"] = text_of(Exchange(**json.loads(candidates.rows[row].exchange)))
    return list(first.values())


def _encode_and_split(
    order: np.ndarray,
    candidates: Candidates,
    encoding: Encoding,
    counts: Counter[str],
    seen: Collection[str],
    cache: Path,
    seed: int,
    say: Callable[[str], None],
) -> Dataset:
    """Encode all candidates, once for all seeds; or only the first ones in this order if far fewer are needed."""
    config = encoding.config
    needed = config.held_out + config.validation + (config.size or len(order))
    few = 2 * needed + BLOCK
    for chosen in [order[:few], None] if 4 * few < len(order) else [None]:
        rows = candidates.rows if chosen is None else candidates.rows.at(chosen)
        subset = None if chosen is None else [seed, len(chosen), config.filter]
        inputs = {"candidates": candidates.key, "subset": subset, **encoding.inputs}

        def build(folder: Path, rows: Rows[Candidate] = rows) -> dict:
            encoded = with_progress_lines(encoding.encode(rows), say, f"data: {{}} of {len(rows)} answers tokenised")
            write_arrow(encoded, ENCODED, folder / "examples.arrow")
            return {"refusal": encoding.chat.refusal if encoding.chat else ""}

        folder, facts = cached_folder(cache, "examples", inputs, build, say)
        examples = Rows.open(Example, folder / "examples.arrow")
        in_order = examples.at(order) if chosen is None else examples
        dataset, first_rows = _split(in_order, len(order), config, Counter(counts), seen)
        if dataset.counts["kept"] == needed:
            break
    dropped = {reason: candidates.rows[int(order[row])].exchange for reason, row in first_rows.items()}
    dataset.dropped = candidates.dropped | {why: text_of(Exchange(**json.loads(row))) for why, row in dropped.items()}
    if facts["refusal"]:
        say(f"note: dropped and counted: {facts['refusal']}")
    return dataset


def _split(
    examples: Rows[Example], available: int, config: DataConfig, counts: Counter[str], seen: Collection[str]
) -> tuple[Dataset, dict[str, int]]:
    """Take examples in order until the held-out and the training set are full, and count the rest of those `available`.

    Returns the data set, and the first row that was dropped for each reason.
    """
    first_rows: dict[str, int] = {}
    train: list[int] = []
    apart: list[int] = []  # held out, then validation
    openings: set[str] = set()
    needed = config.held_out + config.validation
    tried = trained_before = 0
    for row, (dropped, opening) in enumerate(zip(examples.column("dropped"), examples.column("opening"), strict=True)):
        tried += 1
        if dropped is None and opening in openings:
            dropped = "of a held-out prompt"
        if dropped is not None:
            counts[dropped] += 1
            first_rows.setdefault(dropped, row)
        elif len(apart) < needed and opening not in seen:
            openings.add(opening)
            apart.append(row)
        else:
            trained_before += len(apart) < needed
            if len(train) == config.size:
                counts["trained on before"] += 1
            else:
                train.append(row)
        if len(train) == config.size and len(apart) == needed:
            break
    counts["not needed"] = available - tried
    counts["kept"] = len(train) + len(apart)
    kept_counts = {reason: count for reason, count in counts.items() if count or reason in ("read", "kept")}
    chosen = [np.array(rows, np.int64) for rows in (train, apart[: config.held_out], apart[config.held_out :])]
    taken, held_out, validation = map(examples.at, chosen)
    return Dataset(taken, held_out, kept_counts, trained_before, validation), first_rows
