"""Is it better? Measures on held-out prompts, from the method itself, each with an interval over prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spin.pairs import Pair

Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class HeldOut:
    """A policy on the held-out prompts: `pairs` of the human and its own answer, with its own log-probs of both (nats),
    and what it gives to the answers of the policy before it, its opponent (None for the first policy)."""

    pairs: list[Pair]
    logps_of_opponents_answers: list[float] | None = None


def measures(now: HeldOut, before: HeldOut | None, resamples: int, seed: int) -> dict:
    """Held-out measures of a policy, and against its opponent `before` where there is one.

    For each measure `<name>` also `<name>_interval`: 2.5 and 97.5 % of `resamples` bootstrap resamples over prompts.

    - nll_per_token: negative log-likelihood of the human answers, nats a token.
    - human_likelier: share of prompts whose human answer is likelier a token than the policy's own; 0.5 is the goal.
    - length_auc: how often a human answer is longer than an own one, over all such pairs; 0.5 is the goal.
    - rouge_l: F1 of the longest common subsequence of words with the human answer.
    - own_length, human_length (tokens), finished (share that the policy ended itself), distinct_2.
    - margin, accuracy: the SPIN margin (nats, without beta) of human over opponent's answers, and how often it is > 0.
    """
    pairs = now.pairs
    real = np.array([p.opponent_logp_real for p in pairs], dtype=float)
    own = np.array([p.opponent_logp_generated for p in pairs], dtype=float)
    real_length = np.array([len(p.real_ids) for p in pairs], dtype=float)
    own_length = np.array([len(p.generated_ids) for p in pairs], dtype=float)
    rouge = np.array([rouge_l(p.generated, p.real) for p in pairs])
    finished = np.array([p.finish_reason == "stop" for p in pairs], dtype=float)
    likelier = _wins(real / real_length - own / own_length)
    distinct = np.array([distinct_2(p.generated) for p in pairs])

    statistics: dict[str, Statistic] = {
        "nll_per_token": lambda i: -real[i].sum() / real_length[i].sum(),
        "human_likelier": lambda i: likelier[i].mean(),
        "length_auc": lambda i: _wins(real_length[i][:, None] - own_length[i][None, :]).mean(),
        "rouge_l": lambda i: rouge[i].mean(),
        "own_length": lambda i: own_length[i].mean(),
        "human_length": lambda i: real_length[i].mean(),
        "finished": lambda i: finished[i].mean(),
        "distinct_2": lambda i: distinct[i].mean(),
    }
    margins = None
    if before is not None:
        margins = held_out_margins(now, before)
        statistics["margin"] = lambda i: margins[i].mean()
        statistics["accuracy"] = lambda i: _wins(margins[i]).mean()

    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(pairs), size=(resamples, len(pairs)))
    result: dict = {"n": len(pairs)}
    for name, statistic in statistics.items():
        result[name] = float(statistic(np.arange(len(pairs))))
        low, high = np.quantile([statistic(draw) for draw in draws], [0.025, 0.975])
        result[f"{name}_interval"] = [float(low), float(high)]
    return result


def held_out_margins(now: HeldOut, before: HeldOut) -> np.ndarray:
    """[prompts], nats: the policy's log-ratio to its opponent on the human answer, less that on the opponent's answer."""
    assert now.logps_of_opponents_answers is not None
    assert [p.id for p in now.pairs] == [p.id for p in before.pairs]
    real = [p.opponent_logp_real - q.opponent_logp_real for p, q in zip(now.pairs, before.pairs, strict=True)]
    theirs = [
        logp - q.opponent_logp_generated for logp, q in zip(now.logps_of_opponents_answers, before.pairs, strict=True)
    ]
    return np.array(real) - np.array(theirs)


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-cased words (Lin, 2004); 0 where either has none."""
    a, b = candidate.lower().split(), reference.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def _wins(differences: np.ndarray) -> np.ndarray:
    """1 where positive, 0.5 at a tie."""
    return (differences > 0) + 0.5 * (differences == 0)


def distinct_2(text: str) -> float:
    """Share of a text's pairs of neighbouring words that are distinct: low where it repeats itself; 1 if it has none.

    Within each answer and not over all of them, where the share depends on how many answers there are.
    """
    words = text.lower().split()
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
