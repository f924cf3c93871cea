"""Generate answers with the model itself, by sampling from its distribution."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spin.generation.answers import Answer, AnswerRequest, Ids, answer_in_shards
from spin.generation.decoding import decode
from spin.runtime.errors import UserError
from spin.runtime.tables import Rows

CHUNK = 2**18  # logits processed at a time on a CPU: they fit its cache


def generate_answers(model: PreTrainedModel, request: AnswerRequest) -> Rows[Answer]:
    """Generate the answers that `request` describes, in the examples' order.

    Tokens are sampled from the model's distribution (temperature, then top_p; the model's generation_config is
    ignored), or chosen greedily at temperature 0. The other rows of a batch affect an answer only through rounding. At
    most `settings.batch_size` answers are decoded at a time, fewer if their tokens could exceed `settings.tokens`.
    Raises UserError if the logits of an answer's first token are not finite.
    """
    settings, max_new_tokens = request.settings, request.max_new_tokens

    def decode_shard(prompts: list[Ids], seeds: list[int]) -> list[list[int]]:
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniforms = torch.stack([torch.rand(max_new_tokens, generator=stream) for stream in streams])

        def choose(logits: Tensor, prompt_of: list[int], lengths: list[int]) -> Tensor:
            if min(lengths) == 0 and not logits.isfinite().all():
                raise UserError(
                    "the model's logits are not finite: its weights are broken, or its training diverged: lower the "
                    "learning rate (optimizer.lr, schedule.sft_lr), or try engine.precision=fp32."
                )
            uniform = uniforms[prompt_of, lengths].to(logits.device)
            return sample_tokens(logits, uniform, settings.temperature, settings.top_p)

        longest = max(map(len, prompts)) + max_new_tokens
        rows = max(1, min(settings.batch_size, settings.tokens // longest))
        return decode(model, prompts, choose, request.stop_ids, max_new_tokens, rows, request.advance)

    return answer_in_shards(request, decode_shard)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Return a token per row: the argmax at temperature 0, else the inverse cumulative distribution at `uniform`.

    logits: [rows, vocabulary]; uniform: [rows] in [0, 1). Inversion takes one random number per token, whereas an
    exponential race takes one per vocabulary entry.
    """
    if temperature == 0:
        return logits.argmax(-1)
    size = max(1, CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    chunks = zip(logits.split(size), uniform.split(size), strict=True)
    return torch.cat([_sample(*chunk, temperature, top_p) for chunk in chunks])


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        # Keep the smallest set that reaches top_p: drop each token whose predecessors already reach it.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    cumulative = probs.cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)
