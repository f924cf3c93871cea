"""Pack prompts and responses into batches, as tensors."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Ids = Sequence[int]


@dataclass(frozen=True)
class Continuations:
    """A prompt and the responses that continue it: one for SFT, two for a pair."""

    prompt_ids: Ids
    responses: tuple[Ids, ...]

    @property
    def tokens(self) -> int:
        """Length when the responses share their prompt."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass
class Batch:
    """Items that share one forward pass.

    input_ids, position_ids: [rows, length]. attention_mask, by layout: "packed", always one row: the table of lengths
    that `attention.py` reads; "padded": int [rows, length]. For each response token n: `target[n]` is its id, `source[n]`
    the index into rows * length of the position that predicts it, `sequence[n]` the number of its response, from 0 in the
    order of `items`. `tokens` excludes padding.
    """

    items: list[int]
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    source: Tensor
    target: Tensor
    sequence: Tensor
    responses: int
    tokens: int

    def to(self, device: torch.device) -> "Batch":
        tensors: dict[str, Any] = {k: value.to(device) for k, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def plan_batches(items: Sequence[Continuations], layout: str, tokens_per_batch: int) -> list[list[int]]:
    """Divide the indices of `items` into batches of at most `tokens_per_batch` tokens, padding included.

    layout "packed": a batch is one row of items, each prompt once. "padded": one row for each response, the prompt
    repeated. All responses of an item are in one batch; an item longer than the budget has a batch to itself. Takes
    n log n operations and allocates no tensors.
    """
    return _best_fit(items, tokens_per_batch) if layout == "packed" else _plan_padded(items, tokens_per_batch)


def collate(items: Sequence[Continuations], layout: str, chosen: Sequence[int]) -> Batch:
    """The tensors of one batch of `plan_batches`."""
    batch = [items[i] for i in chosen]
    tensors, places = _packed(batch) if layout == "packed" else _padded(batch)
    responses = [response for item in batch for response in item.responses]
    source: list[int] = []
    target: list[int] = []
    sequence: list[int] = []
    for number, (response, (prompt_end, start)) in enumerate(zip(responses, places, strict=True)):
        source += [prompt_end, *range(start, start + len(response) - 1)]
        target += response
        sequence += [number] * len(response)
    return Batch(
        list(chosen),
        *tensors,
        source=torch.tensor(source),
        target=torch.tensor(target),
        sequence=torch.tensor(sequence),
        responses=len(responses),
        tokens=int(tensors[-1].sum()),
    )


def _best_fit(items: Sequence[Continuations], tokens_per_row: int) -> list[list[int]]:
    """Best fit decreasing: each item, longest first, goes into the fullest row that has space for it."""
    rows: list[list[int]] = []
    # (free tokens, row), sorted, so that bisection finds the fullest row with space.
    spaces: list[tuple[int, int]] = []
    for index in sorted(range(len(items)), key=lambda i: -items[i].tokens):
        tokens = items[index].tokens
        at = bisect_left(spaces, (tokens, -1))
        if at == len(spaces):
            free, row = tokens_per_row, len(rows)
            rows.append([])
        else:
            free, row = spaces.pop(at)
        rows[row].append(index)
        insort(spaces, (free - tokens, row))
    return rows


def balance_by_tokens(items: Sequence[Continuations], ranks: int) -> list[list[int]]:
    """Divide the indices of `items` over `ranks`: each item, longest first, goes to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(items)), key=lambda i: -items[i].tokens):
        least = tokens.index(min(tokens))
        shares[least].append(index)
        tokens[least] += items[index].tokens
    return shares


def _plan_padded(items: Sequence[Continuations], tokens_per_batch: int) -> list[list[int]]:
    """Items by length, longest first: a row for each response, all as long as the batch's longest."""
    lengths = [len(item.prompt_ids) + max(map(len, item.responses)) for item in items]
    batches: list[list[int]] = []
    rows = longest = 0
    for index in sorted(range(len(items)), key=lambda i: -lengths[i]):
        width = len(items[index].responses)
        if not batches or (rows + width) * longest > tokens_per_batch:
            batches.append([])
            rows, longest = 0, lengths[index]
        batches[-1].append(index)
        rows += width
    return batches


# Each response's place: the index of its prompt's last token, which predicts its first, and that of its first token.
Tensors = tuple[Tensor, Tensor, Tensor]
Places = list[tuple[int, int]]


def _packed(batch: Sequence[Continuations]) -> tuple[Tensors, Places]:
    """Input ids, position ids and attention mask of one packed row, and the places of its responses."""
    ids: list[int] = []
    positions: list[int] = []
    table: list[list[int]] = []
    places: Places = []
    columns = 1 + max(len(item.responses) for item in batch)
    for item in batch:
        prompt = len(item.prompt_ids)
        ids += item.prompt_ids
        positions += range(prompt)
        prompt_end = len(ids) - 1
        for response in item.responses:
            places.append((prompt_end, len(ids)))
            ids += response
            positions += range(prompt, prompt + len(response))
        lengths = [prompt, *map(len, item.responses)]
        table.append(lengths + [0] * (columns - len(lengths)))
    return (torch.tensor([ids]), torch.tensor([positions]), torch.tensor([[table]])), places


def _padded(batch: Sequence[Continuations]) -> tuple[Tensors, Places]:
    """As `_packed`, in rows padded at the end."""
    rows = [(item.prompt_ids, response) for item in batch for response in item.responses]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    places: Places = []
    for r, (prompt, response) in enumerate(rows):
        total = len(prompt) + len(response)
        input_ids[r, :total] = torch.tensor([*prompt, *response])
        attention_mask[r, :total] = 1
        start = r * length + len(prompt)
        places.append((start - 1, start))
    return (input_ids, torch.arange(length).expand(len(rows), length), attention_mask), places
