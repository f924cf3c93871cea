"""The language model head at response positions, with an explicit backward pass."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def logit_transform(model: PreTrainedModel) -> tuple[float, float]:
    """Return the scale (Cohere, Granite; else 1) and soft cap (Gemma 2; else 0) that a model applies to its logits."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None) or 0.0


class OutputLayer(torch.nn.Module):
    """A module that computes log-probs with the weights of a model's output layer (see `ResponseHead`)."""

    weight: Tensor

    def __init__(self, layer: Any):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, hidden: Tensor, target: Tensor, scale: float, cap: float, chunk: int) -> Tensor:
        # Mamba's hidden states are fp32.
        return ResponseHead.apply(hidden.type_as(self.weight), self.weight, self.bias, target, scale, cap, chunk)


class ResponseHead(torch.autograd.Function):
    """log softmax(cap(scale * (hidden @ weight.T + bias)))[target]: hidden [n, width], target [n] -> fp32 [n].

    It iterates over pieces of `chunk` words, and in each piece over blocks of positions, so that the logits of a block
    fit the processor's cache and each piece of the weight gradient is one matrix product. The backward pass recomputes
    the logits, and normalises them with the stored log-sum-exps. Memory is n * chunk numbers of the weights' type.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, cap, chunk):
        # Results are written in place: small allocations between large ones would fragment the heap.
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers = torch.full_like(logps, -torch.inf)
        for part, blocks in vocabulary_pieces(target, len(weight), chunk):
            for block, rows, words in blocks:
                logits, _ = _logits(hidden[block], weight, bias, part, scale, cap)
                logps[block][rows] = logits[rows, words]
                torch.logaddexp(normalisers[block], logits.logsumexp(-1), out=normalisers[block])
        logps -= normalisers
        ctx.save_for_backward(hidden, weight, bias, target, normalisers)
        ctx.scale, ctx.cap, ctx.chunk = scale, cap, chunk
        return logps

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        hidden, weight, bias, target, normalisers = ctx.saved_tensors
        # Matrix products are in the weights' type, and their sums over pieces in fp32.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        slopes = weight.new_empty(len(hidden), min(ctx.chunk, len(weight)))  # gradients of one piece's logits
        for part, blocks in vocabulary_pieces(target, len(weight), ctx.chunk):
            slopes = slopes[:, : part.stop - part.start]
            for block, rows, words in blocks:
                logits, squashed = _logits(hidden[block], weight, bias, part, ctx.scale, ctx.cap)
                # d logp / d logits = onehot(target) - softmax(logits)
                slope = logits.sub_(normalisers[block, None]).exp_().mul_(-grad[block, None])
                slope[rows, words] += grad[block][rows]
                if squashed is not None:
                    slope *= 1 - squashed**2
                if ctx.scale != 1:
                    slope *= ctx.scale
                if grad_bias is not None:
                    grad_bias[part] += slope.sum(0)
                slopes[block] = slope
                grad_hidden[block] += slopes[block] @ weight[part]
            if grad_weight is not None:
                torch.mm(slopes.T, hidden, out=grad_weight[part])
        grad_bias = grad_bias if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, *[None] * 4


BLOCK = {"cpu": 256}  # positions per block; on a GPU one block has all positions


def vocabulary_pieces(
    target: Tensor, words: int, chunk: int
) -> Iterator[tuple[slice, list[tuple[slice, Tensor, Tensor]]]]:
    """Yield each piece of the vocabulary with the blocks of positions.

    Each block comes with the positions in it whose target is in the piece, and these targets' offsets in the piece.
    """
    count = len(target)
    size = BLOCK.get(target.device.type, max(1, count))
    blocks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    tile = target // chunk * len(blocks) + torch.arange(count, device=target.device) // size
    ordered, order = tile.sort(stable=True)
    tiles = torch.arange(-(-words // chunk) * len(blocks) + 1, device=target.device)
    ends = iter(torch.searchsorted(ordered, tiles).tolist())
    begin = next(ends)
    for start in range(0, words, chunk):
        in_piece = []
        for block in blocks:
            inside = order[begin : (begin := next(ends))]
            in_piece.append((block, inside - block.start, target[inside] - start))
        yield slice(start, min(start + chunk, words)), in_piece


def _logits(hidden, weight, bias, part, scale, cap):
    """Return the logits of the words in `part`, and tanh(logits / cap) or None without a cap."""
    logits = torch.nn.functional.linear(hidden, weight[part], None if bias is None else bias[part]).float()
    if scale != 1:
        logits *= scale
    if not cap:
        return logits, None
    squashed = (logits / cap).tanh_()
    return squashed * cap, squashed
