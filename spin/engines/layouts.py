"""Choose the fastest way to compute log-probs that agrees with the model's own forward."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from spin.engines.attention import PACKED_ATTENTION, attention_window
from spin.engines.logps import Forward, compute_logps, reference_logps
from spin.engines.packing import Continuations
from spin.runtime.errors import UserError, brief, user_message

LAYOUTS = ("packed", "padded")  # the fastest first

# The largest difference due to rounding, in nats per response token (|difference of sums| / tokens): several times that
# of the embedded model, and less than a wrong mask causes.
TOKEN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


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
    `longest` is the largest number of tokens of any item of the run, which may exceed an attention window where the
    sample does not. Returns the forward, and a note if it is not the first choice. Raises UserError if no candidate that
    `layout` allows agrees with the model.
    """
    sample = list(items[:4])
    window = attention_window(model)
    if window and window < longest:  # include a sequence longer than the window
        ids = [token for item in items for response in item.responses for token in response]
        count = min(longest, window + 32) - len(items[0].prompt_ids)
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
                found = compute_logps(model, sample, forward)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                if candidate_layout == "padded" or (user_message(error) and not isinstance(error, UserError)):
                    raise
                reason = f"the model does not support it ({brief(error)})"
            else:
                off = ((found - expected).abs().sum() / tokens).item()
                if off <= TOKEN_TOLERANCE.get(model.dtype, 0.03):
                    return forward, f"using the {candidate_layout} layout: {'; '.join(refused)}" if refused else None
                reason = f"differs from the model's own forward by {off:.2g} nats per token"
        refused.append(f"{candidate_layout} rows with the {head} head: {reason}")
    hint = "use engine.layout=auto" if layout != "auto" else "try engine.precision=fp32"
    raise UserError(
        f"engine.layout={layout}: no log-prob computation agrees with the model's own forward: "
        f"{'; '.join(refused)}; {hint}."
    )


def _unpackable(model: PreTrainedModel, longest: int) -> str | None:
    """The reason why the model's config rules out packed rows, or None."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", PACKED_ATTENTION):
        return f"its attention ({config._attn_implementation}) is not SDPA"
    window = attention_window(model)
    # Packed rows on a CPU apply the window to each sequence; a GPU's block mask has none.
    if window and window < longest and model.device.type != "cpu":
        return f"its attention window of {window} is shorter than an item"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers other than attention ({', '.join(sorted(kinds))})"
    return None
