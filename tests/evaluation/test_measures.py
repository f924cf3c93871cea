"""Tests of the held-out measures: against their definitions, and on answers of known quality."""

import json
import math

import numpy as np
import pytest

from spin.evaluation.answer_checks import CHECKS, correct
from spin.evaluation.measure_table import MEASURES, missing_prompts
from spin.evaluation.measures import HeldOut, differences, diversity, held_out_margins, held_out_of, measures, rouge_l
from spin.method.pairs import Pair


def pair(i: int, real_length=10, model_length=10, finish="stop", generated="a b c d") -> Pair:
    return Pair(
        id=f"e{i}",
        prompt="",
        real="a b c d",
        generated=generated,
        finish_reason=finish,
        prompt_ids=(1,),
        real_ids=(2,) * real_length,
        generated_ids=(3,) * model_length,
    )


def held_out(pairs: list[Pair], real, generated, opponent_generated=None, **arrays) -> HeldOut:
    logps = {"real": real, "generated": generated, "opponent_generated": opponent_generated}
    arrays_of = {
        name: np.broadcast_to(np.asarray(values, float), len(pairs))
        for name, values in logps.items()
        if values is not None
    }
    return HeldOut(pairs, arrays_of, **arrays)


def test_definitions():
    pairs = [pair(0), pair(1, model_length=5, finish="length", generated="x y")]
    policy = held_out(pairs, [-10, -20], [-30, -10], [-29, -11])
    opponent = held_out([pair(0), pair(1)], [-15, -22], [-25, -12])
    result = measures(policy, opponent, 200, 0)
    assert result["n"] == 2
    assert result["nll_per_token"] == pytest.approx(30 / 20)
    assert result["human_likelier"] == 0.75  # -1 against -3 per token is a win, -2 against -2 a tie
    assert result["length_auc"] == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    assert result["model_length"] == 7.5 and result["human_length"] == 10
    assert result["finished"] == 0.5
    assert result["rouge_l"] == pytest.approx(0.5)
    # (-10 + 15) - (-29 + 25) = 9 and (-20 + 22) - (-11 + 12) = 1
    assert held_out_margins(policy, opponent).tolist() == [9, 1]
    assert result["margin"] == 5 and result["accuracy"] == 1


def test_equal_and_broken_policies():
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 60, 8))) for _ in range(300)]
    lengths = rng.integers(5, 20, (2, 300))
    logps = -lengths * rng.gamma(4, 0.5, (2, 300))
    equal = [pair(i, lengths[0, i], lengths[1, i], generated=texts[i]) for i in range(300)]
    equal_result = measures(held_out(equal, *logps), None, 300, 0)
    for name in ("human_likelier", "length_auc"):
        low, high = equal_result[f"{name}_interval"]
        assert low < 0.5 < high, name
    broken = [pair(i, 15, 3, generated="the the the the the") for i in range(300)]
    broken_result = measures(held_out(broken, -30, -1), None, 300, 0)
    assert broken_result["human_likelier"] == 0 and broken_result["length_auc"] == 1
    assert broken_result["distinct_2"] == 0.25 and equal_result["distinct_2"] > 0.95 and broken_result["rouge_l"] == 0


def test_interval_width():
    def width(n):
        rng = np.random.default_rng(1)
        result = measures(held_out([pair(i) for i in range(n)], -10 - 9 * rng.random(n), -15), None, 500, 0)
        low, high = result["nll_per_token_interval"]
        assert low <= result["nll_per_token"] <= high
        return high - low

    assert width(400) < 0.5 * width(25)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("a b c", "a b c", 1.0),
        ("A b", "a B", 1.0),
        ("a c", "a b c", 0.8),
        ("", "a", 0.0),
        ("x", "y", 0.0),
        ("c b a", "a b c", 1 / 3),
    ],
)
def test_rouge_l(candidate, reference, expected):
    assert math.isclose(rouge_l(candidate, reference), expected)


def test_json_round_trip():
    rng = np.random.default_rng(0)
    pairs = [pair(i) for i in range(30)]
    arrays = {
        "scores": rng.normal(size=(2, 30)),
        "clusters": rng.integers(0, 3, (2, 30)),
        "correct": rng.integers(0, 2, 30),
    }
    first = held_out(pairs, rng.normal(size=30), -12)
    last = held_out(pairs, rng.normal(size=30), -12.5, rng.normal(size=30), **arrays)
    restored = [held_out_of(pairs, json.loads(json.dumps(policy.per_prompt))) for policy in (first, last)]
    assert measures(restored[0], None, 50, 0) == measures(first, None, 50, 0)
    assert measures(restored[1], restored[0], 50, 0) == measures(last, first, 50, 0)
    assert "opponent_generated" not in restored[0].policy_logps
    assert [policy.digest for policy in restored] == [first.digest, last.digest]
    assert first.digest != last.digest


@pytest.mark.parametrize("name", ["mauve", "classifier_auc"])
def test_min_prompts(name):
    def held_out_with(n: int) -> HeldOut:
        scores, labels = np.array([[1.0] * n, [0.0] * n]), np.zeros((2, n), int)
        return held_out([pair(i) for i in range(n)], -10, -12, scores=scores, clusters=labels)

    minimum = MEASURES[name].min_prompts
    assert minimum > 8
    for n, is_measured in ((minimum - 1, False), (minimum, True)):
        assert (name in measures(held_out_with(n), None, 10, 0)) is is_measured
        assert (name in differences(held_out_with(n), held_out_with(n), 10, 0)) is is_measured
        note = f"{MEASURES[name].title}: needs {minimum} held-out prompts, there are {n}"
        assert (note in missing_prompts(n)) is not is_measured
    assert "mauve_if_equal" not in measures(held_out_with(8), None, 10, 0)


def policies(n: int, shift: float):
    """Return two policies on the same prompts; the second's log-probs of human answers are `shift` nats higher, plus noise."""
    rng = np.random.default_rng(3)
    logps = rng.normal(-40, 15, n)
    pairs = [pair(i) for i in range(n)]
    return held_out(pairs, logps, -30), held_out(pairs, logps + shift + rng.normal(0, 1, n), -30)


def test_paired_difference():
    first, last = policies(60, 2.0)
    change = differences(last, first, 400, 0)["nll_per_token"]
    assert change["verdict"] == "better" and change["interval"][1] < 0
    assert change["change"] == pytest.approx(-0.2, abs=0.05)
    intervals = [measures(policy, None, 400, 0)["nll_per_token_interval"] for policy in (first, last)]
    assert intervals[0][0] < intervals[1][1] and intervals[1][0] < intervals[0][1]


def test_no_difference():
    first, last = policies(60, 0.0)
    assert {change["verdict"] for change in differences(last, first, 400, 0).values()} == {"same"}
    assert all(change["change"] == 0 for change in differences(first, first, 100, 0).values())


def test_false_verdicts_are_rare():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        first, last = (held_out([pair(i) for i in range(40)], rng.normal(-30, 8, 40), -30) for _ in range(2))
        wrong += differences(last, first, 200, 0)["nll_per_token"]["verdict"] != "same"
    assert wrong <= 0.12 * 150


def test_diversity():
    real = [f"word{i} another{i} third{i}" for i in range(30)]
    all_prompts = np.arange(30)
    assert diversity(real, real)(all_prompts) == 1
    assert diversity(real, [real[0]] * 30)(all_prompts) == pytest.approx(1 / 30)
    assert diversity(real, [""] * 30)(all_prompts) == 1  # no word pairs: nothing is repeated


@pytest.mark.parametrize(
    ("check", "answer", "real", "is_correct"),
    [
        ("exact", " 1 2\n3", "1 2 3", True),
        ("exact", "1 2", "1 2 3", False),
        ("number", "so it is 1,042.", "21 * 2 ... #### 1042", True),
        ("number", "3 and 4.50", "4.5", True),
        ("number", "-3", "3", False),
        ("number", "none", "3", False),
        ("number", "3", "none", False),
    ],
)
def test_checks(check, answer, real, is_correct):
    assert CHECKS[check](answer, real) == is_correct


def test_exact_match():
    pairs = [pair(i, generated=text) for i, text in enumerate(("a b c d", "wrong", "A b  c D", ""))]
    result = measures(held_out(pairs, -1, -1, correct=correct(pairs, "exact")), None, 100, 0)
    assert result["exact_match"] == 0.5 and result["exact_match_interval"][0] < 0.5 < result["exact_match_interval"][1]
    assert correct(pairs, "none") is None and "exact_match" not in measures(held_out(pairs, -1, -1), None, 10, 0)
