"""Answers by the model itself, sampled from its distribution."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.generation.answers import Answer, Request, answer_in_shards, repeat_prompts
from spin.generation.decoding import decode
from spin.runtime.errors import UserError
from spin.runtime.shards import ShardDriver, compute_shards
from spin.runtime.tables import Rows

CHUNK = 2**18  # logits that are sampled from at once on a CPU: they fit its cache


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    num_answers: int,
    settings: GenerationConfig,
    max_new_tokens: int,
    stop_ids: Collection[int],
    seed: int,
    advance: Callable[[int], None] = lambda answers: None,
    keep: ShardDriver = compute_shards,
    shard_size: int = 256,
) -> Rows[Answer]:
    """Generate `num_answers` answers to each example and return them in the examples' order.

    Tokens are drawn from the model's distribution (temperature, then top_p; the model's generation_config is ignored), or
    greedily at temperature 0. Each answer has its own stream of random numbers, so it depends on the other rows of its
    batch by rounding only. At most `settings.batch_size` answers are decoded at a time, and fewer where their tokens could
    exceed `settings.tokens`. `advance` gets the number of answers that ended, after each decoding step. `keep` gets shards
    of `shard_size` answers. Raises UserError if the model's logits are not finite.
    """

    def decode_shard(requests: Sequence[Request]) -> list[list[int]]:
        prompts = [request.example.prompt_ids for request in requests]
        streams = [torch.Generator().manual_seed(request.seed(seed)) for request in requests]
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
        return decode(model, prompts, choose, stop_ids, max_new_tokens, rows, advance)

    requests = repeat_prompts(examples, num_answers)
    return answer_in_shards(requests, decode_shard, tokenizer, stop_ids, keep, shard_size)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Choose a token for each row: the argmax at temperature 0, else the inverse of the distribution function at `uniform`.

    logits: [rows, vocabulary]; uniform: [rows] in [0, 1). Inversion takes one random number a token; the usual
    exponential race takes one for each entry of the vocabulary.
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
        # Keep the smallest set that reaches top_p: drop the tokens before which top_p is reached.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    cumulative = probs.cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)
