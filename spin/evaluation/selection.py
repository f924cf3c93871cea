"""Selection of the best of several policies on the same prompts."""

from collections.abc import Sequence

import numpy as np

from spin.evaluation.measure_table import MEASURES
from spin.evaluation.measures import HeldOut, Statistic, bootstrap_draws, statistics

LIKELIHOOD = "nll_per_token"


def best_policy(candidates: Sequence[HeldOut], name: str, resamples: int, seed: int) -> int:
    """Return the index of the best candidate by the measure `name`.

    Candidates within one standard error of the best value count as equal. Of these, the one with the lowest NLL of
    human answers is selected; ties go to the earliest.
    """
    n, tables = len(candidates[0].pairs), [statistics(candidate, None) for candidate in candidates]
    badness = [MEASURES[name].badness(table[name](np.arange(n))) for table in tables]
    best = badness.index(min(badness))
    if name == LIKELIHOOD:
        return best
    draws = bootstrap_draws(n, resamples, seed)
    errors = [badness_error(table[name], tables[best][name], name, draws) for table in tables]
    equal = [index for index, error in enumerate(errors) if index == best or badness[index] - badness[best] <= error]
    return min(equal, key=lambda index: tables[index][LIKELIHOOD](np.arange(n)))


def badness_error(a: Statistic, b: Statistic, name: str, draws: np.ndarray) -> float:
    """Return the bootstrap standard error over prompts of the difference in badness, a - b, in the measure `name`."""
    badness = MEASURES[name].badness
    return float(np.std([badness(a(draw)) - badness(b(draw)) for draw in draws]))
