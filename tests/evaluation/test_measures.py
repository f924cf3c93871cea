"""Held-out measures against their definitions, and on answers whose quality is known."""

import json
import math

import numpy as np
import pytest

from spin.evaluation.answer_checks import CHECKS, correct
from spin.evaluation.measures import HeldOut, differences, diversity, held_out_margins, held_out_of, measures, rouge_l
from spin.method.pairs import Pair


def pair(
    i: int, real_logp: float, own_logp: float, real_length=10, own_length=10, finish="stop", own="a b c d"
) -> Pair:
    return Pair(
        id=f"e{i}",
        prompt="",
        real="a b c d",
        generated=own,
        finish_reason=finish,
        prompt_ids=(1,),
        real_ids=(2,) * real_length,
        generated_ids=(3,) * own_length,
        opponent_logp_real=real_logp,
        opponent_logp_generated=own_logp,
    )


def test_measures_follow_their_definitions():
    now = HeldOut([pair(0, -10, -30), pair(1, -20, -10, own_length=5, finish="length", own="x y")], [-29.0, -11.0])
    before = HeldOut([pair(0, -15, -25), pair(1, -22, -12)])
    result = measures(now, before, 200, 0)
    assert result["n"] == 2
    assert result["nll_per_token"] == pytest.approx(30 / 20)
    assert result["human_likelier"] == 0.75  # -1 against -3 a token: won; -2 against -2: a tie
    assert result["length_auc"] == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    assert result["own_length"] == 7.5 and result["human_length"] == 10
    assert result["finished"] == 0.5
    assert result["rouge_l"] == pytest.approx(0.5)
    # (-10 + 15) - (-29 + 25) = 9 and (-20 + 22) - (-11 + 12) = 1
    assert held_out_margins(now, before).tolist() == [9, 1]
    assert result["margin"] == 5 and result["accuracy"] == 1


def test_a_policy_equal_to_the_humans_cannot_be_told_and_a_broken_one_is():
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 60, 8))) for _ in range(300)]
    lengths = rng.integers(5, 20, (2, 300))
    logps = -lengths * rng.gamma(4, 0.5, (2, 300))
    equal = [pair(i, logps[0, i], logps[1, i], lengths[0, i], lengths[1, i], own=texts[i]) for i in range(300)]
    fair = measures(HeldOut(equal), None, 300, 0)
    for name in ("human_likelier", "length_auc"):
        low, high = fair[f"{name}_interval"]
        assert low < 0.5 < high, name
    broken = [pair(i, -30, -1, 15, 3, own="the the the the the") for i in range(300)]
    caught = measures(HeldOut(broken), None, 300, 0)
    assert caught["human_likelier"] == 0 and caught["length_auc"] == 1
    assert caught["distinct_2"] == 0.25 and fair["distinct_2"] > 0.95 and caught["rouge_l"] == 0


def test_intervals_hold_the_value_and_narrow_with_more_prompts():
    def width(n):
        rng = np.random.default_rng(1)
        result = measures(HeldOut([pair(i, -10 - rng.random() * 9, -15) for i in range(n)]), None, 500, 0)
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


def test_what_is_stored_of_an_evaluation_comes_back():
    rng = np.random.default_rng(0)
    pairs = [pair(i, -10, -12) for i in range(4)]
    whole = HeldOut(pairs, [1.0] * 4, rng.normal(size=(2, 4)), rng.integers(0, 3, (2, 4)), np.array([1.0, 0, 0, 1]))
    for one in (whole, HeldOut(pairs)):
        again = held_out_of(pairs, json.loads(json.dumps(one.per_prompt)))
        assert measures(one, None, 50, 0) == measures(again, None, 50, 0)


def policies(n: int, shift: float):
    """Two policies on the same prompts: the second gives human answers `shift` nats more, a little by chance."""
    rng = np.random.default_rng(3)
    hard = rng.normal(-40, 15, n)
    one = [pair(i, hard[i], -30) for i in range(n)]
    other = [pair(i, hard[i] + shift + rng.normal(0, 1), -30) for i in range(n)]
    return HeldOut(one), HeldOut(other)


def test_a_difference_that_all_prompts_share_is_seen_though_their_own_intervals_overlap():
    first, last = policies(60, 2.0)
    found = differences(last, first, 400, 0)["nll_per_token"]
    assert found["verdict"] == "better" and found["interval"][1] < 0
    assert found["change"] == pytest.approx(-0.2, abs=0.05)
    alone = [measures(one, None, 400, 0)["nll_per_token_interval"] for one in (first, last)]
    assert alone[0][0] < alone[1][1] and alone[1][0] < alone[0][1]


def test_no_difference_is_seen_where_there_is_none():
    first, last = policies(60, 0.0)
    assert {one["verdict"] for one in differences(last, first, 400, 0).values()} == {"same"}
    assert all(one["change"] == 0 for one in differences(first, first, 100, 0).values())


def test_five_in_a_hundred_comparisons_of_equals_are_taken_for_different():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        one, other = ([pair(i, rng.normal(-30, 8), -30) for i in range(40)] for _ in range(2))
        wrong += differences(HeldOut(other), HeldOut(one), 200, 0)["nll_per_token"]["verdict"] != "same"
    assert wrong <= 0.12 * 150


def test_diversity_falls_where_a_policy_says_the_same_to_all():
    real = [f"word{i} another{i} third{i}" for i in range(30)]
    everything = np.arange(30)
    assert diversity(real, real)(everything) == 1
    assert diversity(real, [real[0]] * 30)(everything) == pytest.approx(1 / 30)
    assert diversity(real, [""] * 30)(everything) == 1  # no word pairs: nothing is repeated


@pytest.mark.parametrize(
    ("check", "own", "real", "right"),
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
def test_answers_are_checked(check, own, real, right):
    assert CHECKS[check](own, real) == right


def test_exact_match_is_the_share_of_right_answers():
    pairs = [pair(0, -1, -1), pair(1, -1, -1, own="wrong"), pair(2, -1, -1, own="A b  c D"), pair(3, -1, -1, own="")]
    found = measures(HeldOut(pairs, correct=correct(pairs, "exact")), None, 100, 0)
    assert found["exact_match"] == 0.5 and found["exact_match_interval"][0] < 0.5 < found["exact_match_interval"][1]
    assert correct(pairs, "none") is None and "exact_match" not in measures(HeldOut(pairs), None, 10, 0)
