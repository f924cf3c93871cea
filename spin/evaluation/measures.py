"""Is it better? Measures on held-out prompts, from the method itself, each with an interval over prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spin.evaluation.two_sample import mauve, mauve_if_equal
from spin.method.pairs import Pair

Statistic = Callable[[np.ndarray], float]


# How far a measure is from good, for those that say which of two policies is better.
BADNESS: dict[str, Callable[[float], float]] = {
    "nll_per_token": lambda value: value,
    "human_likelier": lambda value: abs(value - 0.5),
    "classifier_auc": lambda value: abs(value - 0.5),
    "mauve": lambda value: -value,
    "length_auc": lambda value: abs(value - 0.5),
    "rouge_l": lambda value: -value,
    "exact_match": lambda value: -value,
}


@dataclass(frozen=True)
class HeldOut:
    """A policy on the held-out prompts: `pairs` of the human and its own answer, with its own log-probs of both (nats).

    `logps_of_opponents_answers`: what it gives to the answers of the policy before it (None for the first policy).
    `scores`, `clusters`: [2, prompts], of human (row 0) and own answers, from `two_sample`. `correct`: [prompts], where
    answers can be checked.
    """

    pairs: list[Pair]
    logps_of_opponents_answers: list[float] | None = None
    scores: np.ndarray | None = None
    clusters: np.ndarray | None = None
    correct: np.ndarray | None = None

    @property
    def per_prompt(self) -> dict:
        """All but the pairs, as JSON holds it; `HeldOut(pairs, **arrays(per_prompt))` is the same again."""
        arrays = {"scores": self.scores, "clusters": self.clusters, "correct": self.correct}
        found = {name: None if array is None else array.tolist() for name, array in arrays.items()}
        return {"logps_of_opponents_answers": self.logps_of_opponents_answers, **found}


def held_out_of(pairs: list[Pair], per_prompt: dict) -> HeldOut:
    """The inverse of `HeldOut.per_prompt`."""
    arrays = {name: per_prompt[name] for name in ("scores", "clusters", "correct")}
    found = {name: None if value is None else np.array(value) for name, value in arrays.items()}
    return HeldOut(pairs, per_prompt["logps_of_opponents_answers"], **found)


def measures(now: HeldOut, before: HeldOut | None, resamples: int, seed: int) -> dict:
    """Held-out measures of a policy, and against its opponent `before` where there is one.

    For each measure `<name>` also `<name>_interval`: 2.5 and 97.5 % of `resamples` bootstrap resamples over prompts.

    - nll_per_token: negative log-likelihood of the human answers, nats a token.
    - human_likelier: share of prompts whose human answer is likelier a token than the policy's own; 0.5 is the goal.
    - classifier_auc: how often a classifier finds a human answer more human than an own one, over all such pairs; 0.5 is
      the goal. mauve: likeness of the two distributions, 1 is the goal; mauve_if_equal: what it would be with so few
      prompts, were they equal (no interval). See `two_sample`.
    - exact_match: share of right answers (pass@1), where they can be checked.
    - length_auc: how often a human answer is longer than an own one, over all such pairs; 0.5 is the goal.
    - rouge_l: F1 of the longest common subsequence of words with the human answer.
    - own_length, human_length (tokens), finished (share that the policy ended itself), distinct_2 (within answers),
      diversity (distinct word pairs over all own answers, against those of the human ones; 1 is the goal).
    - margin, accuracy: the SPIN margin (nats, without beta) of human over opponent's answers, and how often it is > 0.
    """
    found = statistics(now, before)
    draws = _draws(len(now.pairs), resamples, seed)
    result: dict = {"n": len(now.pairs)}
    for name, statistic in found.items():
        result[name] = float(statistic(np.arange(len(now.pairs))))
        low, high = np.quantile([statistic(draw) for draw in draws], [0.025, 0.975])
        result[f"{name}_interval"] = [float(low), float(high)]
    if now.clusters is not None:
        result["mauve_if_equal"] = mauve_if_equal(now.clusters, seed)
    return result


def differences(last: HeldOut, first: HeldOut, resamples: int, seed: int) -> dict:
    """How two policies differ on the same prompts, for each measure of `BADNESS` that both have.

    `{name: {"first", "last", "change", "interval", "verdict"}}`: the interval is that of last - first over bootstrap
    resamples of prompts, the same for both. "better" and "worse" where the 95 % interval of the difference in badness
    leaves 0 out, else "same".
    """
    assert [p.id for p in last.pairs] == [p.id for p in first.pairs]
    one, other = statistics(first, None), statistics(last, None)
    draws = _draws(len(last.pairs), resamples, seed)
    everything, result = np.arange(len(last.pairs)), {}
    for name, badness in BADNESS.items():
        if name not in one or name not in other:
            continue
        values = np.array([[one[name](draw), other[name](draw)] for draw in draws])
        low, high = np.quantile(values[:, 1] - values[:, 0], [0.025, 0.975])
        worse = np.quantile([badness(b) - badness(a) for a, b in values], [0.025, 0.975])
        a, b = float(one[name](everything)), float(other[name](everything))
        result[name] = {
            "first": a,
            "last": b,
            "change": b - a,
            "interval": [float(low), float(high)],
            "verdict": "better" if worse[1] < 0 else "worse" if worse[0] > 0 else "same",
        }
    return result


def statistics(now: HeldOut, before: HeldOut | None) -> dict[str, Statistic]:
    """Each measure as a function of the indices of the prompts that it is taken over, with repetitions."""
    pairs = now.pairs
    real = np.array([p.opponent_logp_real for p in pairs], dtype=float)
    own = np.array([p.opponent_logp_generated for p in pairs], dtype=float)
    real_length = np.array([len(p.real_ids) for p in pairs], dtype=float)
    own_length = np.array([len(p.generated_ids) for p in pairs], dtype=float)
    rouge = np.array([rouge_l(p.generated, p.real) for p in pairs])
    finished = np.array([p.finish_reason == "stop" for p in pairs], dtype=float)
    likelier = _wins(real / real_length - own / own_length)
    distinct = np.array([distinct_2(p.generated) for p in pairs])

    found: dict[str, Statistic] = {
        "nll_per_token": lambda i: -real[i].sum() / real_length[i].sum(),
        "human_likelier": lambda i: likelier[i].mean(),
    }
    if (scores := now.scores) is not None:
        found["classifier_auc"] = lambda i: _wins(scores[0][i][:, None] - scores[1][i][None, :]).mean()
    if (clusters := now.clusters) is not None:
        found["mauve"] = lambda i: mauve(clusters[0][i], clusters[1][i])
    if (correct := now.correct) is not None:
        found["exact_match"] = lambda i: correct[i].mean()
    found |= {
        "length_auc": lambda i: _wins(real_length[i][:, None] - own_length[i][None, :]).mean(),
        "rouge_l": lambda i: rouge[i].mean(),
        "own_length": lambda i: own_length[i].mean(),
        "human_length": lambda i: real_length[i].mean(),
        "finished": lambda i: finished[i].mean(),
        "distinct_2": lambda i: distinct[i].mean(),
        "diversity": diversity([p.real for p in pairs], [p.generated for p in pairs]),
    }
    if before is not None:
        margins = held_out_margins(now, before)
        found["margin"] = lambda i: margins[i].mean()
        found["accuracy"] = lambda i: _wins(margins[i]).mean()
    return found


def _draws(prompts: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, prompts, size=(resamples, prompts))


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


def diversity(real: Sequence[str], own: Sequence[str]) -> Statistic:
    """Distinct word pairs over all own answers, by their number, against those of the human answers: below 1 where the
    policy says the same to many prompts. Compared at the same prompts, since the share falls with more text."""
    index: dict[tuple[str, str], int] = {}

    def coded(text: str) -> np.ndarray:
        words = text.lower().split()
        return np.array([index.setdefault(pair, len(index)) for pair in zip(words, words[1:], strict=False)], dtype=int)

    codes = [[coded(text) for text in texts] for texts in (real, own)]

    def share(texts: list[np.ndarray], i: np.ndarray) -> float:
        said = np.concatenate([texts[k] for k in i])
        return len(np.unique(said)) / len(said) if len(said) else 1.0

    return lambda i: share(codes[1], i) / share(codes[0], i)
