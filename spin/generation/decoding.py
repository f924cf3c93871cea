"""Decoding many prompts a token at a time: answers that have ended make room for prompts that wait."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spin.engines.attention import PACKED_ATTENTION, attention_window, use_packed_attention

# Answers that have ended leave once they are this share of the rows, and waiting prompts join once this share of the rows is
# free: a row that has ended costs as much as one that runs, and few prompts together cost more each than many.
FREE = 0.125

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
    packed = can_join(model, prompts, longest)
    batch = StaticBatch(model) if packed is None else ContinuousBatch(model, min(rows, len(prompts)), longest, packed)
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
        kept = _moved_up(running)
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


def _moved_up(running: Sequence[bool]) -> list[int]:
    """The rows that go on, in such an order that most stay where they are: the last ones fill the places of those that leave."""
    kept = [row for row, alive in enumerate(running) if alive]
    movers = iter(row for row in kept if row >= len(kept))
    return [row if running[row] else next(movers) for row in range(len(kept))]


@torch.inference_mode()
def can_join(model: PreTrainedModel, prompts: Sequence[Sequence[int]], longest: int) -> bool | None:
    """Whether rows of this model can be put together at any time: every layer keeps plain keys and values of all of
    `longest` tokens, and a few tokens of three prompts come out as from the model's own forward. If so, whether prompts
    can be read in one packed row; None if not."""
    config = model.config.get_text_config()
    window = attention_window(model)
    plain = all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
    )
    if not plain or (window and window < longest):
        return None
    packable = model.device.type == "cpu" and config._attn_implementation in ("sdpa", PACKED_ATTENTION)
    return next((way for way in (True, False)[not packable :] if _joins(model, prompts, longest + 2, way)), None)


def _joins(model: PreTrainedModel, prompts: Sequence[Sequence[int]], longest: int, packed: bool) -> bool:
    shortest, *_, tallest = sorted((*prompts, *prompts), key=len)
    batch, token = ContinuousBatch(model, 3, longest, packed), torch.tensor([prompts[0][0]], device=model.device)
    first = int(token)
    try:
        batch.start([tallest, shortest])
        batch.step(token.repeat(2))
        batch.keep([0])
        batch.start([shortest])
        found = batch.step(token.repeat(2))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    for row, ids in zip(found, ([*tallest, first, first], [*shortest, first]), strict=True):
        own = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        apart = (row.float().log_softmax(-1) - own.log_softmax(-1)).abs()
        if not (own.softmax(-1) * apart).sum() <= TOLERANCE.get(model.dtype, 0.1):
            return False
    return True


# How far log-probs of a token may be apart by rounding, in nats, weighed by its probability: what a wrong mask gives is more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class StaticBatch:
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
        return _forward(self.model, tokens[:, None], positions, self.mask, self.cache)[:, 0]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; with none, `start` is next."""
        if rows:
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]


class ContinuousBatch:
    """A batch that rows leave and join: each row's keys and values begin at column 0, and it writes at its own column.

    Room for `rows` rows of `longest` tokens is taken once. `packed`: prompts are read as one row without padding.
    """

    joins = True

    def __init__(self, model: PreTrainedModel, rows: int, longest: int, packed: bool):
        self.model = model
        self.layers = [_RowsLayer(rows, longest) for _ in DynamicCache(config=model.config).layers]
        self.cache = Cache(layers=[*self.layers])
        self.longest, self.packed = longest, packed
        self.lengths = torch.empty(0, dtype=torch.long, device=model.device)  # of each row: the tokens in the cache

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits, cache, where = (_prefill_packed if self.packed else _prefill_rows)(self.model, prompts)
        rows = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(p) for p in prompts]))
        columns = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        rows, columns = (rows + len(self.lengths)).to(logits.device), columns.to(logits.device)
        found: Any
        for layer, found in zip(self.layers, cache.layers, strict=True):
            layer.write(rows, columns, found.keys[where], found.values[where])
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=logits.device)
        self.lengths = torch.cat([self.lengths, lengths])
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        columns = torch.arange(int(self.lengths.max()) + 1, device=tokens.device)
        mask = (columns <= self.lengths[:, None])[:, None, None]
        rows = torch.arange(len(tokens), device=tokens.device)
        for layer in self.layers:
            layer.rows, layer.at, layer.width = rows, self.lengths, len(columns)
        logits = _forward(self.model, tokens[:, None], self.lengths[:, None], mask, self.cache)[:, 0]
        # Rows whose answer has ended stay for a while: they write over their last column.
        self.lengths = (self.lengths + 1).clamp(max=self.longest - 1)
        return logits

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, in this order."""
        device = self.lengths.device
        places = torch.tensor(
            [place for place, row in enumerate(rows) if row != place], dtype=torch.long, device=device
        )
        if len(places):
            sources = torch.tensor([row for place, row in enumerate(rows) if row != place], device=device)
            for layer in self.layers:
                layer.move(sources, places)
        self.lengths = self.lengths[torch.tensor(rows, dtype=torch.long, device=device)]


class _RowsLayer(DynamicLayer):
    """keys, values: [rows, heads, columns, width], with room for all rows and their answers: tokens are written, nothing is
    copied."""

    keys: Tensor
    values: Tensor
    rows: Tensor  # 0, 1, ..., those in use
    at: Tensor  # the column of each one's next token
    width: int  # columns that any row has used, the next one counted

    def __init__(self, most: int, longest: int):
        super().__init__()
        self.most, self.longest = most, longest

    def write(self, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values: [tokens, heads, width], to these places."""
        if not self.is_initialized:
            # Zeros: what is masked must still be finite.
            self.keys, self.values = (
                x.new_zeros(self.most, x.shape[1], self.longest, x.shape[2]) for x in (keys, values)
            )
            self.is_initialized = True
        self.keys[rows, :, columns] = keys
        self.values[rows, :, columns] = values

    def update(self, key_states: Tensor, value_states: Tensor, *rest, **more) -> tuple[Tensor, Tensor]:
        self.write(self.rows, self.at, key_states[:, :, 0], value_states[:, :, 0])
        used = slice(len(self.rows)), slice(None), slice(self.width)
        return self.keys[used], self.values[used]

    def move(self, rows: Tensor, places: Tensor) -> None:
        self.keys[places] = self.keys[rows]
        self.values[places] = self.values[rows]


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
    return _forward(model, ids, (mask.cumsum(1) - 1).clamp(min=0), mask, cache)[:, 0], cache, mask


Where = tuple[
    Any, ...
]  # takes from keys or values [rows, heads, length, width] the prompts' tokens: [tokens, heads, width]


def _prefill_rows(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache, Where]:
    logits, cache, mask = _prefill(model, prompts)
    rows, columns = mask.nonzero(as_tuple=True)
    return logits, cache, (rows, slice(None), columns)


def _prefill_packed(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache, Where]:
    """All prompts in one row: nothing is computed for padding."""
    use_packed_attention(model)
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None].to(model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    table = torch.stack([lengths, torch.zeros_like(lengths)], dim=1)[None, None]
    cache = DynamicCache(config=model.config)
    logits = _forward(model, ids, positions, table, cache, lengths.cumsum(0) - 1)[0]
    return logits, cache, (torch.zeros_like(ids[0]), slice(None), torch.arange(ids.shape[1], device=ids.device))


def _forward(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache, wanted: Tensor | None = None
) -> Tensor:
    """Logits [rows, wanted, vocabulary] at these positions, the last one if not told."""
    # As an index: a slice of the last position is not contiguous, and the head would copy its weights a row.
    wanted = torch.tensor([ids.shape[1] - 1], device=ids.device) if wanted is None else wanted
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=wanted,
    ).logits
