"""Answers that a model generated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

from spin.data.examples import Example
from spin.runtime.tables import with_tuples


@dataclass(frozen=True)
class Answer:
    """What a model sampled for the example `id`: token ids, and "stop" or "length". `id` as in `Pair`."""

    id: str
    ids: tuple[int, ...]
    finish_reason: str
    text: str


def repeat_prompts(examples: Sequence[Example], answers: int) -> list[Example]:
    """Each example so many times, the second time on with another id: random numbers are drawn by id."""
    return [replace(e, id=f"{e.id}#{k}") if k else e for e in examples for k in range(answers)]


def example_of(id: str) -> str:
    """The example's id in that of one of the answers to it."""
    return id.partition("#")[0]


def read_answers(path: Path) -> list[Answer]:
    return [answer_of(row) for row in pq.read_table(path).to_pylist()]


def answer_of(row: dict) -> Answer:
    """An answer from a row of a Parquet file."""
    return Answer(**with_tuples(row))
