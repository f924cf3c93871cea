"""The block mask of a packed row for FlexAttention."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128  # FlexAttention's block size; rows on a GPU are padded to a multiple


def block_mask(table: Tensor, length: int) -> BlockMask:
    """Return the block mask of a packed row of `length` tokens, padded at its end; `table` as in `attention.py`.

    A block of queries attends to the blocks from the start of its first query's item up to itself, which
    `create_block_mask` would find by evaluating length * length entries.
    """
    items = [[n for n in lengths if n] for lengths in table[0, 0].tolist()]
    item_of = torch.full((length,), -1, dtype=torch.int32)
    answer = torch.zeros(length, dtype=torch.int32)  # 0: the prompt; 1, 2, ...: its answers
    begin = torch.arange(length)  # where a token's item begins; padding attends to itself only
    start = 0
    for i, lengths in enumerate(items):
        begin[start : start + sum(lengths)] = start
        for k, n in enumerate(lengths):
            item_of[start : start + n], answer[start : start + n] = i, k
            start += n
    blocks = -(-length // FLEX_BLOCK)
    first = begin[::FLEX_BLOCK] // FLEX_BLOCK
    counts = torch.arange(blocks) - first + 1
    seen = (first[:, None] + torch.arange(blocks)) % blocks  # only the first `counts` of each row are used
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
