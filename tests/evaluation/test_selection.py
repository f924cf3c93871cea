"""Tests of the rule that selects a policy."""

import numpy as np
import pytest

from spin.evaluation import selection
from spin.evaluation.measures import HeldOut, bootstrap_draws, measures, statistics
from spin.evaluation.selection import badness_error, best_policy
from spin.method.pairs import Pair


def held_out(nll: float, separation: float, prompts: int = 60, seed: int = 5) -> HeldOut:
    """Return fabricated evaluations with an NLL per token and the separation of human and model answers by a classifier."""
    pairs = [Pair(str(i), "p", "a b", "c d", "stop", (1,), (2, 3), (4, 5)) for i in range(prompts)]
    logps = {"real": np.full(prompts, -2 * nll), "generated": np.full(prompts, -3.0)}
    noise = np.random.default_rng(seed).normal(size=(2, prompts))
    return HeldOut(pairs, logps, noise + separation * np.array([[1.0], [0.0]]))


def select(name: str, *candidates: HeldOut) -> int:
    return best_policy(candidates, name, 200, 0)


def test_nearest_to_one_half():
    assert select("classifier_auc", held_out(1.0, 3.0), held_out(2.0, 0.3), held_out(1.5, -3.0)) == 1
    assert select("nll_per_token", held_out(1.0, 3.0), held_out(2.0, 0.3)) == 0


def test_equal_values():
    best, near, far = held_out(2.0, 0.30, seed=5), held_out(1.0, 0.0, seed=6), held_out(0.5, 3.0, seed=7)
    gap = measures(near, None, 50, 0)["classifier_auc"] - measures(best, None, 50, 0)["classifier_auc"]
    of_near, of_best = (statistics(policy, None)["classifier_auc"] for policy in (near, best))
    assert 0 < gap < badness_error(of_near, of_best, "classifier_auc", bootstrap_draws(60, 200, 0))
    assert select("classifier_auc", best, near, far) == 1 and select("classifier_auc", far, near, best) == 1
    assert select("classifier_auc", best, best) == 0  # the earliest of equal policies


def test_statistics_are_built_once(monkeypatch):
    built = []
    monkeypatch.setattr(selection, "statistics", lambda *args: built.append(args) or statistics(*args))
    select("classifier_auc", held_out(1.0, 0.3), held_out(2.0, 0.3), held_out(1.5, 0.3))
    assert len(built) == 3


@pytest.mark.filterwarnings("ignore:Degrees of freedom", "ignore:invalid value")
def test_unknown_error():
    """The best candidate is selected if the standard error is not a number, as without resamples."""
    assert best_policy([held_out(1.0, 3.0), held_out(2.0, 0.3)], "classifier_auc", 0, 0) == 1
