"""Encode exchanges as token ids, and split them into training, held-out and validation examples."""

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spin.config.schema import DataConfig
from spin.data.candidates import Candidate, Candidates, hash_of, read_candidates
from spin.data.messages import Exchange, Message, as_text
from spin.data.templates import ChatTemplate, encode_exchanges, end_of_turn, special_texts, tokenizer_digest
from spin.runtime.cache import cached_folder
from spin.runtime.errors import UserError
from spin.runtime.progress import with_progress_lines
from spin.runtime.random import seed_of
from spin.runtime.tables import Rows, schema_of, write_arrow

REJECTED: Message = {"role": "assistant"}
TokenIds = tuple[tuple[int, ...], tuple[int, ...]]  # of a prompt and its answer
BLOCK = 512  # exchanges tokenised together: enough for the tokenizer's threads
VERSION = 2  # increment it when equal candidates give different token ids


@dataclass(frozen=True)
class Example:
    """A prompt and its human answer, as text and as token ids."""

    id: str  # hash of the content, independent of file and position
    prompt: str  # for display: the user message, after the earlier turns if any
    prompt_ids: tuple[int, ...]  # rendered with the template; the same for generation and training
    real: str
    real_ids: tuple[int, ...]  # ends with one end token, unless the answer was truncated
    opening: str = ""  # hash of the first user message; examples with the same one count as the same prompt
    rejected: tuple[int, ...] = ()  # with data.generated=file: token ids of the rejected answer


# `dropped` is the reason why a candidate gives no example, otherwise null; `highest` is an example's highest token id.
ENCODED = schema_of(Example).append(pa.field("dropped", pa.string())).append(pa.field("highest", pa.int64()))


@dataclass
class Dataset:
    """The training, held-out and validation examples, and the numbers of exchanges kept and dropped."""

    train: Rows[Example]
    held_out: Rows[Example]
    counts: dict[str, int]  # by reason; "kept": those in the three sets; "read": the sum of all others
    seen: int  # number of examples not held out because the model was trained on their prompts
    validation: Rows[Example]
    end: int  # the token that ends an answer
    dropped: dict[str, str] = field(default_factory=dict)  # by reason, the text of one dropped answer or record

    @property
    def all(self) -> Rows[Example]:
        return self.train + self.held_out + self.validation


@dataclass(frozen=True)
class Encoder:
    """Converts exchanges to token ids."""

    config: DataConfig
    tokenizer: Any
    end: int  # the token that ends an answer
    chat: ChatTemplate | None
    cache: Path
    say: Callable[[str], None]

    def encode_once(self, rows: Rows[Candidate], inputs: dict) -> tuple[Rows[Example], str]:
        """Return the ENCODED candidates, cached by `inputs` and settings, and the template's first refusal."""
        names = ("template", "template_options", "max_prompt_length", "max_response_length", "min_response_length")
        settings = self.config.model_dump(include={*names, "max_length", "overlong", "generated"})
        inputs |= {"version": VERSION, "tokenizer": tokenizer_digest(self.tokenizer), "end": self.end, **settings}

        def build(folder: Path) -> dict:
            text = f"data: {{}} of {len(rows)} answers tokenised"
            encoded = with_progress_lines(self.encode(rows), self.say, text)
            write_arrow(encoded, ENCODED, folder / "examples.arrow")
            return {"refusal": self.chat.refusal if self.chat else ""}

        folder, facts = cached_folder(self.cache, "examples", inputs, build, self.say)
        return Rows.open(Example, folder / "examples.arrow"), facts["refusal"]

    def encode(self, rows: Rows[Candidate]) -> Iterator[dict]:
        """Yield a row of ENCODED for each candidate, tokenising one block at a time."""
        for table in rows.blocks(["id", "exchange"], BLOCK):
            exchanges = [Exchange(**json.loads(text)) for text in table["exchange"].to_pylist()]
            answers = self._token_ids(exchanges)
            rejected: list[Any] = [None] * len(exchanges)
            if self.config.generated == "file":
                rejected = self._token_ids([replace(e, answer=REJECTED | {"content": e.rejected}) for e in exchanges])
            yield from map(_row, table["id"].to_pylist(), exchanges, answers, rejected)

    def _token_ids(self, exchanges: list[Exchange]) -> list[TokenIds | str]:
        """Return the token ids of each prompt and its answer, or the reason why the exchange is dropped."""
        encoded = encode_exchanges(self.tokenizer, exchanges, self.config.template, self.chat)
        return [tokens if isinstance(tokens, str) else self._within_limits(*tokens) for tokens in encoded]

    def _within_limits(self, prompt_ids: list[int], response_ids: list[int]) -> TokenIds | str:
        config = self.config
        # A prompt is never truncated: it may start with the question, and it ends with the answer's header.
        if len(prompt_ids) > config.max_prompt_length:
            return "prompt too long"
        if self.end in response_ids:
            return "special token in text"  # in another spelling that the tokenizer recognises
        real_ids = [*response_ids, self.end]
        limit = config.max_length - len(prompt_ids)
        if config.max_response_length is not None:
            limit = min(limit, config.max_response_length)
        if len(real_ids) > limit:
            if config.overlong == "drop":
                return "answer too long"
            real_ids = real_ids[:limit]  # without the end token, since the human answer continues
        if len(real_ids) < config.min_response_length:
            return "answer too short"
        return tuple(prompt_ids), tuple(real_ids)


def _row(id: str, exchange: Exchange, tokens: TokenIds | str, rejected: TokenIds | str | None) -> dict:
    """Return a candidate's row of ENCODED. `rejected` is like `tokens`, but for the rejected answer, if any."""
    if isinstance(tokens, str):
        return _dropped_row(id, tokens)
    if isinstance(rejected, str):
        return _dropped_row(id, f"rejected answer: {rejected}")
    prompt_ids, real_ids = tokens
    if rejected and rejected[0] != prompt_ids:
        return _dropped_row(id, "rejected answer: after another prompt")
    turns = [turn for turn in exchange.messages if turn["role"] != "system"]
    first = next(turn["content"] for turn in turns if turn["role"] == "user")
    example = Example(
        id,
        as_text(turns) if len(turns) > 1 else first,
        prompt_ids,
        exchange.answer["content"],
        real_ids,
        # Only the first user message, so that no training example has a held-out answer in its history.
        opening=hash_of(" ".join(first.split()).casefold()),
        rejected=rejected[1] if rejected else (),
    )
    return vars(example) | {"dropped": None, "highest": max(*prompt_ids, *real_ids, *example.rejected)}


def _dropped_row(id: str, reason: str) -> dict:
    return vars(Example(id, "", (), "", ())) | {"dropped": reason, "highest": 0}


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

    The order depends only on `seed` and the content. The first `config.held_out` prompts are held out, and the next
    `config.validation` prompts are for validation, with one example each; other examples of these prompts are dropped.
    The next `config.size` examples are the training set, so a smaller training set is a subset of a larger one.

    `stop_ids` are the tokens at which the model stops. `seen` has the `opening` of the prompts that it was trained on,
    which are not held out. `cache` stores files, records and token ids. `say` receives notes on data and template.

    Raises UserError if the source cannot be read, the template does not fit the tokenizer, or too few examples remain.
    """
    # First, so that a wrong template fails before the data is read.
    chat = ChatTemplate(tokenizer, config.template_options) if config.template == "chat" else None
    end = end_of_turn(tokenizer, chat)
    for note in chat.notes(stop_ids) if chat else ():
        say(note)
    takes_tools = chat is not None and chat.takes_tools
    candidates = read_candidates(config, special_texts(tokenizer), takes_tools, cache, say)
    if chat and not chat.takes_system and "system" in candidates.names:
        say("note: the chat template takes no system message: its text goes before the next user message")
    if "reasoning_content" in candidates.names and not (chat and chat.takes_thoughts):
        say("note: the template has no place for reasoning_content: answers are learnt without these thoughts")
    ids = candidates.rows.column("id")
    order = sorted(range(len(ids)), key=lambda row: seed_of(seed, ids[row]))
    if config.filter == "prose":
        order = _unique_prompts(order, candidates)
    encoder = Encoder(config, tokenizer, end, chat, cache, say)
    dataset = _encode_and_split(np.array(order, np.int64), candidates, encoder, seed, seen)
    if not dataset.train:
        raise UserError(
            f"data: too little is left: data.held_out={config.held_out} and data.validation={config.validation} prompts "
            "and one to train on are needed "
            f"({', '.join(f'{reason}: {count}' for reason, count in dataset.counts.items())}); "
            "give more data, or loosen the data settings that drop it"
        )
    return dataset


def _unique_prompts(order: list[int], candidates: Candidates) -> list[int]:
    """Return the first row of each prompt, and count the others as repeated."""
    prompts, first = candidates.rows.column("prompt"), dict[str, int]()
    for row in order:
        first.setdefault(prompts[row], row)
    candidates.counts["repeated prompt"] += len(order) - len(first)
    repeated = next((row for row in order if first[prompts[row]] != row), None)
    if repeated is not None:
        candidates.dropped["repeated prompt"] = candidates.text(repeated)
    return list(first.values())


def _encode_and_split(
    order: np.ndarray, candidates: Candidates, encoder: Encoder, seed: int, seen: Collection[str]
) -> Dataset:
    """Encode and split all candidates, encoded once for all seeds, or only the first ones if far fewer are needed."""
    config = encoder.config
    needed = config.held_out + config.validation + (config.size or len(order))
    few = 2 * needed + BLOCK
    for chosen in [order[:few], None] if 4 * few < len(order) else [None]:
        rows = candidates.rows if chosen is None else candidates.rows.at(chosen)
        subset = None if chosen is None else [seed, len(chosen), config.filter]
        examples, refusal = encoder.encode_once(rows, {"candidates": candidates.key, "subset": subset})
        dataset = _split(examples.at(order) if chosen is None else examples, order, candidates, encoder, seen)
        if dataset.counts["kept"] == needed:
            break
    if refusal:
        encoder.say(f"note: dropped and counted: {refusal}")
    return dataset


def _split(
    examples: Rows[Example], order: np.ndarray, candidates: Candidates, encoder: Encoder, seen: Collection[str]
) -> Dataset:
    """Fill the three sets from `examples`, and count the others. `order` has the row of each example's candidate."""
    config, counts, dropped_rows = encoder.config, candidates.counts.copy(), dict[str, int]()
    train: list[int] = []
    reserved: list[int] = []  # held-out, then validation examples
    openings: set[str] = set()
    needed = config.held_out + config.validation
    examined = trained_before = 0
    columns = examples.column("dropped"), examples.column("opening")
    for row, (dropped, opening) in enumerate(zip(*columns, strict=True)):
        examined += 1
        if dropped is None and opening in openings:
            dropped = "of a held-out prompt"
        if dropped is not None:
            counts[dropped] += 1
            dropped_rows.setdefault(dropped, int(order[row]))
        elif len(reserved) < needed and opening not in seen:
            openings.add(opening)
            reserved.append(row)
        else:
            trained_before += len(reserved) < needed
            if len(train) == config.size:
                counts["trained on before"] += 1
            else:
                train.append(row)
        if len(train) == config.size and len(reserved) == needed:
            break
    counts["not needed"] = len(order) - examined
    counts["kept"] = len(train) + len(reserved)
    nonzero = {reason: count for reason, count in counts.items() if count or reason in ("read", "kept")}
    texts = candidates.dropped | {reason: candidates.text(row) for reason, row in dropped_rows.items()}
    parts = (train, reserved[: config.held_out], reserved[config.held_out :])
    taken, held_out, validation = (examples.at(np.array(rows, np.int64)) for rows in parts)
    return Dataset(taken, held_out, nonzero, trained_before, validation, encoder.end, texts)
