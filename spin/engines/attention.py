"""Attention over a packed row, as an implementation that transformers' models call.

A packed row is one sequence `prompt | answer | answer | ... | prompt | ...` without padding. Every answer attends to its own
prompt and to itself. The row's structure travels where a model expects a 4D mask, which transformers hands on untouched: as
a table of lengths, int64 [1, 1, items, 1 + answers], an item's prompt first, short rows filled with zeros.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "spin_packed"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Have the model call `packed_attention`. Without a table it computes what it did before (SDPA)."""
    if model.config.get_text_config()._attn_implementation != PACKED_ATTENTION:
        model.set_attn_implementation(PACKED_ATTENTION)


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
    if dropout or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("a packed row takes no dropout, soft cap or position bias")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths, sequences = _parts(attention_mask[0, 0].tolist())
    return _Sequences.apply(query, key, value, lengths, sequences, kwargs.get("sliding_window"), scale), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def _parts(table: list[list[int]]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Cuts a row into parts: a prompt and its first answer are one, every further answer is one. Returns their lengths, and
    for each sequence the part with its prompt, the prompt's length, and the part with its answer."""
    lengths: list[int] = []
    sequences = []
    for prompt, first, *others in table:
        here = len(lengths)
        lengths.append(prompt + first)
        sequences.append((here, prompt, here))
        for answer in filter(None, others):
            sequences.append((here, prompt, len(lengths)))
            lengths.append(answer)
    return lengths, sequences


class _Sequences(torch.autograd.Function):
    """Each sequence prompt + answer by itself, causal. query, key, value: [1, heads, length, width], fewer heads in the
    last two where they share them -> [1, length, heads, width].

    For the backward pass arguments and result are kept as they are, and log-sum-exps. Computed in fp32 where the type has
    no units of its own: twice as fast as SDPA's emulation, and closer.
    """

    @staticmethod
    def forward(ctx, query, key, value, lengths, sequences, window, scale):
        rows = [_cut(x.transpose(1, 2), key.shape[1], lengths) for x in (query, key, value)]
        outputs, normalisers = [], []
        for first, prompt, part in sequences:
            q, k, v = _sequence(rows, first, prompt, part)
            output, normaliser = _FLASH(q, k, v, **_causal(q, window), scale=scale)
            output = output.permute(2, 0, 1, 3)
            outputs.append(output[prompt:] if part != first else output)
            normalisers.append(normaliser)
        output = torch.cat(outputs).flatten(1, 2).to(query.dtype)[None]
        ctx.save_for_backward(query, key, value, output, *normalisers)
        ctx.cut, ctx.window, ctx.scale = (lengths, sequences), window, scale
        return output

    @staticmethod
    def backward(ctx, *grads):
        query, key, value, output, *normalisers = ctx.saved_tensors
        (lengths, sequences), shared = ctx.cut, key.shape[1]
        rows = [_cut(x.transpose(1, 2), shared, lengths) for x in (query, key, value)]
        rows += [_cut(x, shared, lengths) for x in (output, grads[0])]
        found: list[list[Tensor]] = [[], [], []]
        for (first, prompt, part), normaliser in zip(sequences, normalisers, strict=True):
            q, k, v, out, grad = _sequence(rows, first, prompt, part)
            if part != first:
                grad[:, :, :prompt] = 0  # these results were left to the first answer
            of_q, of_k, of_v = _FLASH_BACKWARD(
                grad, q, k, v, out, normaliser, dropout_p=0.0, **_causal(q, ctx.window), scale=ctx.scale
            )
            new_ones = of_q, of_k.sum(1, keepdim=True), of_v.sum(1, keepdim=True)
            for parts, new in zip(found, (x.permute(2, 0, 1, 3) for x in new_ones), strict=True):
                if part != first:
                    parts[first][:prompt] += new[:prompt]
                parts.append(new[prompt:] if part != first else new)
        joined = (torch.cat(parts).flatten(1, 2).to(query.dtype)[None].transpose(1, 2) for parts in found)
        return *joined, None, None, None, None


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _cut(row: Tensor, shared: int, lengths: list[int]) -> tuple[Tensor, ...]:
    """[1, length, heads, width] -> parts [part, shared heads, heads that share one or 1, width], to compute in."""
    kind = torch.float32 if row.dtype == torch.bfloat16 and emulates_bf16(row.device) else row.dtype
    return row[0].to(kind).unflatten(1, (shared, -1)).split(lengths)


def _sequence(rows: Sequence[Sequence[Tensor]], first: int, prompt: int, part: int) -> list[Tensor]:
    """[shared heads, heads that share one, length, width] of a sequence, of each row: nothing is copied for heads that share."""
    parts = [torch.cat((row[first][:prompt], row[part])) if part != first else row[part] for row in rows]
    return [x.permute(1, 2, 0, 3).expand(-1, parts[0].shape[2], -1, -1) for x in parts]


def _causal(query: Tensor, window: int | None) -> dict[str, Any]:
    length = query.shape[2]
    if window and length > window:
        mask = _window_mask(length, window, query.device)
        return {
            "is_causal": False,
            "attn_mask": torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf),
        }
    return {"is_causal": True}


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool [1, 1, length, length]: causal, and no further back than `window` tokens, itself counted."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def emulates_bf16(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16")
