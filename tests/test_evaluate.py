"""Held-out measures against their definitions, and on answers whose quality is known."""

import math

import numpy as np
import pytest

from spin.evaluate import HeldOut, held_out_margins, measures, rouge_l
from spin.pairs import Pair


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
