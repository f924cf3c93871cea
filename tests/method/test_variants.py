"""Variants of the loss compared with their formulas in float64: alone, in a training step and in complete games."""

import json
import math
from itertools import product

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from spin.config.schema import GenerationConfig, LossConfig
from spin.data.examples import Example
from spin.engines.logps import Forward, reference_logps
from spin.engines.packing import Continuations
from spin.generation.answers import Answer, AnswerRequest
from spin.generation.sampling import generate_answers
from spin.method.objectives import LINKS, Objective, make_objective, mix_references, spin_loss
from spin.method.pairs import Pair, group_by_prompt, make_pairs, read_pairs, split_responses, to_continuations
from spin.method.training import train_spin
from spin.models.load import load_model
from spin.runtime.errors import UserError
from spin.runtime.store import STAGES
from spin.runtime.tables import read_parquet
from tests.conftest import random_items, small_model
from tests.games import Place
from tests.generation.test_sampling import Ids, examples
from tests.method.test_objectives import NAIVE, named
from tests.method.test_training import CPU, PACKED, PADDED, SETTINGS, engine_of, score

PLAIN = {"length_normalised": False, "sft_weight": 0.0}
VARIANTS = [
    {"length_normalised": True, "sft_weight": 0.0},
    {"length_normalised": False, "sft_weight": 0.7},
    {"length_normalised": True, "sft_weight": 0.7},
]


def naive_loss(policy, reference, lengths, beta, link, length_normalised, sft_weight) -> float:
    """Return the loss of one pair, computed with Python's floats."""
    (real, generated), (real_0, generated_0), (n, m) = policy, reference, lengths
    if length_normalised:
        z = beta * (real - real_0) / n - beta * (generated - generated_0) / m
    else:
        z = beta * (real - real_0) - beta * (generated - generated_0)
    return NAIVE[link](z) + sft_weight * -real / n


@pytest.mark.parametrize(("variant", "link"), product(VARIANTS, LINKS))
def test_formula_and_gradient(variant, link):
    generator = torch.Generator().manual_seed(1)
    policy, reference = (-30 * torch.rand(12, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, 40, (12, 2), generator=generator)
    policy.requires_grad_(True)
    objective = make_objective(LossConfig.from_defaults(beta=0.4, link=link, **variant), 0)
    losses, metrics = objective.loss(named(policy), {"opponent": named(reference)}, named(lengths))
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    for i in range(12):
        arguments = [x[i].tolist() for x in (policy.detach(), reference, lengths)]
        assert losses[i].item() == pytest.approx(naive_loss(*arguments, 0.4, link, **variant), rel=1e-9)
        for column in range(2):
            values = []
            for step in (1e-6, -1e-6):
                shifted = list(arguments[0])
                shifted[column] += step
                values.append(naive_loss(shifted, *arguments[1:], 0.4, link, **variant))
            assert grad[i, column].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-6)
    if variant["sft_weight"]:
        parts = metrics["loss/spin"] + variant["sft_weight"] * metrics["loss/sft"]
        assert torch.allclose(metrics["loss"], parts) and torch.allclose(parts, losses)


def test_plain_loss_ignores_lengths():
    policy, reference = named(torch.randn(5, 2)), named(torch.randn(5, 2))
    plain, _ = spin_loss(policy, reference, 0.3, "logistic")
    objective = make_objective(LossConfig.from_defaults(beta=0.3), 0)
    losses, metrics = objective.loss(policy, {"opponent": reference}, named(torch.full((5, 2), 7)))
    assert torch.equal(plain, losses) and "loss/sft" not in metrics


def test_mixture_normaliser_cancels():
    """Losses with a geometric mixture are equal if it is normalised, which is possible over three outcomes."""
    opponent, start = (torch.tensor(p, dtype=torch.float64) for p in ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]))
    unnormalised = [math.pow(p, 0.3) * math.pow(q, 0.7) for p, q in zip(opponent.tolist(), start.tolist(), strict=True)]
    pairs = torch.tensor([[0, 1], [2, 0], [1, 2]])
    mixed = mix_references(named(opponent.log()[pairs]), named(start.log()[pairs]), 0.3)
    assert mixed["real"].exp().tolist() == pytest.approx([unnormalised[k] for k in pairs[:, 0]])
    normalised = named((torch.tensor(unnormalised) / sum(unnormalised)).log()[pairs])
    policy = named(torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()[pairs])
    losses, metrics = spin_loss(policy, mixed, 0.5, "logistic")
    expected, normalised_metrics = spin_loss(policy, normalised, 0.5, "logistic")
    assert torch.allclose(losses, expected, atol=1e-7)
    assert not torch.allclose(metrics["rewards/real"], normalised_metrics["rewards/real"])


@pytest.mark.parametrize("alpha", [1.0, 0.4, 0.0])
def test_optimum_with_mixed_reference(alpha):
    """The optimum with logistic loss is p = r (p_data / p_t)^(1/beta) / Z: theorem 5.4 with r instead of p_t."""
    data, opponent, start = (
        torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.2, 0.3], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4])
    )
    reference = alpha * opponent.log() + (1 - alpha) * start.log()
    logits = opponent.log().clone().requires_grad_(True)
    pairs = torch.tensor(list(product(range(3), repeat=2)))
    weights = data[pairs[:, 0]] * opponent[pairs[:, 1]]
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        references = mix_references(named(opponent.log()[pairs]), named(start.log()[pairs]), alpha)
        losses, _ = spin_loss(named(logits.log_softmax(-1)[pairs]), references, 2.0, "logistic")
        loss = (weights * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (reference + (data / opponent).log() / 2.0).softmax(-1)
    assert torch.allclose(logits.detach().softmax(-1), expected, atol=1e-6)


# --- several answers per prompt -----------------------------------------------------------------------------------------


def answers_of(items: list[Continuations]) -> list[Pair]:
    """Return the pairs of items with one to three generated answers, not scored."""
    return [
        Pair(f"p{i}", "", "", "", "stop", item.prompt_ids, item.responses[0], generated, answer=k)
        for i, item in enumerate(items)
        for k, generated in enumerate(item.responses[1:])
    ]


def ragged(count: int, seed: int) -> list[Continuations]:
    return [
        Continuations(item.prompt_ids, item.responses[: 2 + i % 3])
        for i, item in enumerate(random_items(count, responses=4, seed=seed, longest=25))
    ]


def test_pairs_of_a_prompt_are_one_item():
    items = ragged(7, seed=3)
    pairs = answers_of(items)
    assert list(to_continuations(pairs)) == items
    counts = [len(group) for group in group_by_prompt(pairs)]
    assert counts == [1, 2, 3, 1, 2, 3, 1]
    values = torch.arange(float(sum(counts) + len(counts)))
    expected, start = [], 0
    for count in counts:
        expected += [[start, start + k] for k in range(1, count + 1)]
        start += count + 1
    responses = split_responses(values, counts)
    assert torch.stack([responses["real"], responses["generated"]], 1).tolist() == expected
    replayed = [*pairs, *(Pair(**{**vars(pair), "iter": 1}) for pair in pairs[:1])]
    assert len(to_continuations(replayed)) == 8  # a prompt's answers of two iterations are two items


def test_answers_join_their_example():
    chosen = [Example(f"e{i}", f"prompt {i}", (1, 2), f"real {i}", (3, 4 + i)) for i in range(2)]
    answers = [Answer(f"e{i // 3}", i % 3, (5, 6 + i), "stop", f"answer {i}") for i in range(6)]
    answers[1] = Answer("e0", 1, chosen[0].real_ids, "stop", chosen[0].real)
    answers[5] = Answer("e1", 2, (9,), "stop", " ")
    pairs, dropped = make_pairs(chosen, answers, 2)
    assert dropped == {"identical": 1, "empty": 1}
    assert [(pair.id, pair.answer) for pair in pairs] == [("e0", 0), ("e0", 2), ("e1", 0), ("e1", 1)]
    assert all(pair.real_ids == chosen[0].real_ids for pair in pairs[:2]) and pairs[2].prompt == chosen[1].prompt


def test_first_answer_with_any_number_of_answers():
    model, chosen = small_model("llama"), examples(20)
    config = GenerationConfig.from_defaults(batch_size=64)
    alone = generate_answers(model, AnswerRequest(Ids(), chosen, config, 10, {1}, 0))
    several = generate_answers(model, AnswerRequest(Ids(), chosen, config, 10, {1}, 0, num_answers=3))
    assert [answer for answer in several if answer.index == 0] == alone
    assert len({answer.ids for answer in several}) > 0.9 * len(several) == 0.9 * 60


# --- a step of training -------------------------------------------------------------------------------------------------


def train(engine, pairs, references, forward=PACKED, log=lambda row: None, reference="reference", **variant):
    """Train with `references[reference]` in the loss; the opponent's log-probs are for the check of the first step."""

    def loss(policy, references, lengths):
        opponent = references["opponent"]
        objective = make_objective(LossConfig.from_defaults(beta=0.3, **variant), 0)
        losses, metrics = objective.loss(policy, {"opponent": references[reference]}, lengths)
        return losses, metrics | {"gains/real": (policy["real"] - opponent["real"]).detach()}

    return train_spin(
        engine, pairs, references, Objective(loss, tuple(references), None, {}), forward, log=log, **SETTINGS
    )


@pytest.mark.parametrize("forward", [PACKED, PADDED, Forward("packed", "full", 64, 1)])
@pytest.mark.parametrize("variant", [PLAIN, VARIANTS[2]])
def test_step_gradients_equal_naive_float64(tiny_folder, forward, variant):
    """With 1 to 3 answers per prompt and another reference, a step uses the mean over prompts of means over pairs."""
    items = ragged(6, seed=9)
    pairs = answers_of(items)
    references = score(tiny_folder, pairs, forward)
    generator = torch.Generator().manual_seed(4)
    noise = 3 * torch.randn(len(pairs), 2, generator=generator)
    opponent = references["opponent"]
    reference = torch.stack([opponent["real"], opponent["generated"]], 1) + noise
    references["reference"] = named(reference)
    engine, collected, rows = engine_of(tiny_folder), {}, []
    engine.step = lambda lr: collected.update({name: grad.clone() for name, grad in engine.grads.items()}) or 0.0
    train(engine, pairs, references, forward, rows.append, **variant)

    exact = load_model(tiny_folder, torch.float64, CPU).requires_grad_(True)
    loss, index = 0.0, 0
    for item in items:
        real, *generated = (logps.sum() for logps in naive_logps(exact, item))
        item_loss = 0.0
        for k, answer in enumerate(generated):
            gains = [real - reference[index, 0].item(), answer - reference[index, 1].item()]
            if variant["length_normalised"]:
                gains = [gains[0] / len(item.responses[0]), gains[1] / len(item.responses[k + 1])]
            item_loss = item_loss + torch.log(1 + torch.exp(-0.3 * (gains[0] - gains[1])))
            index += 1
        anchor = -variant["sft_weight"] * real / len(item.responses[0])
        loss = loss + (item_loss / len(generated) + anchor) / len(items)
    loss.backward()
    assert rows[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert rows[0]["prompts"] == len(items) and rows[0]["pairs"] == len(pairs)
    assert rows[0]["gains/real"] == pytest.approx(0, abs=1e-3) and abs(rows[0]["rewards/margins"]) > 1e-3
    for name, weight in exact.named_parameters():
        assert torch.allclose(collected[name].double(), weight.grad, atol=2e-5, rtol=1e-3), name


def naive_logps(model, item: Continuations) -> list[torch.Tensor]:
    """Return the log-probs per response, unlike `reference_logps` with gradients and in the model's dtype."""
    result = []
    for response in item.responses:
        ids = torch.tensor([[*item.prompt_ids, *response]])
        table = model(input_ids=ids).logits[0].log_softmax(-1)
        positions = torch.arange(len(item.prompt_ids) - 1, ids.shape[1] - 1)
        result.append(table[positions, ids[0, len(item.prompt_ids) :]])
    return result


def test_first_step_check_uses_the_opponent(tiny_folder):
    pairs = answers_of(ragged(6, seed=9))
    opponent = score(tiny_folder, pairs)["opponent"]
    wrong = {name: values - 5 for name, values in opponent.items()}
    train(engine_of(tiny_folder), pairs, {"opponent": opponent, "reference": wrong})
    with pytest.raises(UserError, match="does not equal its opponent"):
        train(engine_of(tiny_folder), pairs, {"opponent": wrong, "reference": opponent})


# --- complete games --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("variants"), games)
    place.play("evaluation=none", "iter=0")
    return place


def first_row(place: Place, run: str, iteration: int) -> dict:
    return next(row for row in place.metrics(run) if row["stage"] == "train" and row["iter"] == iteration)


def test_mixed_reference_game(played):
    """The start also scores the pairs, and the loss follows from the columns of pairs.parquet."""
    before = played.stages()
    words = ["evaluation=none", "loss.reference=mixture", "loss.alpha=0.3", "loss.beta=0.5", "optimizer.lr=1e-2"]
    words += ["loss.length_normalised=true", "loss.sft_weight=0.2", "schedule.batch_size=100", "engine.precision=fp32"]
    played.play(*words, run="mixed")
    assert (played.stages() - before)["score"] == 3 and (played.stages() - before)["train"] == 2
    folder = played.folder / "mixed"
    columns = pq.read_table(folder / "iter0" / "pairs.parquet").column_names
    assert "start_logp_real" not in columns  # the start is the opponent
    rows = pq.read_table(folder / "iter1" / "pairs.parquet").to_pylist()
    assert {"opponent_logp_real", "start_logp_real", "start_logp_generated"} <= set(rows[0])
    start = load_model(folder / "sft" / "policy", torch.float32, CPU)
    opponent = load_model(folder / "iter0" / "policy", torch.float32, CPU)
    for row in rows[:3]:
        item = Continuations(row["prompt_ids"], (row["real_ids"], row["generated_ids"]))
        for model, name in ((start, "start"), (opponent, "opponent")):
            real, generated = (logps.sum().item() for logps in reference_logps(model, item))
            assert row[f"{name}_logp_real"] == pytest.approx(real, abs=1e-2)
            assert row[f"{name}_logp_generated"] == pytest.approx(generated, abs=1e-2)
    losses = []
    for row in rows:
        policy = [row["opponent_logp_real"], row["opponent_logp_generated"]]  # at the first step
        mixed = [0.3 * row[f"opponent_logp_{n}"] + 0.7 * row[f"start_logp_{n}"] for n in ("real", "generated")]
        lengths = (len(row["real_ids"]), len(row["generated_ids"]))
        losses.append(naive_loss(policy, mixed, lengths, 0.5, "logistic", True, 0.2))
    first = first_row(played, "mixed", 1)
    assert first["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert first["rewards/margins"] != 0 and first["gains/real"] == pytest.approx(0, abs=1e-3)
    assert first_row(played, "mixed", 0)["rewards/margins"] == pytest.approx(0, abs=1e-4)
    manifest = json.loads((folder / "iter1" / "manifest.json").read_text())
    assert manifest["loss"]["reference"] == "mixture" and manifest["loss"]["alpha"] == 0.3
    repeated = played.play(*words, run="mixed")
    assert "nothing was computed again" in repeated.stdout


def test_start_is_the_opponent_at_iteration_0(played):
    result = played.play("evaluation=none", "iter=0", "loss.reference=start", run="same")
    assert "nothing was computed again" in result.stdout


def test_game_with_several_answers(played):
    words = ["evaluation=none", "generation.num_answers=3", "schedule.replay=previous"]
    before = played.stages()
    played.play(*words, run="many")
    assert played.stages() - before == {"generate": 2, "score": 2, "train": 2}
    single, _ = read_pairs(played.folder / "run" / "iter0" / "pairs.parquet")
    many, logps = read_pairs(played.folder / "many" / "iter0" / "pairs.parquet")
    opponent = logps["opponent"]
    assert {pair.answer for pair in many} == {0, 1, 2}
    answers = {pair.id: pair.generated_ids for pair in many if pair.answer == 0}
    is_equal = [pair.generated_ids == answers.get(pair.id) for pair in single]
    assert sum(is_equal) / len(is_equal) > 0.5  # rounding decides a few, in bf16
    assert len({pair.generated_ids for pair in many}) > 0.9 * len(many)
    real_logps: dict[str, set] = {}
    for pair, real in zip(many, opponent["real"].tolist(), strict=True):
        real_logps.setdefault(pair.id, set()).add(real)
    assert all(len(values) == 1 for values in real_logps.values())
    sft = load_model(played.folder / "many" / "sft" / "policy", torch.float32, CPU)
    for index, pair in enumerate(many[:4]):
        (generated,) = reference_logps(sft, Continuations(pair.prompt_ids, (pair.generated_ids,)))
        assert opponent["generated"][index].item() == pytest.approx(generated.sum().item(), abs=2)
    rows = [row for row in played.metrics("many") if row["stage"] == "train" and row["iter"] == 0]
    assert sum(row["prompts"] for row in rows) == len(real_logps) and sum(row["pairs"] for row in rows) == len(many)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=0.01)
    replayed, _ = read_pairs(played.folder / "many" / "iter1" / "pairs.parquet")
    assert {pair.iter for pair in replayed} == {0, 1}


def test_references_in_a_sweep(played):
    words = ["-m", "evaluation=none", "iter=1", "loss.reference=opponent,start,mixture"]
    before = played.stages()
    played.play(*words, f"hydra.sweep.dir={played.folder}/references")
    new = played.stages() - before
    assert new["generate"] == 1 and new["score"] == 2  # iteration 1's pairs: under the opponent, under the start
    assert new["train"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.reference=base"], "loss.reference=base: must be 'opponent', 'start', 'mixture' or 'none'"),
        (["loss.alpha=1.5"], "loss.alpha=1.5: must be less than or equal to 1"),
        (["loss.sft_weight=-1"], "loss.sft_weight=-1: must be greater than or equal to 0"),
        (["generation.num_answers=0"], "generation.num_answers=0: must be greater than or equal to 1"),
        (["loss=space", "loss.beta=0.1"], "loss.beta=0.1: loss.objective=space has no beta: set loss.beta=null"),
        (["loss=space", "loss.link=hinge"], "loss.link=hinge: has no effect with loss.objective=space"),
        (["loss=space", "loss.reference=none"], "loss.reference=none: has no effect with loss.objective=space"),
        (["loss.mu=2.5"], "loss.mu=2.5: has no effect with loss.objective=spin"),
        (["generation=greedy", "generation.num_answers=2"], "all answers to a prompt are the same"),
    ],
)
def test_invalid_settings(words, message):
    from tests.config.test_schema import load

    with pytest.raises(UserError) as error:
        load(*words)
    assert message in str(error.value) and "\n" not in str(error.value)


def answers_of_iteration_0(folder, pairs: list[dict]) -> dict[tuple[str, int], tuple[int, ...]]:
    """Return all answers of the stage that generated the pairs of iteration 0, including those without a pair."""
    stages = json.loads((folder / STAGES).read_text())
    first_pairs = [row for row in pairs if row["iter"] == 0]
    for stage in stages["stages"]:
        if stage.startswith("generate/"):
            read = read_parquet(Answer, folder / stages["store"] / stage / "answers.parquet")
            answers = {(answer.id, answer.index): answer.ids for answer in read}
            if all(answers[row["id"], row["answer"]] == tuple(row["generated_ids"]) for row in first_pairs):
                return answers
    raise AssertionError("no answers of iteration 0")


def test_tspin_game(played):
    """From iteration 1 on, iteration 0's answers are a third response; they are generated once."""
    before = played.stages()
    words = ["evaluation=none", "loss=tspin", "generation.num_answers=2", "engine.precision=fp32", "iter=1"]
    words += ["schedule.batch_size=100", "schedule.replay=previous"]
    played.play(*words, run="tspin")
    new = played.stages() - before
    assert (new["generate"], new["score"], new["train"]) == (2, 2, 2)
    folder = played.folder / "tspin"
    pairs = pq.read_table(folder / "iter1" / "pairs.parquet").to_pylist()
    answers = answers_of_iteration_0(folder, pairs)
    opponent, losses = load_model(folder / "iter0" / "policy", torch.float32, CPU), {}
    for row in pairs:
        responses = (row["real_ids"], row["generated_ids"], answers[row["id"], row["answer"]])
        item = Continuations(row["prompt_ids"], responses)
        real, generated, older = (logps.sum().item() for logps in reference_logps(opponent, item))
        z, z_history = real - generated, generated - older
        loss = math.log1p(math.exp(-z)) if z > -700 else -z
        losses.setdefault((row["id"], row["iter"]), []).append(loss + 0.1 * math.log1p(math.exp(-z_history)))
    first = first_row(played, "tspin", 1)
    assert first["loss"] == pytest.approx(np.mean([np.mean(group) for group in losses.values()]), rel=1e-3)
    assert first["prompts"] == len(losses) and first["pairs"] == len(pairs)
    assert "loss/history" not in first_row(played, "tspin", 0) and first["loss/history"] > 0
    repeated = played.play(*words, run="tspin")
    assert "nothing was computed again" in repeated.stdout


@pytest.mark.parametrize("words", [["loss=space"], ["loss.reference=none"], ["loss.real_floor=0.5"]])
def test_game_of_objective(played, words):
    name = words[0].replace("=", "-")
    result = played.play("evaluation=none", "iter=0", "engine.precision=fp32", *words, run=name)
    first = first_row(played, name, 0)
    if words == ["loss.reference=none"]:
        assert first["gains/real"] == pytest.approx(0, abs=1e-3)
    else:
        assert first["loss"] == pytest.approx(2 * math.log(2) if words == ["loss=space"] else math.log(2), abs=1e-4)
    assert "stages played" in result.stdout
    report = (played.folder / name / "report.md").read_text()
    descriptions = {"loss=space": "objective space, mu 1.0", "loss.reference=none": "reference none"}
    assert descriptions.get(words[0], "real\\_floor 0.5") in report
