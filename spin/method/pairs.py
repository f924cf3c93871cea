"""Pairs of a human answer and an opponent's answer to the same prompt."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from spin.data.examples import Example
from spin.engines.packing import Continuations
from spin.generation.answers import Answer
from spin.runtime.tables import BLOCK, Lazy, Rows, read_parquet, schema_of, write_parquet

# Log-probs by response, "real" or "generated": [pairs], summed over tokens, in nats.
Logps = Mapping[str, Tensor]
RESPONSES = ("real", "generated")
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A prompt with a human answer (`real`) and an opponent's answer (`generated`).

    `id` is the example's id, `answer` numbers the opponent's answers to a prompt, and `iter` is the iteration of the
    opponent (an earlier one in a replayed pair). Losses and log-probs are computed from the ids; texts are for display.
    `generated_ids` ends with a stop token only if `finish_reason` is "stop"; "length" means that it was cut off.
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
    answer: int = 0


def make_pairs(
    examples: Sequence[Example], answers: Sequence[Answer], iteration: int = 0, keep_all: bool = False
) -> tuple[Rows[Pair], dict[str, int]]:
    """Return the pairs of examples and answers with equal ids, and the number of dropped pairs by reason.

    Pairs with identical answers, which give no gradient, or an empty generated answer are dropped unless `keep_all`.
    """
    examples, answers = Rows.of(Example, examples), Rows.of(Answer, answers)
    row_of = {id: row for row, id in enumerate(examples.column("id"))}
    example_rows = np.array([row_of.get(id, -1) for id in answers.column("id")], np.int64)
    order = np.argsort(example_rows, kind="stable")  # by example, each example's answers in their given order
    order = order[example_rows[order] >= 0]
    batches, dropped = [], {"identical": 0, "empty": 0}
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        batch, reasons = _join(examples.gather(example_rows[rows]), answers.gather(rows), iteration)
        if not keep_all:
            batch = batch.filter(pa.array([reason is None for reason in reasons]))
            dropped = {reason: count + reasons.count(reason) for reason, count in dropped.items()}
        batches += batch.to_batches()
    return Rows(Pair, batches), dropped


def _join(examples: pa.Table, answers: pa.Table, iteration: int) -> tuple[pa.Table, list[str | None]]:
    """Pair examples and answers row by row. Returns the pairs, and for each the reason to drop it or None."""
    columns = {name: examples[name] for name in ("id", "prompt", "real", "prompt_ids", "real_ids")}
    columns |= {"generated": answers["text"], "generated_ids": answers["ids"], "answer": answers["index"]}
    columns |= {"finish_reason": answers["finish_reason"], "iter": pa.array([iteration] * len(answers), pa.int64())}
    table = pa.table({name: columns[name] for name in schema_of(Pair).names}, schema_of(Pair))
    same_length = pc.equal(pc.list_value_length(table["real_ids"]), pc.list_value_length(table["generated_ids"]))
    reasons: list[str | None] = [None if text.strip() else "empty" for text in table["generated"].to_pylist()]
    for row in np.flatnonzero(same_length.to_numpy()):
        if table["real_ids"][row] == table["generated_ids"][row]:
            reasons[row] = "identical"
    return table, reasons


def group_by_prompt(pairs: Sequence[Pair]) -> list[list[int]]:
    """Group the indices of consecutive pairs that share a prompt and an iteration."""
    pairs = Rows.of(Pair, pairs)
    keys = list(zip(pairs.column("id"), pairs.column("iter"), strict=True))
    return [list(group) for _, group in groupby(range(len(keys)), keys.__getitem__)]


def to_continuations(
    pairs: Sequence[Pair], first: Mapping[tuple[str, int], Ids] | None = None
) -> Sequence[Continuations]:
    """Return one item per group of `group_by_prompt`: the human answer once, then every generated answer.

    If `first` (iteration 0's answers, by example id and answer index) is given, one of them per pair follows.
    """
    rows, groups = Rows.of(Pair, pairs), group_by_prompt(pairs)

    def make(number: int) -> Continuations:
        chosen = [rows[i] for i in groups[number]]
        responses = [chosen[0].real_ids, *(pair.generated_ids for pair in chosen)]
        if first is not None:
            responses += [first[pair.id, pair.answer] for pair in chosen]
        return Continuations(chosen[0].prompt_ids, tuple(responses))

    return Lazy(len(groups), make)


def split_responses(
    values: Tensor, pairs_per_prompt: Sequence[int], names: Sequence[str] = RESPONSES
) -> dict[str, Tensor]:
    """Convert values per response, in the order of `to_continuations`, to values per pair, by response name."""
    rows: dict[str, list[int]] = {name: [] for name in names}
    start = 0
    for count in pairs_per_prompt:
        rows["real"] += [start] * count
        start += 1
        for name in names[1:]:
            rows[name] += range(start, start + count)
            start += count
    return {name: values[indices] for name, indices in rows.items()}


def write_pairs(path: Path, pairs: Sequence[Pair], logps: Mapping[str, Logps]) -> None:
    """Write pairs as Parquet, with a column `<model>_logp_<response>` per model and response."""
    table = Rows.of(Pair, pairs).table
    for model, responses in logps.items():
        for response, values in responses.items():
            table = table.append_column(f"{model}_logp_{response}", pa.array(values.tolist()))
    path.unlink(missing_ok=True)  # it may be a hard link to a file in the store
    write_parquet(table, path)


def read_pairs(path: Path) -> tuple[Rows[Pair], dict[str, Logps]]:
    """Read a file of `write_pairs`. Returns the pairs, and the log-probs by model and response."""
    columns = [column for column in pq.read_schema(path).names if "_logp_" in column]
    table = pq.read_table(path, columns=columns)
    logps: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for column in columns:
        model, _, response = column.partition("_logp_")
        logps[model][response] = torch.tensor(table[column].to_pylist())
    return read_parquet(Pair, path), dict(logps)
