"""Attention over a packed row, as an implementation that transformers' models call.

A packed row is one sequence `prompt | answer | answer | ... | prompt | ...` without padding. Every answer attends to its own
prompt and to itself. The row's structure travels where a model expects a 4D mask, which transformers hands on untouched: as
a table of lengths, int64 [1, 1, items, 1 + answers], an item's prompt first, short rows filled with zeros.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "spin_packed"
FLEX_BLOCK = 128  # FlexAttention's own block, of which a row on a GPU is a whole number


def use_packed_attention(model: PreTrainedModel) -> None:
    """Have the model call `packed_attention`. Without a table it computes what it did before (SDPA)."""
    if model.config.get_text_config()._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query, key, value: [rows, heads, length, width] -> [rows, length, heads, width], as transformers asks.

    `attention_mask` decides: a table of lengths (see above), a BlockMask, or what SDPA takes. With a table, each sequence
    prompt + answer is a causal attention of its own, so that nothing is computed between answers or items, and no mask
    exists; a prompt's queries are computed again with each answer, which costs less than a masked rectangle.
    """
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    items = [[n for n in lengths if n] for lengths in attention_mask[0, 0].tolist()]
    # A prompt and its first answer stand together as they are: one part.
    parts = [n for prompt, first, *others in items for n in (prompt + first, *others)]
    # In fp32 where the type has no units of its own: twice as fast as SDPA's emulation, and closer.
    kind = torch.float32 if query.dtype == torch.bfloat16 and emulates_bf16(query.device) else query.dtype
    queries, keys, values = (x.to(kind).split(parts, dim=2) for x in (query, key, value))
    window = kwargs.get("sliding_window")
    outputs, at = [], 0
    for prompt, _, *others in items:
        for k in range(1 + len(others)):
            q, kk, v = (_sequence(x, at, k, prompt) for x in (queries, keys, values))
            mask = _window_mask(q.shape[2], window, q.device) if window and q.shape[2] > window else None
            output, _ = sdpa_attention_forward(module, q, kk, v, mask, dropout=dropout, scaling=scaling, **kwargs)
            outputs.append(output[:, prompt:] if k else output)
        at += 1 + len(others)
    return torch.cat(outputs, dim=1).to(query.dtype), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def block_mask(table: Tensor, length: int) -> BlockMask:
    """The structure of a packed row of `length` tokens, padding at its end, as FlexAttention takes it.

    The blocks that a block of queries looks at are told, not found by going through length * length pairs: from where
    the item of its first query begins up to itself.
    """
    items = [[n for n in lengths if n] for lengths in table[0, 0].tolist()]
    item_of = torch.full((length,), -1, dtype=torch.int32)
    answer = torch.zeros(length, dtype=torch.int32)  # 0 the prompt, 1, 2, ... its answers
    begin = torch.arange(length)  # where a token's item begins; padding sees itself alone
    start = 0
    for i, lengths in enumerate(items):
        begin[start : start + sum(lengths)] = start
        for k, n in enumerate(lengths):
            item_of[start : start + n], answer[start : start + n] = i, k
            start += n
    blocks = -(-length // FLEX_BLOCK)
    first = begin[::FLEX_BLOCK] // FLEX_BLOCK
    counts = torch.arange(blocks) - first + 1
    seen = (first[:, None] + torch.arange(blocks)) % blocks  # of each row, the first `counts` matter
    owner, part = item_of.to(table.device), answer.to(table.device)

    def may_attend(b, h, q, k):
        same = (owner[q] == owner[k]) & ((part[k] == 0) | (part[q] == part[k]))
        return (q >= k) & (same & (owner[q] >= 0) | (q == k))

    return BlockMask.from_kv_blocks(
        counts.to(table.device, torch.int32)[None, None],
        seen.to(table.device, torch.int32)[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=may_attend,
        seq_lengths=(length, length),
    )


def _sequence(parts: tuple[Tensor, ...], at: int, k: int, prompt: int) -> Tensor:
    """An item's prompt and its k-th answer, of the parts that a row was split into."""
    return torch.cat((parts[at][:, :, :prompt], parts[at + k]), dim=2) if k else parts[at]


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool [1, 1, length, length]: causal, and no further back than `window` tokens, itself counted."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def emulates_bf16(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16")
