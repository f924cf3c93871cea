"""The frozen model's work, all without gradients: answer every prompt. (Its log-probs: `logps.logps_of`.)"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from spin.checkpoint import Keep, keep_nothing
from spin.config import GenerationConfig
from spin.data import Example
from spin.errors import UserError
from spin.pairs import Answer, answer_of

# Finished rows leave the batch once they are this share of it: leaving copies the key-value cache of those that stay.
COMPACT_AT = 0.25


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: GenerationConfig,
    max_new_tokens: int,
    stop_ids: Collection[int],
    seed: int,
    advance: Callable[[int], None] = lambda answers: None,
    keep: Keep = keep_nothing,
    shard_size: int = 256,
) -> list[Answer]:
    """One answer for every example, in their order.

    Sampled from the model's own distribution (temperature, then top_p; nothing else: a model's generation_config is not
    consulted), greedy at temperature 0. Each prompt has its own stream of random numbers, made of `seed` and its id,
    so that its answer depends on the batch around it by rounding only. `advance` is told how many
    answers have just ended. `keep` gets shards of whole batches, of `shard_size` answers or a few more; how they are cut
    changes no bit. Raises UserError if the model's logits are not finite.
    """
    by_length = sorted(range(len(examples)), key=lambda i: (len(examples[i].prompt_ids), examples[i].id))
    size = -(-shard_size // config.batch_size) * config.batch_size  # whole batches
    answers: dict[str, Answer] = {}

    def answer(chosen: list[int]) -> list[dict]:
        rows = []
        for start in range(0, len(chosen), config.batch_size):
            batch = [examples[i] for i in chosen[start : start + config.batch_size]]
            prompts = [example.prompt_ids for example in batch]
            uniforms = torch.stack([_uniforms(seed, example.id, max_new_tokens) for example in batch])
            for example, ids in zip(batch, _decode(model, prompts, uniforms, config, stop_ids, advance), strict=True):
                reason = "stop" if ids[-1] in stop_ids else "length"
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                rows.append(asdict(Answer(id=example.id, ids=tuple(ids), finish_reason=reason, text=text)))
        return rows

    for number, start in enumerate(range(0, len(by_length), size)):
        chosen = by_length[start : start + size]
        for row in keep(number, [examples[i].id for i in chosen], partial(answer, chosen)):
            answers[row["id"]] = answer_of(row)
    return [answers[example.id] for example in examples]


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    config: GenerationConfig,
    stop_ids: Collection[int],
    advance: Callable[[int], None],
) -> list[list[int]]:
    """Decode one batch. uniforms: [rows, max_new_tokens], in [0, 1)."""
    device = model.device
    length = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):  # left-padded: the last position is every prompt's last token
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    stops = torch.tensor(sorted(stop_ids), device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch belongs to
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)

    for step in range(uniforms.shape[1]):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            # As an index: a slice of the last position is not contiguous, and the head would copy its weights a row.
            logits_to_keep=torch.tensor([input_ids.shape[1] - 1], device=device),
        ).logits[:, -1]
        if step == 0 and not logits.isfinite().all():
            raise UserError(
                "the model's logits are not finite: its weights are broken, or its training went astray: lower the "
                "learning rate (optimizer.lr, schedule.sft_lr), or try engine.precision=fp32."
            )
        chosen = sample(logits, uniforms[rows.cpu(), step].to(device), config.temperature, config.top_p)
        for row, token, alive in zip(rows.tolist(), chosen.tolist(), running.tolist(), strict=True):
            if alive:
                answers[row].append(token)
        ending = running & torch.isin(chosen, stops)
        running &= ~ending
        advance(int(ending.sum()))
        if not running.any():
            break
        if (~running).float().mean() >= COMPACT_AT:
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            mask, position_ids, rows, chosen, running = (x[keep] for x in (mask, position_ids, rows, chosen, running))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
        input_ids = chosen[:, None]
    advance(int(running.sum()))
    return answers


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token a row: argmax at temperature 0, else by inverting the cumulative distribution at `uniform`.

    logits: [rows, vocabulary]; uniform: [rows] in [0, 1). Inversion needs one random number a token, where the usual
    race of exponentials needs one for each entry of the vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
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
    digest = hashlib.sha256(f"{seed}:{example_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator)
