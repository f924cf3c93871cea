"""Tests of generation: the sampling distribution, exact ids, finish reasons, and independence of the batch."""

import hashlib
from unittest.mock import Mock

import pytest
import torch

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.generation import decoding
from spin.generation.answers import Answer, AnswerRequest, answer_in_shards
from spin.generation.decoding import ContinuousBatch, StaticBatch, make_batch
from spin.generation.sampling import generate_answers, sample_tokens
from spin.models.load import load_model, load_tokenizer
from spin.runtime.errors import UserError
from spin.runtime.tables import read_parquet, write_parquet
from tests.conftest import CONFIGS, random_items, small_model


class Ids:
    """A tokenizer that decodes ids as numbers, because the small models of other architectures have none."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def examples(count: int, longest: int = 12) -> list[Example]:
    return [
        Example(f"e{i}", "p", item.prompt_ids, "r", (5, 1))
        for i, item in enumerate(random_items(count, longest=longest))
    ]


def generate(model, inputs, settings, max_new_tokens, stop_ids, seed=0, **options) -> list[Answer]:
    return generate_answers(model, AnswerRequest(Ids(), inputs, settings, max_new_tokens, stop_ids, seed, **options))


def greedy(**settings):
    return GenerationConfig.from_defaults(temperature=0.0, **settings)


def batch_for(model, inputs, longest=40):
    return make_batch(model, [example.prompt_ids for example in inputs], 5, longest)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_matches_transformers(name):
    """Greedy answers equal those of transformers for prompts of different lengths and answers of different lengths."""
    model, inputs = small_model(name), examples(7)
    stops = {1, 7, 30, 60}
    for example, answer in zip(inputs, generate(model, inputs, greedy(batch_size=3), 12, stops), strict=True):
        ids = torch.tensor([example.prompt_ids])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        assert list(answer.ids) == expected
        assert answer.finish_reason == ("stop" if expected[-1] in stops else "length")


def test_finish_reason():
    stops = {1, 2, 3, 4}
    answers = generate(small_model("llama"), examples(40), GenerationConfig.from_defaults(batch_size=16), 9, stops)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        ends = [token in stops for token in answer.ids]
        assert not any(ends[:-1])
        assert ends[-1] == (answer.finish_reason == "stop")
        assert ends[-1] or len(answer.ids) == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_independent_of_batch_and_order(temperature):
    model, inputs = small_model("llama"), examples(12)
    batched = GenerationConfig.from_defaults(temperature=temperature, batch_size=5)
    expected = generate(
        model, inputs, GenerationConfig.from_defaults(temperature=temperature, batch_size=1), 10, {1, 9}, seed=3
    )
    assert generate(model, inputs, batched, 10, {1, 9}, seed=3) == expected
    assert generate(model, inputs[::-1], batched, 10, {1, 9}, seed=3)[::-1] == expected
    assert generate(model, inputs, batched, 10, {1, 9}, seed=3, shard_size=5) == expected
    if temperature:
        assert generate(model, inputs, batched, 10, {1, 9}, seed=4) != expected


# --- several answers per prompt ---------------------------------------------------------------------------------------


def test_seeds_of_answers():
    inputs = [Example(id, "p", (2, 3), "r", (5, 1)) for id in ("a", "b#1")]
    seeds = []

    def decode(prompts, shard_seeds):
        seeds.extend(shard_seeds)
        return [[seed % 90, 1] for seed in shard_seeds]

    answers = answer_in_shards(AnswerRequest(Ids(), inputs, greedy(), 5, {1}, seed=7, num_answers=3), decode)
    assert [(a.id, a.index) for a in answers] == [(id, k) for id in ("a", "b#1") for k in range(3)]
    # Stored results depend on these names of random streams: the id, then "#k".
    expected = [f"7:{name}" for name in ("a", "a#1", "a#2", "b#1", "b#1#1", "b#1#2")]
    digests = [hashlib.sha256(text.encode()).digest()[:7] for text in expected]
    assert seeds == [int.from_bytes(digest, "big") for digest in digests]
    assert [a.ids for a in answers] == [(seed % 90, 1) for seed in seeds]


def test_num_answers(tmp_path):
    """The first of several answers equals a single answer; the others are drawn from other random streams."""
    model, inputs = small_model("llama"), examples(20)
    config = GenerationConfig.from_defaults(batch_size=64)
    first = generate(model, inputs, config, 10, {1})
    answers = generate(model, inputs, config, 10, {1}, num_answers=3)
    assert [(a.id, a.index) for a in answers] == [(e.id, k) for e in inputs for k in range(3)]
    assert answers[::3] == first
    assert len({answer.ids for answer in answers}) > 0.9 * len(answers)
    write_parquet(answers.table, tmp_path / "answers.parquet")
    assert read_parquet(Answer, tmp_path / "answers.parquet") == answers


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_follow_the_distribution(temperature):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0])
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits.expand(count, -1), uniform, temperature).bincount(minlength=5) / count
    assert torch.allclose(drawn, (logits / temperature).softmax(-1), atol=0.01)
    assert drawn[4] == 0


def test_top_p_keeps_the_smallest_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits.expand(4000, -1), uniform, 1.0, top_p=0.7).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_uniforms_give_possible_tokens(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert sample_tokens(logits, torch.tensor([uniform]), 1.0).item() in (1, 2)


def test_global_random_state_is_untouched(tiny_folder):
    model, tokenizer = load_model(tiny_folder, torch.float32, torch.device("cpu")), load_tokenizer(tiny_folder)
    before = torch.get_rng_state()
    request = AnswerRequest(tokenizer, examples(3), GenerationConfig.from_defaults(), 5, {1}, 0)
    answers = generate_answers(model, request)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers)


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "granite", "cohere"])
def test_joining_rows_change_nothing(name):
    model, inputs = small_model(name), examples(30)
    assert isinstance(batch_for(model, inputs), ContinuousBatch)
    expected = generate(model, inputs, greedy(batch_size=1), 15, {1, 7, 30})
    assert generate(model, inputs, greedy(batch_size=5), 15, {1, 7, 30}) == expected
    assert len({len(answer.ids) for answer in expected}) > 3  # the answers end at different steps


def test_padded_prefill_matches_packed(monkeypatch):
    """Prefill of padded rows, as on a GPU, gives the same answers as that of a packed row, as on a CPU."""
    model, inputs = small_model("llama"), examples(30)
    assert batch_for(model, inputs).packed
    packed = generate(model, inputs, greedy(batch_size=5), 15, {1, 7, 30})
    original = decoding._agrees_with_forward
    monkeypatch.setattr(
        decoding, "_agrees_with_forward", lambda batch, prompts: not batch.packed and original(batch, prompts)
    )
    assert batch_for(model, inputs).packed is False
    assert generate(model, inputs, greedy(batch_size=5), 15, {1, 7, 30}) == packed


def test_lack_of_memory_is_no_difference(monkeypatch):
    monkeypatch.setattr(ContinuousBatch, "start", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        batch_for(small_model("llama"), examples(2))


def test_fewer_passes_than_static_batches():
    model, inputs, passes = small_model("llama"), examples(40), []
    model.register_forward_hook(lambda *args: passes.append(1))
    answers = generate(model, inputs, GenerationConfig.from_defaults(batch_size=8), 40, {1, 2, 3, 4, 5, 6})
    static = sum(max(len(a.ids) for a in answers[start : start + 8]) for start in range(0, 40, 8))
    assert len(passes) < 0.8 * static


@pytest.mark.parametrize(
    "name", ["falcon_h1", "mamba2", "qwen3_next", "lfm2", "mistral-short-window", "gemma2", "gpt_oss"]
)
def test_partial_caches_use_static_batches(name):
    model, inputs = small_model(name), examples(9)
    batch = batch_for(model, inputs)
    assert isinstance(batch, StaticBatch) and batch.pads
    expected = generate(model, inputs, greedy(batch_size=1), 12, {1, 7, 30})
    assert generate(model, inputs, greedy(batch_size=4), 12, {1, 7, 30}) == expected


def test_state_space_without_padding():
    """Mamba, which does not support padding, is given rows of equal length."""
    model, inputs, lengths = small_model("mamba"), examples(30), []
    batch = batch_for(model, inputs)
    assert isinstance(batch, StaticBatch) and not batch.pads
    expected = generate(model, inputs, greedy(batch_size=1), 8, {1, 7, 30})
    model.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape), with_kwargs=True)
    assert generate(model, inputs, greedy(batch_size=4), 8, {1, 7, 30}) == expected
    assert max(rows for rows, length in lengths if length > 1) > 1


def test_wrong_cache_is_an_error():
    """A model that ignores its cache is refused; its answers, to the last token alone, would look plausible."""
    model, inputs = small_model("mamba2"), examples(5)
    forward = model.forward

    def without_cache(cache_params=None, **kwargs):
        return forward(**kwargs)

    model.forward = without_cache
    with pytest.raises(UserError, match="differs from its own forward"):
        batch_for(model, inputs)


def test_ignored_positions_use_static_batches():
    """A model that ignores `position_ids` uses static batches, since positions that it computes would be silently wrong."""
    model, inputs = small_model("llama"), examples(2)
    forward = model.forward

    def without_positions(position_ids=None, **kwargs):
        return forward(**kwargs)

    assert isinstance(batch_for(model, inputs), ContinuousBatch)
    model.forward = without_positions
    assert isinstance(batch_for(model, inputs), StaticBatch)


def test_token_budget_limits_rows():
    model, inputs, widths = small_model("llama"), examples(20), []
    model.model.register_forward_pre_hook(lambda m, a, k: widths.append(len(k["input_ids"])), with_kwargs=True)
    generate(model, inputs, greedy(batch_size=16, tokens=100), 12, {1})
    assert max(widths) <= 100 // 13


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_progress_is_reported_once_a_step(name):
    """Progress is reported per step, not per row and token, since a report is a round trip to the store of the ranks."""
    model, inputs, steps, reports = small_model(name), examples(30), [], []
    batch = batch_for(model, inputs)
    originals = type(batch).start, type(batch).step
    with pytest.MonkeyPatch.context() as patch:
        for method, function in zip(("start", "step"), originals, strict=True):
            patch.setattr(type(batch), method, lambda *a, function=function: steps.append(1) or function(*a))
        patch.setattr(decoding, "make_batch", lambda *args: batch)
        answers = generate(
            model, inputs, GenerationConfig.from_defaults(batch_size=5), 15, {1, 7, 30}, advance=reports.append
        )
    assert sum(reports) == len(answers) == 30
    assert len(reports) == len(steps) < sum(len(answer.ids) for answer in answers) / 2
