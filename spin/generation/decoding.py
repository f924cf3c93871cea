"""Continuous batching: decode many prompts at a time, and give the rows of finished answers to waiting prompts."""

import inspect
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spin.engines.attention import PACKED_ATTENTION, attention_window, use_packed_attention
from spin.runtime.errors import UserError, user_message

# Finished rows are removed, and prompts join, once this share of the rows is free. A finished row costs as much as a
# running one, but a prefill of few prompts costs more per prompt.
FREE = 0.125
# Largest difference attributed to rounding, in nats, weighted by probability. A wrong mask causes larger ones.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}

Ids = Sequence[int]
# (logits [rows, vocabulary], index of each row's prompt, length of its answer) -> token ids [rows]
Choose = Callable[[Tensor, list[int], list[int]], Tensor]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    choose: Choose,
    stop_ids: Collection[int],
    max_new_tokens: int,
    rows: int,
    advance: Callable[[int], None] = lambda ended: None,
) -> list[list[int]]:
    """Return the generated token ids for each prompt, up to and including a stop id, at most `max_new_tokens`.

    At most `rows` prompts are decoded at a time. `advance` is called with the number of answers that end in a step.
    """
    batch = make_batch(model, prompts, min(rows, len(prompts)), max(map(len, prompts)) + max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)) if batch.pads else sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    prompt_of: list[int] = []  # index of each row's prompt
    tokens = torch.empty(0, dtype=torch.long, device=model.device)

    def is_running(prompt: int) -> bool:
        answer = answers[prompt]
        return len(answer) < max_new_tokens and (not answer or answer[-1] not in stop_ids)

    def extend(logits: Tensor, first: int) -> Tensor:
        """Choose the next token of each row from `first` on, and append it to answers that have not ended."""
        active = prompt_of[first:]
        chosen = choose(logits, active, [min(len(answers[i]), max_new_tokens - 1) for i in active])
        extended = [(i, token) for i, token in zip(active, chosen.tolist(), strict=True) if is_running(i)]
        for i, token in extended:
            answers[i].append(token)
        advance(sum(not is_running(i) for i, _ in extended))
        return chosen

    while waiting or prompt_of:
        running = _compact([is_running(i) for i in prompt_of])
        if prompt_of and len(running) <= (1 - FREE) * len(prompt_of):
            batch.keep(running)
            tokens, prompt_of = tokens[running], [prompt_of[row] for row in running]
        if waiting and (len(prompt_of) <= (1 - FREE) * rows if batch.joins else not prompt_of):
            first = len(prompt_of)
            joining = [waiting.popleft()]
            while waiting and len(joining) < rows - first:
                if not batch.pads and len(prompts[waiting[0]]) > len(prompts[joining[0]]):
                    break
                joining.append(waiting.popleft())
            prompt_of = prompt_of + joining
            tokens = torch.cat([tokens, extend(batch.start([prompts[i] for i in joining]), first)])
        elif prompt_of:
            tokens = extend(batch.step(tokens), 0)
    return answers


def _compact(is_running: Sequence[bool]) -> list[int]:
    """Return the running rows, with the last ones moved to the places of finished rows."""
    rows = [row for row, running in enumerate(is_running) if running]
    movers = iter(row for row in rows if row >= len(rows))
    return [row if is_running[row] else next(movers) for row in range(len(rows))]


def make_batch(
    model: PreTrainedModel, prompts: Sequence[Ids], rows: int, longest: int
) -> "ContinuousBatch | StaticBatch":
    """Return a `ContinuousBatch` if the model supports it, else a `StaticBatch`, for `rows` rows of `longest` tokens.

    Each candidate is compared with the model's own forward, because a wrong mask, position or cache raises no error. A
    `ContinuousBatch` requires layers that cache the plain keys and values of all tokens; on a CPU its prompts are
    packed if possible. A `StaticBatch` pads prompts, or takes prompts of equal length for state-space models that do
    not ignore padding. Raises UserError if no candidate agrees.
    """
    window = attention_window(model)
    layers = DynamicCache(config=model.config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if plain and (not window or window >= longest):
        config = model.config.get_text_config()
        packable = model.device.type == "cpu" and config._attn_implementation in ("sdpa", PACKED_ATTENTION)
        for packed in (True, False) if packable else (False,):
            if _agrees_with_forward(ContinuousBatch(model, 3, longest + 2, packed), prompts):
                return ContinuousBatch(model, rows, longest, packed)
    for pads in (True, False):
        if _agrees_with_forward(StaticBatch(model, pads), prompts):
            return StaticBatch(model, pads)
    raise UserError(
        f"{model.config.model_type}: decoding with the model's cache differs from its own forward: try "
        "engine.precision=fp32, or generation.engine=vllm."
    )


@torch.inference_mode()
def _agrees_with_forward(batch: "ContinuousBatch | StaticBatch", prompts: Sequence[Ids]) -> bool:
    """Return whether a batch gives the model's own log-probs after a row has been removed and another has joined."""
    model, token = batch.model, prompts[0][0]
    longest = max(prompts, key=len)
    second = min(prompts, key=len) if batch.pads else longest[::-1]
    tokens = torch.tensor([token] * 3, device=model.device)
    sequences = [[*longest, token, token], [*second, token, token]]
    try:
        batch.start([longest, longest, second])
        batch.step(tokens)
        batch.keep([0, 2])
        if batch.joins:
            batch.start([second])
            sequences.append([*second, token])
        logits = batch.step(tokens[: len(sequences)])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        if user_message(error) is not None:  # such as lack of memory
            raise
        return False
    for row, ids in zip(logits, sequences, strict=True):
        expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        if not expected.isfinite().all():  # nothing to compare; sampling and scoring report it
            return True
        difference = (row.float().log_softmax(-1) - expected.log_softmax(-1)).abs()
        if not (expected.softmax(-1) * difference).sum() <= TOLERANCE[model.dtype]:
            return False
    return True


class StaticBatch:
    """A batch that uses the model's own cache, for any architecture. Rows can be removed, but none can join.

    With `pads`, prompts may differ in length and are padded on the left; without it there is no mask.
    """

    joins = False

    def __init__(self, model: PreTrainedModel, pads: bool):
        self.model, self.pads = model, pads

    def start(self, prompts: Sequence[Ids]) -> Tensor:
        """Process the prompts, one per row. Returns the logits of the next token, [rows, vocabulary]."""
        self.cache = DynamicCache(config=self.model.config)
        ids, self.mask = _pad(prompts, self.model.device)
        return self._forward(ids)

    def step(self, tokens: Tensor) -> Tensor:
        """Process the last token of each row, [rows]. Returns the logits of the next token."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        positions = _positions(self.mask)[:, -ids.shape[1] :]
        return _forward(self.model, ids, positions, self.mask if self.pads else None, self.cache)

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order. If there are none, `start` must be called next."""
        if rows:
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.reorder_cache(cast(torch.LongTensor, index))  # state-space caches have no `batch_select_indices`
            self.mask = self.mask[index]


class ContinuousBatch:
    """A batch like `StaticBatch` that prompts can join, as the keys and values of each row start at column 0.

    The cache is allocated once. With `packed`, prompts are processed as one row without padding.
    """

    joins = pads = True

    def __init__(self, model: PreTrainedModel, rows: int, longest: int, packed: bool):
        self.model, self.longest, self.packed = model, longest, packed
        self.layers = [_RowsLayer(rows, longest) for _ in DynamicCache(config=model.config).layers]
        self.cache = Cache(layers=[*self.layers])
        self.lengths = torch.empty(0, dtype=torch.long, device=model.device)  # cached tokens of each row

    def start(self, prompts: Sequence[Ids]) -> Tensor:
        device, first = self.lengths.device, len(self.lengths)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        rows = torch.arange(first, first + len(prompts), device=device).repeat_interleave(lengths)
        columns = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
        self.lengths = torch.cat([self.lengths, lengths])
        if not self.packed:
            ids, mask = _pad(prompts, device)
            self._write_to(rows, columns, mask.nonzero(as_tuple=True))
            return _forward(self.model, ids, _positions(mask), mask, self.cache)
        use_packed_attention(self.model)
        ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        table = torch.stack([lengths, torch.zeros_like(lengths)], dim=1)[None, None]
        self._write_to(rows, columns, 0)
        return _forward(self.model, ids, columns[None], table, self.cache, lengths.cumsum(0) - 1)

    def step(self, tokens: Tensor) -> Tensor:
        width = int(self.lengths.max()) + 1
        mask = (torch.arange(width, device=tokens.device) <= self.lengths[:, None])[:, None, None]
        self._write_to(torch.arange(len(tokens), device=tokens.device), self.lengths, (slice(None), 0), width)
        logits = _forward(self.model, tokens[:, None], self.lengths[:, None], mask, self.cache)
        # Rows with finished answers stay for some steps, and overwrite their last column.
        self.lengths = (self.lengths + 1).clamp(max=self.longest - 1)
        return logits

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.lengths.device)
        moved = (index != torch.arange(len(rows), device=index.device)).nonzero()[:, 0]
        for layer in self.layers:
            layer.keys[moved], layer.values[moved] = layer.keys[index[moved]], layer.values[index[moved]]
        self.lengths = self.lengths[index]

    def _write_to(self, rows: Tensor, columns: Tensor, tokens: Any, width: int | None = None) -> None:
        for layer in self.layers:
            layer.rows, layer.columns, layer.tokens, layer.width = rows, columns, tokens, width


class _RowsLayer(DynamicLayer):
    """A layer of the cache, with keys and values [rows, heads, columns, width] that are written in place.

    Token n of a forward pass is written to `rows[n]`, `columns[n]`; `tokens` selects the tokens from [rows, length].
    Attention reads the first `width` columns of `rows`, or only the pass's own keys and values if `width` is None.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Any
    width: int | None

    def __init__(self, most_rows: int, longest: int):
        super().__init__()
        self.most_rows, self.longest = most_rows, longest

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = (x.transpose(1, 2)[self.tokens] for x in (key_states, value_states))  # [tokens, heads, width]
        if not self.is_initialized:  # zeros, as masked values must be finite
            self.keys, self.values = (
                x.new_zeros(self.most_rows, x.shape[1], self.longest, x.shape[2]) for x in (keys, values)
            )
            self.is_initialized = True
        self.keys[self.rows, :, self.columns] = keys
        self.values[self.rows, :, self.columns] = values
        if self.width is None:
            return key_states, value_states
        return self.keys[: len(self.rows), :, : self.width], self.values[: len(self.rows), :, : self.width]

    def get_seq_length(self) -> int:
        return 0  # for the mask of prompts, which start at position 0; `step` makes its own mask


def _pad(prompts: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the token ids and the mask, [prompts, length], of prompts padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _forward(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache, at: Tensor | None = None
) -> Tensor:
    """Return the logits, [rows * positions, vocabulary], at the positions `at` (default: the last one)."""
    # An index, because a slice is not contiguous and the output layer would then copy its weights for each row.
    at = torch.tensor([ids.shape[1] - 1], device=ids.device) if at is None else at
    # Mamba models name the cache `cache_params`, and silently ignore `past_key_values`.
    name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    options = {name: cache, "use_cache": True, "logits_to_keep": at}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits.flatten(0, 1)
