"""Attention over a packed row, registered with transformers as an attention implementation.

A packed row is one sequence `prompt | answer | answer | ... | prompt | ...` without padding. An answer attends to its
prompt and to itself. The row's structure is passed instead of a 4D mask, which transformers leaves unchanged. It is a
table of lengths, int64 [1, 1, items, 1 + answers]: for each item its prompt, then its answers, padded with zeros.
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
    """Set the model's attention to `packed_attention`, which is plain SDPA for ordinary masks."""
    if model.config.get_text_config()._attn_implementation != PACKED_ATTENTION:
        model.set_attn_implementation(PACKED_ATTENTION)


def attention_window(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that the model's sliding-window layers attend to, or None without such layers."""
    config = model.config.get_text_config()
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


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
    """Return the attention output, [rows, length, heads, width], of query, key and value, [rows, heads, length, width].

    `attention_mask` is a table of lengths (see above), a BlockMask, or an SDPA mask. With a table, causal attention is
    computed for each sequence prompt + answer separately, without a mask. A prompt's queries are recomputed for each
    answer, which costs less than masked attention from the answer's queries alone.
    """
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("a packed row supports no dropout, soft cap or position bias")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend(query, key, value, attention_mask, kwargs.get("sliding_window"), scale), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def _parts(table: list[list[int]]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Split a row into parts: each prompt with its first answer, and each further answer.

    Returns the lengths of the parts, and for each sequence the index of the part with its prompt, the prompt's length,
    and the index of the part with its answer.
    """
    lengths: list[int] = []
    sequences = []
    for prompt, first, *further in table:
        part = len(lengths)
        lengths.append(prompt + first)
        sequences.append((part, prompt, part))
        for answer in filter(None, further):
            sequences.append((part, prompt, len(lengths)))
            lengths.append(answer)
    return lengths, sequences


class _Sequences(torch.autograd.Function):
    """Causal attention over each sequence prompt + answer.

    query, key, value: [1, heads, length, width], with fewer heads in key and value if query heads share them. Returns
    [1, length, heads, width]. On a CPU without matrix units for bf16, it computes in fp32, which is twice as fast as
    SDPA's emulation and more accurate.
    """

    @staticmethod
    def forward(ctx, query, key, value, table, window, scale):
        lengths, sequences = _parts(table[0, 0].tolist())
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
        part_grads: list[list[Tensor]] = [[], [], []]
        for (first, prompt, part), normaliser in zip(sequences, normalisers, strict=True):
            q, k, v, out, grad = _sequence(rows, first, prompt, part)
            if part != first:
                grad[:, :, :prompt] = 0  # the prompt's output comes from the sequence of its first answer
            of_q, of_k, of_v = _FLASH_BACKWARD(
                grad, q, k, v, out, normaliser, dropout_p=0.0, **_causal(q, ctx.window), scale=ctx.scale
            )
            sequence_grads = of_q, of_k.sum(1, keepdim=True), of_v.sum(1, keepdim=True)
            for parts, new in zip(part_grads, (x.permute(2, 0, 1, 3) for x in sequence_grads), strict=True):
                if part != first:
                    parts[first][:prompt] += new[:prompt]
                parts.append(new[prompt:] if part != first else new)
        joined = (torch.cat(parts).flatten(1, 2).to(query.dtype)[None].transpose(1, 2) for parts in part_grads)
        return *joined, None, None, None


_attend = torch.compiler.disable(_Sequences.apply)  # the lengths differ from row to row


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _cut(row: Tensor, shared: int, lengths: list[int]) -> tuple[Tensor, ...]:
    """Split a row, [1, length, heads, width], into parts [length, key heads, query heads per key head or 1, width]."""
    is_emulated = row.dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("amx_bf16")
    dtype = torch.float32 if is_emulated else row.dtype
    return row[0].to(dtype).unflatten(1, (shared, -1)).split(lengths)


def _sequence(rows: Sequence[Sequence[Tensor]], first: int, prompt: int, part: int) -> list[Tensor]:
    """Return the same sequence from each of `rows`: [key heads, query heads per key head, length, width]."""
    parts = [torch.cat((row[first][:prompt], row[part])) if part != first else row[part] for row in rows]
    return [x.permute(1, 2, 0, 3).expand(-1, parts[0].shape[2], -1, -1) for x in parts]


def _causal(query: Tensor, window: int | None) -> dict[str, Any]:
    length = query.shape[2]
    if not window or length <= window:
        return {"is_causal": True}
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(1, 1, length, length, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
    return {"is_causal": False, "attn_mask": mask}
