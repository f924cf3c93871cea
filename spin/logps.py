"""log p(response | prompt) of every response in a batch, summed over its tokens, in fp32 from the logits on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spin.attention import FLEX_BLOCK, NAME, block_mask, use_packed_attention
from spin.checkpoint import Keep, Part, keep_nothing
from spin.errors import UserError, brief, explain
from spin.pairs import Batch, Continuations, Rows, collate, plan_batches


@dataclass(frozen=True)
class Forward:
    """How log-probs are computed: exact either way, but for rounding.

    layout: "packed" (prompts shared, one row a batch, attention by each sequence), "masked" (the same in several rows, with
    a dense mask: for attention that is not ours to choose) or "padded". head: "chunked" (logits on response positions only, in
    pieces of `head_chunk` words that are never kept) or "full" (the model's own logits, for heads that do more than a product).
    """

    layout: str
    head: str
    tokens_per_row: int
    tokens_per_batch: int
    head_chunk: int

    def plan(self, items: Sequence[Continuations]) -> list[Rows]:
        return plan_batches(items, self.layout, self.tokens_per_row, self.tokens_per_batch)

    def batches(self, items: Sequence[Continuations]) -> Iterator[Batch]:
        """One after another: their masks together would take more memory than a large data set."""
        for rows in self.plan(items):
            yield collate(items, self.layout, rows)


def sequence_logps(model: PreTrainedModel, batch: Batch, forward: Forward, head: "OutputLayer | None" = None) -> Tensor:
    """Sum over each response's tokens of log p(token | prompt, earlier tokens): fp32 [batch.responses], in nats.

    `head`: the model's output layer, where whoever spreads weights over ranks has to know of it beforehand."""
    inputs = _inputs(model, batch, forward.layout)
    if forward.head == "full":
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.source].float()
        logps = logits.log_softmax(-1).gather(1, batch.target[:, None]).squeeze(1)
    else:
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.source]
        head = head or OutputLayer(model.get_output_embeddings())
        logps = head(hidden, batch.target, *_logit_transform(model), forward.head_chunk)
    return torch.zeros(batch.responses, device=logps.device).index_add(0, batch.sequence, logps)


def _inputs(model: PreTrainedModel, batch: Batch, layout: str) -> dict:
    ids, positions, mask = batch.input_ids, batch.position_ids, batch.attention_mask
    if layout == "masked":
        # Additive, in the compute type: otherwise every layer converts the boolean mask again.
        allowed, lowest = mask, torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~allowed, lowest)
    if layout == "packed":
        use_packed_attention(model)
        if ids.is_cuda:
            padding = (0, -ids.shape[1] % FLEX_BLOCK)
            ids, positions = (torch.nn.functional.pad(x, padding) for x in (ids, positions))
            return {"input_ids": ids, "position_ids": positions, "attention_mask": block_mask(mask, ids.shape[1])}
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def plain_logps(model: PreTrainedModel, item: Continuations) -> list[Tensor]:
    """The token log-probs of each response by the model's own forward, one sequence at a time: slow, and the yardstick."""
    result = []
    for response in item.responses:
        ids = torch.tensor([[*item.prompt_ids, *response]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(item.prompt_ids) - 1 : -1].float()
        result.append(logits.log_softmax(-1).gather(1, ids[0, len(item.prompt_ids) :, None]).squeeze(1))
    return result


def _logit_transform(model: PreTrainedModel) -> tuple[float, float]:
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
        for part, blocks in _pieces(target, len(weight), chunk):
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
        for part, blocks in _pieces(target, len(weight), ctx.chunk):
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


def _pieces(target: Tensor, words: int, chunk: int) -> Iterator[tuple[slice, list[tuple[slice, Tensor, Tensor]]]]:
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


# --- which way is right for this model --------------------------------------------------------------------------------

LAYOUTS = ("packed", "masked", "padded")  # the fastest first

# What rounding explains, in nats a response token: |difference of sums| over all sequences / their tokens. Several
# times what the embedded model shows, and below what a wrong mask gives.
TOKEN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


@torch.no_grad()
def choose_forward(
    model: PreTrainedModel,
    items: Sequence[Continuations],
    layout: str,
    tokens_per_row: int,
    tokens_per_batch: int,
    head_chunk: int,
    longest: int,
) -> tuple[Forward, str | None]:
    """Pick the fastest forward that agrees with the model's own on a few of `items`; established, not assumed.

    A wrong attention mask or head is silent, so each candidate's log-probs are compared with `plain_logps`. `longest` is
    the most tokens that any item of the run can have: a longer row than the samples' could exceed an attention window.
    Returns the forward, and a sentence where it is not the first choice. Raises UserError if no way that `layout` allows
    agrees with the model.
    """
    sample = list(items[:4])
    window = _window(model)
    if window and window < longest:  # layers that look back less far must show
        ids = [token for item in items for response in item.responses for token in response]
        count = min(longest, window + 32) - len(items[0].prompt_ids)
        sample.append(Continuations(items[0].prompt_ids, (tuple((ids * -(-count // len(ids)))[:count]), ids[:1])))
    expected = torch.stack([logps.sum() for item in sample for logps in plain_logps(model, item)]).cpu()
    if not expected.isfinite().all():
        raise UserError(
            "the model's own log-probs are not finite: its weights are broken, or too large for this precision: give a "
            "whole model, or try engine.precision=fp32."
        )
    tokens = sum(len(response) for item in sample for response in item.responses)
    candidates = [(ly, head) for head in ("chunked", "full") for ly in LAYOUTS if layout in ("auto", ly)]
    refused: list[str] = []
    for candidate_layout, head in candidates:
        forward = Forward(candidate_layout, head, tokens_per_row, tokens_per_batch, head_chunk)
        reason = _unsuitable(model, forward, longest)
        if reason is None:
            try:
                found = logps_of(model, sample, forward)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                if candidate_layout == "padded" or (explain(error) and not isinstance(error, UserError)):
                    raise
                reason = f"this model does not take it ({brief(error)})"
            else:
                off = ((found - expected).abs().sum() / tokens).item()
                if off <= TOKEN_TOLERANCE.get(model.dtype, 0.03):
                    return forward, f"using the {candidate_layout} layout: {'; '.join(refused)}" if refused else None
                reason = f"differs from the model's own forward by {off:.2g} nats a token"
        refused.append(f"{candidate_layout} rows with the {head} head: {reason}")
    hint = "use engine.layout=auto" if layout != "auto" else "try engine.precision=fp32"
    raise UserError(
        f"engine.layout={layout}: no such way of computing log-probs agrees with the model's own forward: "
        f"{'; '.join(refused)}; {hint}."
    )


def _unsuitable(model: PreTrainedModel, forward: Forward, longest: int) -> str | None:
    """Why this model can't take a packed row at all, where its config tells."""
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if forward.layout == "padded":
        return None
    if attention not in {"packed": ("sdpa", NAME), "masked": ("sdpa", NAME, "eager")}[forward.layout]:
        return f"its attention ({attention}) is not SDPA"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = _window(model)
    # Gemma and Mistral name a window that only matters where something can be longer than it. Packed rows on a CPU keep it.
    by_sequence = forward.layout == "packed" and model.device.type == "cpu"
    if window and not by_sequence and window < max(longest, forward.tokens_per_row):
        return f"its attention window of {window} is shorter than a row"
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers other than attention ({', '.join(sorted(kinds))})"
    return None


def _window(model: PreTrainedModel) -> int | None:
    """How many tokens back some layers look at most; None where all see everything."""
    config = model.config.get_text_config()
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def logps_of(
    model: PreTrainedModel,
    items: Sequence[Continuations],
    forward: Forward,
    advance: Callable[[int], None] = lambda items: None,
    keep: Keep = keep_nothing,
    shard_size: int = 256,
) -> Tensor:
    """`sequence_logps` of all responses of all items, without gradients, in the items' order: fp32, on the CPU.

    `keep` gets shards of whole batches, of `shard_size` items or a few more; how they are cut changes no bit.
    `advance` is told how many items have just been scored. Raises UserError if a log-prob is not finite.
    """
    first = [0]
    for item in items:
        first.append(first[-1] + len(item.responses))
    result = torch.empty(first[-1])

    @torch.inference_mode()
    def score(plan: list[Rows]) -> list[dict]:
        rows = []
        for part in plan:
            batch = collate(items, forward.layout, part)
            where = [k for i in batch.items for k in range(first[i], first[i + 1])]
            logps = sequence_logps(model, batch.to(model.device), forward).tolist()
            rows += [{"response": k, "logp": logp} for k, logp in zip(where, logps, strict=True)]
            advance(len(batch.items))
        return rows

    def content(plan: list[Rows]) -> str:
        inside = [i for part in plan for chosen in part for i in chosen]
        text = json.dumps([[items[i].prompt_ids, *items[i].responses] for i in inside])
        return hashlib.sha256(text.encode()).hexdigest()

    plans = list(_shards(forward.plan(items), shard_size))
    for rows in keep([Part([content(plan)], partial(score, plan)) for plan in plans]):
        for row in rows:
            result[row["response"]] = row["logp"]
    if not result.isfinite().all():
        raise UserError(
            "some log-probs are not finite: the model's weights are broken, or its training went astray: lower the learning "
            "rate (optimizer.lr, schedule.sft_lr), or try engine.precision=fp32."
        )
    return result


def _shards(plan: Sequence[Rows], size: int) -> Iterator[list[Rows]]:
    """Runs of batches with at least `size` items together."""
    shard: list[Rows] = []
    count = 0
    for part in plan:
        shard.append(part)
        count += sum(map(len, part))
        if count >= size:
            yield shard
            shard, count = [], 0
    if shard:
        yield shard
