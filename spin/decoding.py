"""Decoding many prompts a token at a time: answers that have ended make room for prompts that wait."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Answers that have ended leave once they are this share of the rows, and waiting prompts join once this share of the rows is
# free: either copies the key-value cache.
FREE = 0.25

# logits [rows, vocabulary], the prompt of each row, how many tokens its answer has -> token ids [rows]
Choose = Callable[[Tensor, list[int], list[int]], Tensor]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    stop_ids: Collection[int],
    max_new_tokens: int,
    rows: int,
    advance: Callable[[int], None] = lambda ended: None,
) -> list[list[int]]:
    """The ids that follow each prompt, up to and including a stop id, at most `max_new_tokens`; `rows` of them at a time.

    Where the model's attention allows it, a prompt joins as soon as there is room; else the next `rows` prompts start when
    the last of those before have ended. `advance` is told how many answers have just ended.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    batch = JoiningBatch(model, longest) if can_join(model, prompts, longest) else ClosedBatch(model)
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)))
    owners: list[int] = []  # the prompt of each row
    running: list[bool] = []
    tokens = torch.empty(0, dtype=torch.long, device=model.device)

    def take(logits: Tensor, first: int) -> Tensor:
        """The next token of each row from `first` on; to an answer that has ended nothing is added."""
        chosen = choose(logits, owners[first:], [min(len(answers[i]), max_new_tokens - 1) for i in owners[first:]])
        for row, token in enumerate(chosen.tolist(), first):
            if running[row]:
                answer = answers[owners[row]]
                answer.append(token)
                running[row] = token not in stop_ids and len(answer) < max_new_tokens
                advance(not running[row])
        return chosen

    while waiting or owners:
        kept = [row for row, alive in enumerate(running) if alive]
        if not kept or len(kept) <= (1 - FREE) * len(owners):
            batch.keep(kept)
            tokens, owners, running = tokens[kept], [owners[row] for row in kept], [True] * len(kept)
        if waiting and (len(owners) <= (1 - FREE) * rows if batch.joins else not owners):
            first = len(owners)
            new = [waiting.popleft() for _ in range(min(rows - first, len(waiting)))]
            owners, running = owners + new, running + [True] * len(new)
            tokens = torch.cat([tokens, take(batch.start([prompts[i] for i in new]), first)])
        elif owners:
            tokens = take(batch.step(tokens), 0)
    return answers


@torch.inference_mode()
def can_join(model: PreTrainedModel, prompts: Sequence[Sequence[int]], longest: int) -> bool:
    """Whether rows of this model can be put together at any time: every layer keeps plain keys and values of all of
    `longest` tokens, and a few tokens of three prompts come out as from the model's own forward."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    plain = all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
    )
    if not plain or (window and window < longest):
        return False
    shortest, *_, tallest = sorted((*prompts, *prompts), key=len)
    batch, token = JoiningBatch(model, longest + 2), torch.tensor([prompts[0][0]], device=model.device)
    try:
        batch.start([tallest])
        batch.step(token)
        batch.start([shortest])
        found = batch.step(token.repeat(2))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    first = int(token)
    for row, ids in zip(found, ([*tallest, first, first], [*shortest, first]), strict=True):
        own = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        apart = (row.float().log_softmax(-1) - own.log_softmax(-1)).abs()
        if not (own.softmax(-1) * apart).sum() <= TOLERANCE.get(model.dtype, 0.1):
            return False
    return True


# How far log-probs of a token may be apart by rounding, in nats, weighed by its probability: what a wrong mask gives is more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class ClosedBatch:
    """A batch that only shrinks, in the model's own cache: for any architecture."""

    joins = False

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts. Returns logits [rows, vocabulary], as `step` does."""
        logits, self.cache, self.mask = _prefill(self.model, prompts)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Read the last token of each row. tokens: [rows]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        positions = self.mask.sum(1, keepdim=True) - 1
        return _forward(self.model, tokens[:, None], positions, self.mask, self.cache)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; with none, `start` is next."""
        if rows:
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]


class JoiningBatch:
    """A batch that rows leave and join: each row's keys and values begin at column 0, and it writes at its own column."""

    joins = True

    def __init__(self, model: PreTrainedModel, longest: int):
        self.model = model
        self.layers = [_RowsLayer() for _ in DynamicCache(config=model.config).layers]
        self.cache = Cache(layers=[*self.layers])
        self.longest = longest
        self.lengths = torch.empty(0, dtype=torch.long, device=model.device)  # of each row: the tokens in the cache

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits, cache, mask = _prefill(self.model, prompts)
        lengths = mask.sum(1)
        # Their keys and values end at the last column, ours begin at the first.
        columns = (torch.arange(mask.shape[1], device=mask.device) + mask.shape[1] - lengths[:, None]) % mask.shape[1]
        found: Any
        for layer, found in zip(self.layers, cache.layers, strict=True):
            layer.append(found.keys, found.values, columns, self.longest)
        self.lengths = torch.cat([self.lengths, lengths])
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        columns = torch.arange(int(self.lengths.max()) + 1, device=tokens.device)
        mask = (columns <= self.lengths[:, None])[:, None, None]
        for layer in self.layers:
            layer.at, layer.width = self.lengths, len(columns)
        logits = _forward(self.model, tokens[:, None], self.lengths[:, None], mask, self.cache)
        # Rows whose answer has ended stay for a while: they write over their last column.
        self.lengths = (self.lengths + 1).clamp(max=self.longest - 1)
        return logits

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.lengths.device)
        self.lengths = self.lengths[index]
        for layer in self.layers:
            layer.batch_select_indices(index)


class _RowsLayer(DynamicLayer):
    """keys, values: [rows, heads, columns, width], with room for the answers: a token is written, nothing is copied."""

    keys: Tensor
    values: Tensor
    at: Tensor  # the column of each row's next token
    width: int  # columns that any row has used, the next one counted

    def append(self, keys: Tensor, values: Tensor, columns: Tensor, room: int) -> None:
        """Add rows whose k-th token is in `columns[row, k]` of what is given."""
        index = columns[:, None, :, None]
        for name, new in (("keys", keys), ("values", values)):
            rows = new.new_empty(len(new), new.shape[1], room, new.shape[3])
            torch.gather(new, 2, index.expand_as(new), out=rows[:, :, : new.shape[2]])
            rows[:, :, new.shape[2] :] = 0  # masked, but 0 * nan is nan
            setattr(self, name, torch.cat([getattr(self, name), rows]) if self.is_initialized else rows)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *rest, **more) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(self.at), device=self.at.device)
        self.keys[rows, :, self.at] = key_states[:, :, 0]
        self.values[rows, :, self.at] = value_states[:, :, 0]
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


def _prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
    """The logits after each prompt, and the cache and mask [rows, longest] of the prompts, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = DynamicCache(config=model.config)
    return _forward(model, ids, (mask.cumsum(1) - 1).clamp(min=0), mask, cache), cache, mask


def _forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        # As an index: a slice of the last position is not contiguous, and the head would copy its weights a row.
        logits_to_keep=torch.tensor([ids.shape[1] - 1], device=ids.device),
    ).logits[:, -1]
