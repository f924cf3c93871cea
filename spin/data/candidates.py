"""Candidates: the exchanges of a data set with valid texts, read once and cached by a hash of the inputs."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin.config.schema import DataConfig
from spin.data.counts import Counts, excerpt_of
from spin.data.formats import exchanges
from spin.data.messages import Exchange, Message
from spin.data.prose import is_prose, is_prose_answer
from spin.data.sources import find_source
from spin.runtime.cache import cached_folder
from spin.runtime.errors import brief
from spin.runtime.progress import with_progress_lines
from spin.runtime.tables import Rows, schema_of, write_arrow

# End tokens of common chat templates, which texts in data sets may contain, whatever tokenizer is used here.
END_MARKS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair in JSON, which no tokenizer accepts
VERSION = 5  # increment it when equal sources give different candidates


@dataclass(frozen=True)
class Candidate:
    """An exchange as JSON. `id` is a hash of its content, and `prompt` a hash of the texts before the answer."""

    id: str
    prompt: str
    exchange: str


@dataclass(frozen=True)
class Candidates:
    """All candidates of a data set in the order of its records."""

    rows: Rows[Candidate]
    counts: Counter[str]  # numbers of answers read, and dropped for each reason
    names: set[str]  # roles and keys of all messages
    key: str  # a hash of the inputs
    dropped: dict[str, str]  # by reason, the text of one dropped answer or record

    def text(self, row: int) -> str:
        return excerpt_of(Exchange(**json.loads(self.rows[row].exchange)))


def read_candidates(
    config: DataConfig, specials: Sequence[str], renders_tools: bool, cache: Path, say: Callable[[str], None]
) -> Candidates:
    """Read and check the data set, or reuse the result of an earlier run.

    `specials` are the texts of special tokens. Raises UserError if the source cannot be read.
    """
    source = find_source(config, cache)
    keep_blanks = config.template != "chat"  # chat templates strip texts
    inputs = {
        "version": VERSION,
        "source": [source.digest, config.config],
        "settings": [config.splits, config.format, config.turns, config.filter, config.generated, config.path is None],
        "tokenizer": [list(specials), keep_blanks, renders_tools],
    }

    def build(folder: Path) -> dict:
        counts, notes = Counts(read=0), list[str]()
        records = with_progress_lines(source.read(counts), say, "data: {} records read")
        checker = _Checker(specials, config, keep_blanks, counts)
        answers = exchanges(records, config, counts, renders_tools, notes.append)
        write_arrow(checker.check(answers), schema_of(Candidate), folder / "candidates.arrow")
        return {"counts": counts, "dropped": counts.examples, "notes": notes, "names": sorted(checker.names)}

    if source.left_out:
        say(f"note: data files of the folder that are not read: {brief(', '.join(source.left_out), 300)}")
    folder, facts = cached_folder(cache, "records", inputs, build, say)
    for note in facts["notes"]:
        say(note)
    rows = Rows.open(Candidate, folder / "candidates.arrow")
    counts = Counter({"read": 0, "kept": 0} | facts["counts"])
    return Candidates(rows, counts, set(facts["names"]), folder.name, facts["dropped"])


class _Checker:
    """A filter that cleans exchanges, and drops and counts those that are invalid or duplicates."""

    def __init__(self, specials: Sequence[str], config: DataConfig, keep_blanks: bool, counts: Counts):
        self.specials, self.config, self.keep_blanks, self.counts = specials, config, keep_blanks, counts
        self.names: set[str] = set()

    def check(self, exchanges: Iterable[Exchange]) -> Iterator[dict]:
        """Yield a `Candidate` row for each valid exchange."""
        ids: set[str] = set()
        for exchange in exchanges:
            exchange, reason = self._checked(exchange)
            turns = exchange.messages
            tools = [exchange.tools] if exchange.tools else []
            identity = [[_identity(turn) for turn in turns], *_identity(exchange.answer)[1:], *tools]
            id = hash_of(json.dumps(identity, default=str))
            if reason is None and id in ids:
                reason = "duplicate"
            if reason is not None:
                self.counts.drop(reason, exchange)
                continue
            ids.add(id)
            self.names.update(*([turn["role"], *turn] for turn in [*turns, exchange.answer]))
            prompt = hash_of(json.dumps([turn["content"] for turn in turns]))
            yield {"id": id, "prompt": prompt, "exchange": json.dumps(vars(exchange), default=str)}

    def _checked(self, exchange: Exchange) -> tuple[Exchange, str | None]:
        """Return the exchange with cleaned texts, and the reason why it is dropped, if any."""
        turns = [self._clean(turn) for turn in [*exchange.messages, exchange.answer]]
        turns = [turn for turn in turns if turn["content"].strip() or turn["role"] != "system"]
        exchange = replace(exchange, messages=turns[:-1], answer=turns[-1])
        reason = self._why_dropped(exchange, self.config.filter)
        if reason is None and self.config.generated == "file":
            rejected = self._clean({"role": "assistant", "content": exchange.rejected or ""})
            exchange = replace(exchange, rejected=rejected["content"])
            reason = self._why_dropped(replace(exchange, answer=rejected), "none")
            reason = reason and f"rejected answer: {reason}"
        return exchange, reason

    def _clean(self, message: Message) -> Message:
        """Strip surrounding blanks, unless `keep_blanks`, and the end marks at the end of an assistant's message."""
        text = message["content"] if self.keep_blanks else message["content"].strip()
        end_marks = END_MARKS[1:] if "<s>" in text else END_MARKS  # in HTML, </s> ends a struck-through text
        marks = (*self.specials, *end_marks) if message["role"] == "assistant" else ()
        while mark := next((mark for mark in marks if text.rstrip().endswith(mark)), None):
            text = text.rstrip().removesuffix(mark).rstrip()
        return {**message, "content": text}

    def _why_dropped(self, exchange: Exchange, filter: str) -> str | None:
        turns = [*exchange.messages, exchange.answer]
        needing_text = [turn for turn in turns if turn["role"] != "tool" and "tool_calls" not in turn]
        if any(not turn["content"].strip() for turn in needing_text):
            return "empty"
        contents = [turn["content"] for turn in turns]
        extras = [extra for turn in turns for extra in _identity(turn)[2:]]
        extras += [exchange.tools] * bool(exchange.tools)
        texts = contents + [json.dumps(extra, ensure_ascii=False, default=str) for extra in extras]
        if any(map(SURROGATE.search, texts)):
            return "broken characters"
        if any(special in text for text in texts for special in self.specials):
            return "special token in text"
        if filter == "prose" and not (is_prose(contents[-2]) and is_prose_answer(contents[-1])):
            return "not prose"
        return None


def _identity(message: Message) -> list[Any]:
    """Return a message's role, its text, and everything else that a template may render."""
    extras = {key: value for key, value in message.items() if key not in ("role", "content", "learn")}
    return [message["role"], message["content"].strip(), *([extras] if extras else [])]


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
