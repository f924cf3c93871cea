"""Pairs of answers to one prompt, and how many of them become the rows of one forward pass."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from spin.data.examples import Example
from spin.engines.packing import Continuations
from spin.generation.answers import Answer
from spin.runtime.tables import with_tuples


@dataclass(frozen=True)
class Pair:
    """A prompt with its human (`real`) and its opponent's (`generated`) answer. `id` is the example's, for a prompt's second
    answer and those after it with "#1", "#2", ... at its end.

    The ids are the truth, the texts are for people. `generated_ids` ends with the stop token only where the opponent
    itself stopped (`finish_reason` "stop"; "length" where it was cut). `iter` is the iteration whose opponent answered
    (an earlier one where the pair is replayed). `opponent_logp_*` are summed log-probs in nats.
    """

    id: str
    prompt: str
    real: str
    generated: str
    finish_reason: str
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]
    generated_ids: tuple[int, ...]
    iter: int = 0
    opponent_logp_real: float = math.nan
    opponent_logp_generated: float = math.nan


def make_pair(example: Example, answer: Answer, iteration: int = 0) -> Pair:
    """An example and the opponent's answer to it."""
    assert example.id == answer.id
    return Pair(
        id=f"{answer.id}#{answer.index}" if answer.index else answer.id,
        prompt=example.prompt,
        real=example.real,
        generated=answer.text,
        finish_reason=answer.finish_reason,
        prompt_ids=example.prompt_ids,
        real_ids=example.real_ids,
        generated_ids=answer.ids,
        iter=iteration,
    )


def make_pairs(
    examples: Sequence[Example], answers: Sequence[Answer], iteration: int
) -> tuple[list[Pair], dict[str, int]]:
    """Put answers beside their examples, by id. Pairs that give no gradient are dropped and counted by reason."""
    by_id: dict[str, list[Answer]] = {}
    for answer in answers:
        by_id.setdefault(answer.id, []).append(answer)
    pairs, dropped = [], {"identical": 0, "empty": 0}
    for example in examples:
        for answer in by_id[example.id]:
            if answer.ids == example.real_ids:
                dropped["identical"] += 1
            elif not answer.text.strip():
                dropped["empty"] += 1
            else:
                pairs.append(make_pair(example, answer, iteration))
    return pairs, dropped


def with_opponent_logps(pairs: Sequence[Pair], logps: Tensor) -> list[Pair]:
    """Write the opponent's log-probs, [pairs, 2] (real, generated), beside the pairs."""
    assert logps.shape == (len(pairs), 2)
    return [
        replace(pair, opponent_logp_real=real, opponent_logp_generated=generated)
        for pair, (real, generated) in zip(pairs, logps.tolist(), strict=True)
    ]


def as_continuations(pairs: Iterable[Pair]) -> list[Continuations]:
    """The pairs as (real, generated) continuations of one prompt."""
    return [Continuations(pair.prompt_ids, (pair.real_ids, pair.generated_ids)) for pair in pairs]


def by_prompt(pairs: Sequence[Pair]) -> list[list[int]]:
    """The indices of pairs that share a prompt and the iteration of its answers, which come one after another."""
    groups: list[list[int]] = []
    last = None
    for index, pair in enumerate(pairs):
        key = (pair.id.partition("#")[0], pair.iter)
        if key != last:
            groups.append([])
        groups[-1].append(index)
        last = key
    return groups


def items_of(pairs: Sequence[Pair]) -> list[Continuations]:
    """For every prompt its human answer, once, and all generated ones: (real, generated, ...), by `by_prompt`."""
    return [
        Continuations(pairs[group[0]].prompt_ids, (pairs[group[0]].real_ids, *(pairs[i].generated_ids for i in group)))
        for group in by_prompt(pairs)
    ]


def to_pairs(values: Tensor, widths: Sequence[int]) -> Tensor:
    """What was computed for each response, [sum of widths], as real and generated of each pair: [pairs, 2].

    widths: how many responses each item has, its human one first.
    """
    real: list[int] = []
    generated: list[int] = []
    start = 0
    for width in widths:
        real += [start] * (width - 1)
        generated += range(start + 1, start + width)
        start += width
    return torch.stack([values[real], values[generated]], dim=1)


def write_start_logps(pairs: Sequence[Pair], under_start: Sequence[Pair], path: Path) -> None:
    """`write_parquet` of the pairs, with columns `start_logp_*` from the same pairs as another policy scored them."""
    path.unlink(missing_ok=True)  # it may be a link to the store's
    table = pa.Table.from_pylist([asdict(pair) for pair in pairs])
    for name in ("real", "generated"):
        table = table.append_column(
            f"start_logp_{name}", pa.array([getattr(p, f"opponent_logp_{name}") for p in under_start])
        )
    pq.write_table(table, path)


def read_pairs(path: Path) -> list[Pair]:
    return [Pair(**with_tuples(row)) for row in pq.read_table(path).to_pylist()]
