"""The language model head on response positions, with a hand-written backward pass."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel


def logit_transform(model: PreTrainedModel) -> tuple[float, float]:
    """What some models do to the head's product: a scale (Cohere, Granite) and a soft cap (Gemma 2); 1 and 0 if nothing."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None) or 0.0


class OutputLayer(torch.nn.Module):
    """The weights of a model's output layer, as the module that computes log-probs with them: see `ResponseHead`."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, hidden: Tensor, target: Tensor, scale: float, cap: float, chunk: int) -> Tensor:
        return ResponseHead.apply(hidden, self.weight, self.bias, target, scale, cap, chunk)


class ResponseHead(torch.autograd.Function):
    """log softmax(cap(scale * (hidden @ weight.T + bias)))[target], with its backward written out.

    hidden [n, width], weight [vocabulary, width], target [n] -> fp32 [n]. The vocabulary is gone through in pieces of `chunk`
    words, and for each the positions in blocks: the logits of a block fit the processor's cache, and each piece of the
    weight's gradient is a single product. Only log-sum-exps are kept between forward and backward, which makes the logits
    again: memory is n * chunk in the weights' type.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, cap, chunk):
        # Written into place: small results allocated between the large pieces would fragment the heap.
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers = torch.full_like(logps, -torch.inf)
        for part, blocks in vocabulary_pieces(target, len(weight), chunk):
            for block, rows, words in blocks:
                logits, _ = _logits(hidden[block], weight[part], bias if bias is None else bias[part], scale, cap)
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
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # Summed over pieces in fp32: the products themselves are in the weights' type.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        slopes = weight.new_empty(len(hidden), min(ctx.chunk, len(weight)))  # of a piece
        for part, blocks in vocabulary_pieces(target, len(weight), ctx.chunk):
            slopes = slopes[:, : part.stop - part.start]
            for block, rows, words in blocks:
                logits, squashed = _logits(
                    hidden[block], weight[part], bias if bias is None else bias[part], ctx.scale, ctx.cap
                )
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
                if grad_hidden is not None:
                    grad_hidden[block] += slopes[block] @ weight[part]
            if grad_weight is not None:
                torch.mm(slopes.T, hidden, out=grad_weight[part])
        return (
            grad_hidden.to(hidden.dtype) if grad_hidden is not None else None,
            grad_weight,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            *[None] * 4,
        )


BLOCK = {"cpu": 256}  # positions whose logits of a piece of the vocabulary are made together; all on a GPU


def vocabulary_pieces(
    target: Tensor, words: int, chunk: int
) -> Iterator[tuple[slice, list[tuple[slice, Tensor, Tensor]]]]:
    """Pieces of the vocabulary; of each, the blocks of positions, with those in a block whose target lies in the piece, and
    where in it."""
    count = len(target)
    size = BLOCK.get(target.device.type, max(1, count))
    blocks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    tile = target // chunk * len(blocks) + torch.arange(count, device=target.device) // size
    ordered, order = tile.sort(stable=True)
    tiles = torch.arange(-(-words // chunk) * len(blocks) + 1, device=target.device)
    ends = iter(torch.searchsorted(ordered, tiles).tolist())
    begin = next(ends)
    for start in range(0, words, chunk):
        found = []
        for block in blocks:
            inside = order[begin : (begin := next(ends))]
            found.append((block, inside - block.start, target[inside] - start))
        yield slice(start, min(start + chunk, words)), found


def _logits(hidden, weight, bias, scale, cap):
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1:
        logits *= scale
    if not cap:
        return logits, None
    squashed = (logits / cap).tanh_()
    return squashed * cap, squashed
