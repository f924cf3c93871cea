"""Pack prompts and responses into batches of tensors."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Ids = Sequence[int]


@dataclass(frozen=True)
class Continuations:
    """A prompt and its responses: one for SFT, two for a pair."""

    prompt_ids: Ids
    responses: tuple[Ids, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens if the responses share their prompt."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass
class Batch:
    """Items that share one forward pass.

    input_ids, position_ids: [rows, length]. attention_mask: with the layout "packed" (always one row) the table of
    lengths that `attention.py` describes; with "padded" int [rows, length]. For each response token n, `target[n]` is
    its id, `source[n]` the index into rows * length of the position that predicts it, and `sequence[n]` the index of
    its response, in the order of `items`. `tokens` excludes padding.
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


def collate(items: Sequence[Continuations], layout: str, chosen: Sequence[int]) -> Batch:
    """Return a batch of the items with the indices `chosen`.

    layout "packed": one row with all items, each prompt once. "padded": one row per response, with the prompt repeated.
    """
    batch = [items[i] for i in chosen]
    responses = [response for item in batch for response in item.responses]
    rows = [batch]
    if layout == "padded":
        rows = [[Continuations(item.prompt_ids, (response,))] for item in batch for response in item.responses]
    length = max(sum(item.tokens for item in row) for row in rows)
    ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    for row in rows:
        row_end = len(ids) + length
        for item in row:
            prompt = len(item.prompt_ids)
            ids += item.prompt_ids
            positions += range(prompt)
            prompt_end = len(ids) - 1
            for response in item.responses:
                source += [prompt_end, *range(len(ids), len(ids) + len(response) - 1)]
                ids += response
                positions += range(prompt, prompt + len(response))
        padding = row_end - len(ids)
        ids += [0] * padding
        positions += range(length - padding, length)
    if layout == "packed":
        table = [torch.tensor([len(item.prompt_ids), *map(len, item.responses)]) for item in batch]
        mask = pad_sequence(table, batch_first=True)[None, None]
    else:
        mask = (torch.arange(length) < torch.tensor([[row[0].tokens] for row in rows])).long()
    lengths = torch.tensor([len(response) for response in responses])
    return Batch(
        list(chosen),
        torch.tensor(ids).view(len(rows), length),
        torch.tensor(positions).view(len(rows), length),
        mask,
        source=torch.tensor(source),
        target=torch.tensor([token for response in responses for token in response]),
        sequence=torch.arange(len(responses)).repeat_interleave(lengths),
        responses=len(responses),
        tokens=int(mask.sum()),
    )


def plan_packed(items: Sequence[Continuations], tokens_per_row: int) -> list[list[int]]:
    """Divide the indices of `items` into packed rows of at most `tokens_per_row` tokens.

    Best-fit decreasing: each item, longest first, goes into the fullest row with enough space for it. An item longer
    than the limit gets a row of its own. Takes n log n operations.
    """
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


def plan_padded(items: Sequence[Continuations], tokens_per_batch: int) -> list[list[int]]:
    """Divide the indices of `items`, longest first, into batches of at most `tokens_per_batch` tokens with padding.

    All responses of an item are in one batch.
    """
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


def balance_by_tokens(items: Sequence[Continuations], ranks: int) -> list[list[int]]:
    """Divide the indices of `items` among ranks: each item, longest first, goes to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(items)), key=lambda i: -items[i].tokens):
        least = tokens.index(min(tokens))
        shares[least].append(index)
        tokens[least] += items[index].tokens
    return shares
