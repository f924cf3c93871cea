"""The frozen model's work, all without gradients: answer every prompt. (Its log-probs: `logps.logps_of`.)"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.generation.answers import Answer, answer_of
from spin.generation.decoding import decode
from spin.runtime.errors import UserError
from spin.runtime.random import seed_of
from spin.runtime.shards import Shard, ShardDriver, compute_shards


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: GenerationConfig,
    max_new_tokens: int,
    stop_ids: Collection[int],
    seed: int,
    advance: Callable[[int], None] = lambda answers: None,
    keep: ShardDriver = compute_shards,
    shard_size: int = 256,
) -> list[Answer]:
    """One answer for every example, in their order.

    Sampled from the model's own distribution (temperature, then top_p; nothing else: a model's generation_config is not
    consulted), greedy at temperature 0. Each prompt has its own stream of random numbers, made of `seed` and its id,
    so that its answer depends on the batch around it by rounding only. `advance` is told how many
    answers have just ended. `keep` gets shards of `shard_size` answers. At most `config.batch_size` answers are decoded at
    a time, and fewer where their prompts and answers could exceed `config.tokens` tokens together. Raises UserError if the model's logits are not finite.
    """
    by_length = sorted(range(len(examples)), key=lambda i: (len(examples[i].prompt_ids), examples[i].id))
    answers: dict[str, Answer] = {}

    def answer(chosen: list[int]) -> list[dict]:
        batch = [examples[i] for i in chosen]
        prompts = [example.prompt_ids for example in batch]
        uniforms = torch.stack([_uniforms(seed, example.id, max_new_tokens) for example in batch])

        def choose(logits: Tensor, which: list[int], counts: list[int]) -> Tensor:
            if min(counts) == 0 and not logits.isfinite().all():
                raise UserError(
                    "the model's logits are not finite: its weights are broken, or its training went astray: lower the "
                    "learning rate (optimizer.lr, schedule.sft_lr), or try engine.precision=fp32."
                )
            return sample_tokens(logits, uniforms[which, counts].to(logits.device), config.temperature, config.top_p)

        rows = max(1, min(config.batch_size, config.tokens // (max(map(len, prompts)) + max_new_tokens)))
        found = []
        for example, ids in zip(
            batch, decode(model, prompts, choose, stop_ids, max_new_tokens, rows, advance), strict=True
        ):
            reason = "stop" if ids[-1] in stop_ids else "length"
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            found.append(asdict(Answer(id=example.id, ids=tuple(ids), finish_reason=reason, text=text)))
        return found

    shards = [by_length[start : start + shard_size] for start in range(0, len(by_length), shard_size)]
    for rows in keep([Shard([examples[i].id for i in chosen], partial(answer, chosen)) for chosen in shards]):
        answers |= {row["id"]: answer_of(row) for row in rows}
    return [answers[example.id] for example in examples]


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token a row: argmax at temperature 0, else by inverting the cumulative distribution at `uniform`.

    logits: [rows, vocabulary]; uniform: [rows] in [0, 1). Inversion needs one random number a token, where the usual
    race of exponentials needs one for each entry of the vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
    size = max(1, PIECE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(size), uniform.split(size), strict=True)
    return torch.cat([_sample(*part, temperature, top_p) for part in parts])


PIECE = 2**18  # numbers gone through together: those of a processor's cache


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        # Keep the smallest set that reaches top_p: everything before which less than top_p has been collected.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    cumulative = probs.cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)


def _uniforms(seed: int, example_id: str, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed_of(seed, example_id)))
