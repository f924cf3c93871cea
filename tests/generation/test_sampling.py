"""Generation: the right distribution, the very ids, the finish reason, and no influence of the batch."""

import pytest
import torch

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.generation.decoding import can_join
from spin.generation.sampling import generate_answers, sample_tokens
from spin.models.load import load_model, load_tokenizer
from tests.conftest import random_items, small_model


class Ids:
    """Decodes ids as numbers: the small models of other architectures come without a tokenizer."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def examples(count: int, longest: int = 12) -> list[Example]:
    return [
        Example(f"e{i}", "p", item.prompt_ids, "r", (5, 1))
        for i, item in enumerate(random_items(count, longest=longest))
    ]


def greedy(**settings):
    return GenerationConfig.from_defaults(temperature=0.0, **settings)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2", "gemma3"])
def test_greedy_answers_equal_the_librarys(name):
    model, chosen = small_model(name), examples(7)
    stops = {1, 7, 30, 60}
    for example, answer in zip(
        chosen, generate_answers(model, Ids(), chosen, greedy(batch_size=3), 12, stops, 0), strict=True
    ):
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


def test_a_cut_answer_has_no_end_token_and_a_finished_one_exactly_one():
    model, chosen = small_model("llama"), examples(40)
    answers = generate_answers(model, Ids(), chosen, GenerationConfig.from_defaults(batch_size=16), 9, {1, 2, 3, 4}, 0)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        ends = [token in {1, 2, 3, 4} for token in answer.ids]
        assert not any(ends[:-1])
        assert ends[-1] == (answer.finish_reason == "stop")
        assert ends[-1] or len(answer.ids) == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_the_batch_or_the_order(temperature):
    model, chosen = small_model("llama"), examples(12)
    one = GenerationConfig.from_defaults(temperature=temperature, batch_size=1)
    many = GenerationConfig.from_defaults(temperature=temperature, batch_size=5)
    alone = generate_answers(model, Ids(), chosen, one, 10, {1, 9}, seed=3)
    together = generate_answers(model, Ids(), chosen, many, 10, {1, 9}, seed=3)
    turned = generate_answers(model, Ids(), chosen[::-1], many, 10, {1, 9}, seed=3)[::-1]
    assert [a.ids for a in alone] == [a.ids for a in together] == [a.ids for a in turned]
    if temperature:
        assert [a.ids for a in generate_answers(model, Ids(), chosen, many, 10, {1, 9}, seed=4)] != [
            a.ids for a in together
        ]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_follow_the_models_distribution(temperature):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0])
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits.expand(count, -1), uniform, temperature).bincount(minlength=5) / count
    assert torch.allclose(drawn, (logits / temperature).softmax(-1), atol=0.01)
    assert drawn[4] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits.expand(4000, -1), uniform, 1.0, top_p=0.7).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert sample_tokens(logits, torch.tensor([uniform]), 1.0).item() in (1, 2)


def test_generation_leaves_the_global_random_state_alone(tiny_folder):
    model, tokenizer = load_model(tiny_folder, torch.float32, torch.device("cpu")), load_tokenizer(tiny_folder)
    before = torch.get_rng_state()
    answers = generate_answers(model, tokenizer, examples(3), GenerationConfig.from_defaults(), 5, {1}, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "granite", "cohere"])
def test_prompts_join_as_answers_end_and_nothing_changes(name):
    """Rows of a batch in which others come and go say what they say alone."""
    model, chosen = small_model(name), examples(30)
    assert can_join(model, [example.prompt_ids for example in chosen], 40) is not None
    alone = generate_answers(model, Ids(), chosen, greedy(batch_size=1), 15, {1, 7, 30}, 0)
    assert generate_answers(model, Ids(), chosen, greedy(batch_size=5), 15, {1, 7, 30}, 0) == alone
    assert len({len(answer.ids) for answer in alone}) > 3  # they do end at different times


def test_prompts_read_in_padded_rows_are_answered_as_those_in_a_packed_row(monkeypatch):
    """Rows are what a GPU reads; a CPU packs."""
    model, chosen = small_model("llama"), examples(30)
    assert can_join(model, [example.prompt_ids for example in chosen], 40) is True
    packed = generate_answers(model, Ids(), chosen, greedy(batch_size=5), 15, {1, 7, 30}, 0)
    monkeypatch.setattr("spin.generation.decoding.can_join", lambda *rest: False)
    assert generate_answers(model, Ids(), chosen, greedy(batch_size=5), 15, {1, 7, 30}, 0) == packed


def test_fewer_forward_passes_than_batch_after_batch():
    model, chosen, passes = small_model("llama"), examples(40), []
    model.register_forward_hook(lambda *rest: passes.append(1))
    answers = generate_answers(
        model, Ids(), chosen, GenerationConfig.from_defaults(batch_size=8), 40, {1, 2, 3, 4, 5, 6}, 0
    )
    closed = sum(max(len(a.ids) for a in answers[start : start + 8]) for start in range(0, 40, 8))
    assert len(passes) < 0.8 * closed


@pytest.mark.parametrize("name", ["falcon_h1", "mistral-short-window", "gemma2"])
def test_layers_that_keep_less_than_all_tokens_are_decoded_batch_by_batch(name):
    model, chosen = small_model(name), examples(9)
    assert can_join(model, [example.prompt_ids for example in chosen], 40) is None
    alone = generate_answers(model, Ids(), chosen, greedy(batch_size=1), 12, {1, 7, 30}, 0)
    if name != "falcon_h1":  # a state space sees the padding on the left
        assert generate_answers(model, Ids(), chosen, greedy(batch_size=4), 12, {1, 7, 30}, 0) == alone


def test_a_model_that_misreads_the_mask_is_decoded_batch_by_batch():
    """Positions that it makes itself, not those that it is told, would be wrong, silently."""
    model = small_model("llama")
    forward = model.forward

    def without_positions(position_ids=None, **rest):
        return forward(**rest)

    assert can_join(model, [(3, 4, 5), (6,)], 20) is not None
    model.forward = without_positions
    assert can_join(model, [(3, 4, 5), (6,)], 20) is None


def test_the_token_budget_limits_the_rows():
    model, chosen, widths = small_model("llama"), examples(20), []
    model.model.register_forward_pre_hook(lambda m, a, k: widths.append(len(k["input_ids"])), with_kwargs=True)
    generate_answers(model, Ids(), chosen, greedy(batch_size=16, tokens=100), 12, {1}, 0)
    assert max(widths) <= 100 // 13
