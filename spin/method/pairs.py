"""Pairs: a prompt with its human answer and an opponent's answer to it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from spin.data.examples import Example
from spin.engines.packing import Continuations
from spin.generation.answers import Answer
from spin.runtime.tables import with_tuples

# Log-probs of each response by its name, "real" or "generated": [pairs], summed over tokens, in nats.
Logps = Mapping[str, Tensor]
RESPONSES = ("real", "generated")
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A prompt with its human (`real`) and its opponent's (`generated`) answer.

    `id` is the example's, `answer` counts the opponent's answers to one prompt, `iter` is the iteration whose opponent
    answered (an earlier one in a replayed pair). Losses and log-probs are computed from the ids; the texts are for
    display. `generated_ids` ends with a stop token only if `finish_reason` is "stop"; "length" means it was cut off.
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


def make_pair(example: Example, answer: Answer, iteration: int = 0) -> Pair:
    """Join an example and an answer to it."""
    assert example.id == answer.id
    return Pair(
        id=example.id,
        prompt=example.prompt,
        real=example.real,
        generated=answer.text,
        finish_reason=answer.finish_reason,
        prompt_ids=example.prompt_ids,
        real_ids=example.real_ids,
        generated_ids=answer.ids,
        iter=iteration,
        answer=answer.index,
    )


def make_pairs(
    examples: Sequence[Example], answers: Sequence[Answer], iteration: int
) -> tuple[list[Pair], dict[str, int]]:
    """Join examples and answers by id. Returns the pairs, and how many were dropped because they give no gradient."""
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


def group_by_prompt(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of consecutive pairs that share a prompt and an iteration: one group per prompt."""
    groups: list[list[int]] = []
    previous = None
    for index, pair in enumerate(pairs):
        if (pair.id, pair.iter) != previous:
            groups.append([])
        groups[-1].append(index)
        previous = pair.id, pair.iter
    return groups


def to_continuations(pairs: Sequence[Pair], first: Mapping[tuple[str, int], Ids] | None = None) -> list[Continuations]:
    """One item per prompt, in the order of `group_by_prompt`: the human answer once, then every generated one, then the
    `first` answers, if given, as many: those of iteration 0 by example's id and answer index."""
    items = []
    for group in group_by_prompt(pairs):
        chosen = [pairs[i] for i in group]
        responses = [chosen[0].real_ids, *(pair.generated_ids for pair in chosen)]
        if first is not None:
            responses += [first[pair.id, pair.answer] for pair in chosen]
        items.append(Continuations(chosen[0].prompt_ids, tuple(responses)))
    return items


def split_responses(
    values: Tensor, pairs_per_prompt: Sequence[int], names: Sequence[str] = RESPONSES
) -> dict[str, Tensor]:
    """Turn values per response, in the order of `to_continuations`, into values per pair under each response's name."""
    rows: dict[str, list[int]] = {name: [] for name in names}
    start = 0
    for count in pairs_per_prompt:
        rows["real"] += [start] * count
        start += 1
        for name in names[1:]:
            rows[name] += range(start, start + count)
            start += count
    return {name: values[indices] for name, indices in rows.items()}


def token_counts(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Tokens of each response, [pairs]."""
    return {name: torch.tensor([len(getattr(pair, f"{name}_ids")) for pair in pairs]) for name in RESPONSES}


def write_pairs(path: Path, pairs: Sequence[Pair], logps: Mapping[str, Logps]) -> None:
    """Write pairs as Parquet, with a column `<model>_logp_<response>` for each model in `logps` and each response."""
    table = pa.Table.from_pylist([asdict(pair) for pair in pairs])
    for model, responses in logps.items():
        for response, values in responses.items():
            table = table.append_column(f"{model}_logp_{response}", pa.array(values.tolist()))
    path.unlink(missing_ok=True)  # it may be a hard link to a file in the store
    pq.write_table(table, path)


def read_pairs(path: Path) -> tuple[list[Pair], dict[str, Logps]]:
    """Read what `write_pairs` wrote: the pairs, and log-probs by model and response."""
    table = pq.read_table(path)
    columns = [field.name for field in fields(Pair)]
    pairs = [Pair(**with_tuples(row)) for row in table.select(columns).to_pylist()]
    logps: dict[str, dict[str, Tensor]] = {}
    for column in table.column_names:
        model, _, response = column.partition("_logp_")
        if response:
            logps.setdefault(model, {})[response] = torch.tensor(table[column].to_pylist())
    return pairs, dict(logps)
