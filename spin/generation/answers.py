"""Requests for answers, and the answers that a model generated."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from spin.data.examples import Example
from spin.runtime.random import seed_of
from spin.runtime.shards import Shard, ShardDriver
from spin.runtime.tables import with_tuples


@dataclass(frozen=True)
class Answer:
    """Answer number `index` (from 0) to the example `id`: token ids, "stop" or "length", and the text."""

    id: str
    index: int
    ids: tuple[int, ...]
    finish_reason: str
    text: str


@dataclass(frozen=True)
class Request:
    """An example's prompt, to be answered for the `index`-th time (from 0)."""

    example: Example
    index: int

    @property
    def stream(self) -> str:
        """The name of the request's stream of random numbers. A first answer does not depend on how many follow."""
        return f"{self.example.id}#{self.index}" if self.index else self.example.id

    def seed(self, seed: int) -> int:
        """The seed of this request's stream in a run with `seed`: 56 bits."""
        return seed_of(seed, self.stream)


def repeat_prompts(examples: Sequence[Example], num_answers: int) -> list[Request]:
    """`num_answers` requests for each example, one after another."""
    return [Request(example, index) for example in examples for index in range(num_answers)]


def answer_in_shards(
    requests: Sequence[Request],
    decode: Callable[[Sequence[Request]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    keep: ShardDriver,
    shard_size: int,
) -> list[Answer]:
    """Answer `requests` by `decode`, which returns the token ids of each answer, and return the answers in their order.

    Requests are sorted by the length of their prompts, and `keep` gets them in shards of `shard_size`.
    """

    def answer(shard: Sequence[Request]) -> list[dict]:
        rows = []
        for request, ids in zip(shard, decode(shard), strict=True):
            reason = "stop" if ids[-1] in stop_ids else "length"
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            rows.append(asdict(Answer(request.example.id, request.index, tuple(ids), reason, text)))
        return rows

    by_length = sorted(requests, key=lambda request: (len(request.example.prompt_ids), request.stream))
    shards = [by_length[start : start + shard_size] for start in range(0, len(by_length), shard_size)]
    stored = keep([Shard([request.stream for request in shard], partial(answer, shard)) for shard in shards])
    answers = {(row["id"], row["index"]): Answer(**with_tuples(row)) for rows in stored for row in rows}
    return [answers[request.example.id, request.index] for request in requests]


def read_answers(path: Path) -> list[Answer]:
    """The answers in a Parquet file."""
    return [Answer(**with_tuples(row)) for row in pq.read_table(path).to_pylist()]
