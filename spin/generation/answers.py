"""Requests for answers, and the answers that a model generated."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from spin.data.examples import Example
from spin.runtime.random import seed_of
from spin.runtime.shards import Shard, ShardDriver
from spin.runtime.tables import Rows, read_parquet, schema_of


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
    """The prompt of the example at `row` of `examples`, to be answered for the `index`-th time (from 0)."""

    id: str
    index: int
    row: int
    examples: Sequence[Example]

    @property
    def example(self) -> Example:
        return self.examples[self.row]

    @property
    def stream(self) -> str:
        """The name of the request's stream of random numbers. A first answer does not depend on how many follow."""
        return f"{self.id}#{self.index}" if self.index else self.id

    def seed(self, seed: int) -> int:
        """The seed of this request's stream in a run with `seed`: 56 bits."""
        return seed_of(seed, self.stream)


def repeat_prompts(examples: Sequence[Example], num_answers: int) -> list[Request]:
    """`num_answers` requests for each example, one after another."""
    rows = Rows.of(Example, examples)
    ids = enumerate(rows.column("id"))
    return [Request(id, index, row, rows) for row, id in ids for index in range(num_answers)]


def answer_in_shards(
    requests: Sequence[Request],
    decode: Callable[[Sequence[Request]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    keep: ShardDriver,
    shard_size: int,
) -> Rows[Answer]:
    """Answer `requests` by `decode`, which returns the token ids of each answer, and return the answers in their order.

    Requests are sorted by the length of their prompts, and `keep` gets them in shards of `shard_size`.
    """

    def answer(shard: Sequence[Request]) -> list[dict]:
        rows = []
        for request, ids in zip(shard, decode(shard), strict=True):
            reason = "stop" if ids[-1] in stop_ids else "length"
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            rows.append(vars(Answer(request.id, request.index, tuple(ids), reason, text)))
        return rows

    lengths = Rows.of(Example, requests[0].examples if requests else []).lengths("prompt_ids")
    order = sorted(range(len(requests)), key=lambda n: (lengths[requests[n].row], requests[n].stream))
    by_length = [requests[n] for n in order]
    shards = [by_length[start : start + shard_size] for start in range(0, len(by_length), shard_size)]
    stored = keep([Shard([request.stream for request in shard], partial(answer, shard)) for shard in shards])
    batches = [pa.RecordBatch.from_pylist(rows, schema=schema_of(Answer)) for rows in stored]
    return Rows(Answer, batches).at(np.argsort(order))


def read_answers(path: Path) -> Rows[Answer]:
    """The answers in a Parquet file."""
    return read_parquet(Answer, path)
