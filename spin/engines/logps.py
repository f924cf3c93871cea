"""Compute log p(response | prompt), summed over the response's tokens, in fp32 from the logits on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spin.engines.attention import PACKED_ATTENTION, attention_window, use_packed_attention
from spin.engines.flex import FLEX_BLOCK, block_mask
from spin.engines.head import OutputLayer, logit_transform
from spin.engines.packing import Batch, Continuations, collate, plan_packed, plan_padded
from spin.runtime.errors import UserError, brief, user_message
from spin.runtime.shards import Shard, ShardDriver, compute_shards

LAYOUTS = ("packed", "padded")  # fastest first
# Largest difference attributed to rounding, in nats per response token: several times that of the embedded model, and
# less than that of a wrong mask.
TOKEN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


@dataclass(frozen=True)
class Forward:
    """A method of computing log-probs. All methods agree up to rounding.

    layout: "packed" (one row per batch, prompts shared, attention within each sequence) or "padded", for models that
    need their own attention. head: "chunked" (logits at response positions only, in pieces of `head_chunk` words that
    are not stored) or "full" (the model's own logits, for heads that are not a single matrix product).
    """

    layout: str
    head: str
    tokens_per_batch: int
    head_chunk: int

    def plan(self, items: Sequence[Continuations]) -> list[list[int]]:
        """Divide the indices of `items` into batches."""
        plan = plan_packed if self.layout == "packed" else plan_padded
        return plan(items, self.tokens_per_batch)

    def batches(self, items: Sequence[Continuations]) -> Iterator[Batch]:
        """Yield the batches of `items` one at a time, as all of them together could exceed memory."""
        return (collate(items, self.layout, chosen) for chosen in self.plan(items))


def sequence_logps(model: PreTrainedModel, batch: Batch, forward: Forward, head: OutputLayer | None = None) -> Tensor:
    """Return the sum of log p(token | prompt, earlier tokens) over each response: fp32 [batch.responses], in nats.

    `head` is the model's output layer, if it must be a registered module because its weights are sharded.
    """
    inputs = _inputs(model, batch, forward.layout)
    if forward.head == "full":
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.source].float()
        logps = logits.log_softmax(-1).gather(1, batch.target[:, None]).squeeze(1)
    else:
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.source]
        head = head or OutputLayer(model.get_output_embeddings())
        logps = head(hidden, batch.target, *logit_transform(model), forward.head_chunk)
    return torch.zeros(batch.responses, device=logps.device).index_add(0, batch.sequence, logps)


def _inputs(model: PreTrainedModel, batch: Batch, layout: str) -> dict:
    ids, positions, mask = batch.input_ids, batch.position_ids, batch.attention_mask
    if layout == "packed":
        use_packed_attention(model)
        if ids.is_cuda:
            padding = (0, -ids.shape[1] % FLEX_BLOCK)
            ids, positions = (torch.nn.functional.pad(x, padding) for x in (ids, positions))
            return {"input_ids": ids, "position_ids": positions, "attention_mask": block_mask(mask, ids.shape[1])}
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def reference_logps(model: PreTrainedModel, item: Continuations) -> list[Tensor]:
    """Return the token log-probs of each response, from the model's own forward on one sequence at a time."""
    result = []
    for response in item.responses:
        ids = torch.tensor([[*item.prompt_ids, *response]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(item.prompt_ids) - 1 : -1].float()
        result.append(logits.log_softmax(-1).gather(1, ids[0, len(item.prompt_ids) :, None]).squeeze(1))
    return result


def compute_logps(
    model: PreTrainedModel,
    items: Sequence[Continuations],
    forward: Forward,
    advance: Callable[[int], None] = lambda items: None,
    keep: ShardDriver = compute_shards,
    shard_size: int = 256,
) -> Tensor:
    """Return `sequence_logps` of all responses of all items, without gradients, in the items' order: fp32, on the CPU.

    `keep` computes or restores shards of whole batches, with at least `shard_size` items each; sharding does not affect
    the results. `advance` is called with the number of items just scored. Raises UserError if a log-prob is not finite.
    """
    first = [0, *accumulate(len(item.responses) for item in items)]  # index of each item's first response
    result = torch.empty(first[-1])

    @torch.inference_mode()
    def score(plan: list[list[int]]) -> list[dict]:
        rows = []
        for chosen in plan:
            batch = collate(items, forward.layout, chosen)
            responses = [k for i in chosen for k in range(first[i], first[i + 1])]
            logps = sequence_logps(model, batch.to(model.device), forward).tolist()
            rows += [{"response": k, "logp": logp} for k, logp in zip(responses, logps, strict=True)]
            advance(len(chosen))
        return rows

    def content(plan: list[list[int]]) -> str:
        text = json.dumps([[items[i].prompt_ids, *items[i].responses] for chosen in plan for i in chosen])
        return hashlib.sha256(text.encode()).hexdigest()

    plans: list[list[list[int]]] = []  # batches of each shard
    for chosen in forward.plan(items):
        if not plans or sum(map(len, plans[-1])) >= shard_size:
            plans.append([])
        plans[-1].append(chosen)
    for rows in keep([Shard([content(plan)], partial(score, plan)) for plan in plans]):
        for row in rows:
            result[row["response"]] = row["logp"]
    if not result.isfinite().all():
        raise UserError(
            "some log-probs are not finite: the model's weights are broken or its training diverged: lower the learning "
            "rate (optimizer.lr, schedule.sft_lr) or use engine.precision=fp32."
        )
    return result


# --- the choice of a forward ------------------------------------------------------------------------------------------


@torch.no_grad()
def choose_forward(
    model: PreTrainedModel,
    items: Sequence[Continuations],
    layout: str,
    tokens_per_batch: int,
    head_chunk: int,
    longest: int,
) -> tuple[Forward, str | None]:
    """Choose the fastest forward that agrees with the model's own on a few of `items`.

    A wrong attention mask or head raises no error, so each candidate's log-probs are compared with `reference_logps`.
    `longest` is the length in tokens of the run's longest item, which may exceed an attention window. Returns the
    forward, and a note if it is not the first choice. Raises UserError if no candidate that `layout` allows agrees.
    """
    sample = list(islice(items, 4))
    window = attention_window(model)
    if window and window < longest:  # include a sequence longer than the window
        ids = [token for item in items for response in item.responses for token in response]
        count = max(2, min(longest, window + 32) - len(items[0].prompt_ids))
        sample.append(Continuations(items[0].prompt_ids, (tuple((ids * -(-count // len(ids)))[:count]), ids[:1])))
    expected = torch.stack([logps.sum() for item in sample for logps in reference_logps(model, item)]).cpu()
    tokens = sum(len(response) for item in sample for response in item.responses)
    candidates = [(ly, head) for head in ("chunked", "full") for ly in LAYOUTS if layout in ("auto", ly)]
    refused: list[str] = []
    for candidate_layout, head in candidates:
        forward = Forward(candidate_layout, head, tokens_per_batch, head_chunk)
        reason = _unpackable(model, longest) if candidate_layout == "packed" else None
        if reason is None:
            try:
                logps = compute_logps(model, sample, forward)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                is_plain = (candidate_layout, head) == ("padded", "full")  # the model's own forward, only batched
                if is_plain or (user_message(error) and not isinstance(error, UserError)):
                    raise
                reason = f"the model does not support it ({brief(error)})"
            else:
                difference = ((logps - expected).abs().sum() / tokens).item()
                if difference <= TOKEN_TOLERANCE.get(model.dtype, 0.03):
                    return forward, f"using the {candidate_layout} layout: {'; '.join(refused)}" if refused else None
                reason = f"differs from the model's own forward by {difference:.2g} nats per token"
        refused.append(f"{candidate_layout} rows with the {head} head: {reason}")
    hint = "use engine.layout=auto" if layout != "auto" else "try engine.precision=fp32"
    raise UserError(
        f"engine.layout={layout}: no log-prob computation agrees with the model's own forward: "
        f"{'; '.join(refused)}; {hint}."
    )


def _unpackable(model: PreTrainedModel, longest: int) -> str | None:
    """Return the reason why the model's config rules out packed rows, or None."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", PACKED_ATTENTION):
        return f"its attention ({config._attn_implementation}) is not SDPA"
    window = attention_window(model)
    # Packed attention on a CPU applies the window to each sequence; the block mask on a GPU has no window.
    if window and window < longest and model.device.type != "cpu":
        return f"its attention window of {window} is shorter than an item"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers other than attention ({', '.join(sorted(kinds))})"
    return None
