"""Pack prompts and responses into rows and batches, as tensors."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

Ids = Sequence[int]
Rows = list[list[int]]  # a planned batch: the indices of the items in each row


@dataclass(frozen=True)
class Continuations:
    """A prompt and the responses that continue it: one for SFT, two for a pair."""

    prompt_ids: Ids
    responses: tuple[Ids, ...]

    @property
    def tokens(self) -> int:
        """Length when the responses share their prompt."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


# --- rows and batches -------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Items that share one forward pass.

    input_ids, position_ids: [rows, length]. attention_mask, by layout: "packed", always one row: the table of lengths
    that `attention.py` reads; "masked": bool [rows, 1, length, length], True = may attend; "padded": int [rows, length].
    For each response token n: `target[n]` is its id, `source[n]` the index into rows * length of the position that
    predicts it, `sequence[n]` the number of its response, from 0 in the order of `items`. `tokens` excludes padding.
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
        tensors: dict[str, Any] = {
            f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})


def plan_batches(items: Sequence[Continuations], layout: str, tokens_per_row: int, tokens_per_batch: int) -> list[Rows]:
    """Plan rows of items and batches of rows, of at most `tokens_per_batch` tokens, padding included.

    layout "packed": a batch is one row of items, each prompt once. "masked": the same in several rows of at most
    `tokens_per_row` tokens, because a dense mask costs the square of its row. "padded": one row for each response, the
    prompt repeated. All responses of an item are in one batch; an item longer than a budget has a row or batch to itself.
    Takes n log n operations and allocates no tensors.
    """
    if layout == "packed":
        return [[row] for row in _best_fit(items, tokens_per_batch)]
    if layout == "masked":
        return _plan_masked(items, tokens_per_row, tokens_per_batch)
    return _plan_padded(items, tokens_per_batch)


def collate(items: Sequence[Continuations], layout: str, rows: Rows) -> Batch:
    """The tensors of one batch of `plan_batches`."""
    if layout == "padded":
        return _collate_padded(items, [i for row in rows for i in row])
    return _collate_packed(items, rows, dense=layout == "masked")


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


def _plan_masked(items: Sequence[Continuations], tokens_per_row: int, tokens_per_batch: int) -> list[Rows]:
    rows = _best_fit(items, tokens_per_row)
    lengths = [sum(items[i].tokens for i in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda r: -lengths[r])
    return [[rows[r] for r in group] for group in _groups(order, lengths, tokens_per_batch)]


def _plan_padded(items: Sequence[Continuations], tokens_per_batch: int) -> list[Rows]:
    # An item takes one row for each response, all as long as its longest.
    lengths = [len(item.prompt_ids) + max(map(len, item.responses)) for item in items]
    widths = [len(item.responses) for item in items]
    order = sorted(range(len(items)), key=lambda i: -lengths[i])
    return [[[i] for i in group] for group in _groups(order, lengths, tokens_per_batch, widths)]


def _groups(order: list[int], lengths: list[int], budget: int, widths: list[int] | None = None) -> list[list[int]]:
    """Split `order` (longest first) into groups whose rows * longest is within the budget."""
    groups: list[list[int]] = []
    rows = longest = 0
    for index in order:
        width = widths[index] if widths else 1
        if not groups or (rows + width) * longest > budget:
            groups.append([])
            rows, longest = 0, lengths[index]
        groups[-1].append(index)
        rows += width
    return groups


def _collate_packed(items: Sequence[Continuations], rows: list[list[int]], dense: bool) -> Batch:
    length = max(sum(items[i].tokens for i in row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    item_of = torch.full((len(rows), length), -1)
    branch = torch.zeros(len(rows), length, dtype=torch.long)  # 0: the prompt; 1, 2, ...: its responses
    targets = _Targets()
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            prompt, responses = items[i].prompt_ids, items[i].responses
            last = r * length + start + len(prompt) - 1  # the prompt's last token predicts every response's first
            for b, ids in enumerate((prompt, *responses)):
                span = slice(start, start + len(ids))
                input_ids[r, span] = torch.tensor(ids)
                position_ids[r, span] = torch.arange(len(ids)) + (len(prompt) if b else 0)
                item_of[r, span] = i
                branch[r, span] = b
                if b:
                    targets.add(ids, last, r * length + start)
                start += len(ids)
    chosen = [i for row in rows for i in row]
    if dense:
        same_item = item_of[:, :, None] == item_of[:, None, :]
        same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = (same_item & same_branch & causal)[:, None]
    else:
        most = max(len(items[i].responses) for i in chosen)
        mask = torch.zeros(1, 1, len(chosen), 1 + most, dtype=torch.long)
        for k, i in enumerate(chosen):
            lengths = [len(items[i].prompt_ids), *map(len, items[i].responses)]
            mask[0, 0, k, : len(lengths)] = torch.tensor(lengths)
    return targets.batch(
        items=chosen,
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        tokens=int((item_of >= 0).sum()),
    )


def _collate_padded(items: Sequence[Continuations], chosen: list[int]) -> Batch:
    rows = [(items[i].prompt_ids, response) for i in chosen for response in items[i].responses]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    targets = _Targets()
    for r, (prompt, response) in enumerate(rows):
        total = len(prompt) + len(response)
        input_ids[r, :total] = torch.tensor([*prompt, *response])
        attention_mask[r, :total] = 1
        first = r * length + len(prompt)
        targets.add(response, first - 1, first)
    return targets.batch(
        items=list(chosen),
        input_ids=input_ids,
        position_ids=torch.arange(length).expand(len(rows), length),
        attention_mask=attention_mask,
        tokens=int(attention_mask.sum()),
    )


class _Targets:
    """Collects the position that predicts each response token."""

    def __init__(self) -> None:
        self.source: list[int] = []
        self.target: list[int] = []
        self.sequence: list[int] = []
        self.responses = 0

    def add(self, ids: Ids, predicts_first: int, start: int) -> None:
        self.source += [predicts_first, *range(start, start + len(ids) - 1)]
        self.target += ids
        self.sequence += [self.responses] * len(ids)
        self.responses += 1

    def batch(self, **rest) -> Batch:
        return Batch(
            source=torch.tensor(self.source),
            target=torch.tensor(self.target),
            sequence=torch.tensor(self.sequence),
            responses=self.responses,
            **rest,
        )
