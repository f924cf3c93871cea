"""Selection of the best of several policies on the same prompts."""

from collections.abc import Sequence

import numpy as np

from spin.evaluation.measure_table import MEASURES
from spin.evaluation.measures import HeldOut, bootstrap_draws, statistics

LIKELIHOOD = "nll_per_token"


def best_policy(candidates: Sequence[HeldOut], name: str, resamples: int, seed: int) -> int:
    """Return the index of the best candidate by the measure `name`.

    Candidates within one standard error of the best value count as equal. Of these, the one with the lowest NLL of
    human answers is selected; ties go to the earliest.
    """
    everything = np.arange(len(candidates[0].pairs))
    values = [statistics(candidate, None)[name](everything) for candidate in candidates]
    badness = [MEASURES[name].badness(value) for value in values]
    best = badness.index(min(badness))
    if name == LIKELIHOOD:
        return best

    def is_equal(index: int) -> bool:
        error = badness_error(candidates[index], candidates[best], name, resamples, seed)
        return index == best or badness[index] - badness[best] <= error

    equal = [index for index in range(len(candidates)) if is_equal(index)]
    return min(equal, key=lambda index: statistics(candidates[index], None)[LIKELIHOOD](everything))


def badness_error(a: HeldOut, b: HeldOut, name: str, resamples: int, seed: int) -> float:
    """Return the bootstrap standard error over prompts of the difference in badness, a - b, in the measure `name`."""
    badness, of_a, of_b = MEASURES[name].badness, statistics(a, None)[name], statistics(b, None)[name]
    draws = bootstrap_draws(len(a.pairs), resamples, seed)
    return float(np.std([badness(of_a(draw)) - badness(of_b(draw)) for draw in draws]))
