"""Requests for generated answers, and the answers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.runtime.random import seed_of
from spin.runtime.shards import Shard, ShardDriver, compute_shards
from spin.runtime.tables import Rows, schema_of

Ids = Sequence[int]


@dataclass(frozen=True)
class Answer:
    """Answer number `index` (from 0) to the example `id`. `finish_reason` is "stop" or "length"."""

    id: str
    index: int
    ids: tuple[int, ...]
    finish_reason: str
    text: str


@dataclass(frozen=True)
class AnswerRequest:
    """A request for `num_answers` answers per example. Each ends with one of `stop_ids` or after `max_new_tokens`.

    `keep` computes or restores shards of `shard_size` answers; `advance` is called with the number of finished answers.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    settings: GenerationConfig
    max_new_tokens: int
    stop_ids: Collection[int]
    seed: int
    num_answers: int = 1
    advance: Callable[[int], None] = lambda answers: None
    keep: ShardDriver = compute_shards
    shard_size: int = 256


def answer_in_shards(request: AnswerRequest, decode: Callable[[list[Ids], list[int]], list[list[int]]]) -> Rows[Answer]:
    """Return the answers in the order of the examples. The prompts of a shard have similar lengths.

    `decode(prompts, seeds)` returns the token ids of each answer. Each answer has its own stream of random numbers, so
    the first answers do not depend on `num_answers`.
    """
    examples = Rows.of(Example, request.examples)
    ids, lengths = examples.column("id"), examples.lengths("prompt_ids")
    tasks = [(row, index) for row in range(len(examples)) for index in range(request.num_answers)]
    streams = [f"{ids[row]}#{index}" if index else ids[row] for row, index in tasks]

    def answer(shard: Sequence[int]) -> list[dict]:
        prompts = [examples[tasks[n][0]].prompt_ids for n in shard]
        seeds = [seed_of(request.seed, streams[n]) for n in shard]
        answers = []
        for n, answer_ids in zip(shard, decode(prompts, seeds), strict=True):
            row, index = tasks[n]
            reason = "stop" if answer_ids[-1] in request.stop_ids else "length"
            text = str(request.tokenizer.decode(answer_ids, skip_special_tokens=True))
            answers.append(vars(Answer(ids[row], index, tuple(answer_ids), reason, text)))
        return answers

    order = sorted(range(len(tasks)), key=lambda n: (lengths[tasks[n][0]], streams[n]))
    shards = [order[start : start + request.shard_size] for start in range(0, len(order), request.shard_size)]
    stored = request.keep([Shard([streams[n] for n in shard], partial(answer, shard)) for shard in shards])
    batches = [pa.RecordBatch.from_pylist(answers, schema=schema_of(Answer)) for answers in stored]
    return Rows(Answer, batches).at(np.argsort(order))
