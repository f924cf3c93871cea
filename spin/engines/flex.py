"""The block mask of a packed row for FlexAttention."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128  # block size of FlexAttention; rows on a GPU are padded to a multiple of it


def block_mask(table: Tensor, length: int) -> BlockMask:
    """Return the block mask of a packed row, padded at its end to `length` tokens; `table` as in `attention.py`.

    A block of queries attends to the blocks from the start of its first query's item up to itself.
    `create_block_mask` would determine them by evaluating length * length entries.
    """
    lengths = table[0, 0].cpu()
    parts = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())  # flat index into the table, per token
    items, answers = parts // lengths.shape[1], parts % lengths.shape[1]  # answer 0 is the prompt
    item_lengths = lengths.sum(1)
    begin = torch.arange(length)  # start of each token's item; padding attends only to itself
    begin[: len(parts)] = (item_lengths.cumsum(0) - item_lengths)[items]
    blocks = -(-length // FLEX_BLOCK)
    first = begin[::FLEX_BLOCK] // FLEX_BLOCK
    counts = torch.arange(blocks) - first + 1
    seen = (first[:, None] + torch.arange(blocks)) % blocks  # only the first `counts` of each row are used
    padding = (0, length - len(parts))
    owner = torch.nn.functional.pad(items, padding, value=-1).to(table.device, torch.int32)
    part = torch.nn.functional.pad(answers, padding).to(table.device, torch.int32)

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
