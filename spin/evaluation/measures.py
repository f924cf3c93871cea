"""Measures of policies on held-out prompts, with bootstrap intervals over prompts."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from spin.evaluation.measure_table import COMPARED, MEASURES
from spin.evaluation.two_sample import mauve, mauve_if_equal
from spin.method.pairs import Pair
from spin.runtime.tables import Rows

Statistic = Callable[[np.ndarray], float]
ARRAYS = ("scores", "clusters", "correct")  # optional fields of HeldOut


@dataclass(frozen=True)
class HeldOut:
    """A policy's answers to the held-out prompts, in `pairs` of human and model answers, and values per prompt.

    `policy_logps`: log-probs under this policy, summed over tokens (nats), [prompts] each, of the "real" answers, the
    "generated" answers and, except for the first policy, its opponent's answers ("opponent_generated").
    `scores`, `clusters`: [2, prompts], of human (row 0) and model answers, from `two_sample`. `correct`: [prompts], if
    answers can be checked.
    """

    pairs: Rows[Pair]
    policy_logps: dict[str, np.ndarray]
    scores: np.ndarray | None = None
    clusters: np.ndarray | None = None
    correct: np.ndarray | None = None

    @property
    def per_prompt(self) -> dict:
        """All fields except the pairs, in JSON types; `held_out_of` is the inverse."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        logps = {name: logps.tolist() for name, logps in self.policy_logps.items()}
        return {"policy_logps": logps} | {name: a if a is None else a.tolist() for name, a in arrays.items()}

    @property
    def digest(self) -> str:
        """A hash of the answers and of this policy's log-probs of them, on which the next policy's margin depends."""
        logps = {name: self.policy_logps[name].tolist() for name in ("real", "generated")}
        return hashlib.sha256(json.dumps([[asdict(pair) for pair in self.pairs], logps]).encode()).hexdigest()


def held_out_of(pairs: Rows[Pair], per_prompt: dict) -> HeldOut:
    """Return the HeldOut of `pairs` and the content of `HeldOut.per_prompt`."""
    logps = {name: np.array(values) for name, values in per_prompt["policy_logps"].items()}
    return HeldOut(
        pairs, logps, **{name: np.array(per_prompt[name]) for name in ARRAYS if per_prompt[name] is not None}
    )


def measures(now: HeldOut, before: HeldOut | None, resamples: int, seed: int) -> dict:
    """Return a policy's measures (see `measure_table`), including those relative to its opponent `before` if given.

    The keys are `n`, the number of prompts, each measure's name, and `<name>_interval`: the 2.5 and 97.5 % quantiles of
    `resamples` bootstrap resamples over prompts. `mauve_if_equal` (the value of MAUVE for this number of prompts if the
    distributions are equal) has no interval. Measures that need more prompts (`Measure.min_prompts`) are omitted.
    """
    n = len(now.pairs)
    draws = bootstrap_draws(n, resamples, seed)
    result: dict = {"n": n}
    for name, statistic in statistics(now, before).items():
        result[name] = float(statistic(np.arange(n)))
        result[f"{name}_interval"] = interval([statistic(draw) for draw in draws])
    if "mauve" in result and now.clusters is not None:
        result["mauve_if_equal"] = mauve_if_equal(now.clusters, seed)
    return result


def differences(last: HeldOut, first: HeldOut, resamples: int, seed: int) -> dict:
    """Return the differences of two policies on the same prompts, for each ranking measure that both have.

    `{name: {"first", "last", "change", "interval", "verdict"}}`: the interval is that of last - first over bootstrap
    resamples of prompts, the same for both policies. The verdict is "better" or "worse" if the 95 % interval of the
    difference in badness excludes 0, else "same".
    """
    assert [p.id for p in last.pairs] == [p.id for p in first.pairs]
    of_first, of_last = statistics(first, None), statistics(last, None)
    n, result = len(last.pairs), {}
    # First all prompts, then the resamples.
    draws = [np.arange(n), *bootstrap_draws(n, resamples, seed)]
    for measure in COMPARED:
        name = measure.name
        if name in of_first and name in of_last:
            values = np.array([[of_first[name](draw), of_last[name](draw)] for draw in draws])
            a, b = map(float, values[0])
            worse = interval([measure.badness(b) - measure.badness(a) for a, b in values[1:]])
            result[name] = {
                "first": a,
                "last": b,
                "change": b - a,
                "interval": interval(values[1:, 1] - values[1:, 0]),
                "verdict": "better" if worse[1] < 0 else "worse" if worse[0] > 0 else "same",
            }
    return result


def statistics(now: HeldOut, before: HeldOut | None) -> dict[str, Statistic]:
    """Return each measure that has enough prompts, as a function of prompt indices, which may repeat."""
    pairs = now.pairs
    real, generated = now.policy_logps["real"], now.policy_logps["generated"]
    real_length = np.array([len(p.real_ids) for p in pairs], dtype=float)
    model_length = np.array([len(p.generated_ids) for p in pairs], dtype=float)
    likelier = _wins(real / real_length - generated / model_length)

    available: dict[str, Statistic] = {
        "nll_per_token": lambda i: -real[i].sum() / real_length[i].sum(),
        "human_likelier": _mean_of(likelier),
    }
    if (scores := now.scores) is not None:
        available["classifier_auc"] = lambda i: _wins(scores[0][i][:, None] - scores[1][i][None, :]).mean()
    if (clusters := now.clusters) is not None:
        available["mauve"] = lambda i: mauve(clusters[0][i], clusters[1][i])
    if now.correct is not None:
        available["exact_match"] = _mean_of(now.correct)
    available |= {
        "length_auc": lambda i: _wins(real_length[i][:, None] - model_length[i][None, :]).mean(),
        "rouge_l": _mean_of([rouge_l(p.generated, p.real) for p in pairs]),
        "model_length": _mean_of(model_length),
        "human_length": _mean_of(real_length),
        "finished": _mean_of([float(p.finish_reason == "stop") for p in pairs]),
        "distinct_2": _mean_of([distinct_2(p.generated) for p in pairs]),
        "diversity": diversity([p.real for p in pairs], [p.generated for p in pairs]),
    }
    if before is not None:
        margins = held_out_margins(now, before)
        available |= {"margin": _mean_of(margins), "accuracy": _mean_of(_wins(margins))}
    return {name: statistic for name, statistic in available.items() if len(pairs) >= MEASURES[name].min_prompts}


def _mean_of(values: Sequence[float] | np.ndarray) -> Statistic:
    array = np.asarray(values)
    return lambda i: array[i].mean()


def bootstrap_draws(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Return the indices of resampled prompts, [resamples, prompts]."""
    return np.random.default_rng(seed).integers(0, prompts, size=(resamples, prompts))


def interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """Return the 2.5 and 97.5 % quantiles of the values."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def held_out_margins(now: HeldOut, before: HeldOut) -> np.ndarray:
    """Return [prompts], nats: the log-ratio to the opponent on the human answer minus that on the opponent's answer."""
    assert [p.id for p in now.pairs] == [p.id for p in before.pairs]
    policy, opponent = now.policy_logps, before.policy_logps
    return (policy["real"] - opponent["real"]) - (policy["opponent_generated"] - opponent["generated"])


def _wins(differences: np.ndarray) -> np.ndarray:
    """Return 1 for positive differences, 0.5 for ties, and 0 for negative differences."""
    return (differences > 0) + 0.5 * (differences == 0)


# --- measures of texts ------------------------------------------------------------------------------------------------


def rouge_l(candidate: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of lower-cased words (Lin, 2004); 0 if a text has no words."""
    a, b = candidate.lower().split(), reference.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, reference_word in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == reference_word else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def word_pairs(text: str) -> list[tuple[str, str]]:
    return list(pairwise(text.lower().split()))


def distinct_2(text: str) -> float:
    """Return the share of distinct pairs of adjacent words in a text; 1 without pairs. Repetition lowers it.

    It is computed within each answer, because over all answers it would depend on their number.
    """
    pairs = word_pairs(text)
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def diversity(real: Sequence[str], generated: Sequence[str]) -> Statistic:
    """Return the share of distinct word pairs over all model answers, relative to human answers: below 1 if the policy
    repeats itself across prompts. Both shares are of the same prompts, since the share falls with more text."""
    index: dict[tuple[str, str], int] = {}

    def encode(text: str) -> np.ndarray:
        return np.array([index.setdefault(pair, len(index)) for pair in word_pairs(text)], dtype=int)

    real_codes, generated_codes = ([encode(text) for text in texts] for texts in (real, generated))

    def distinct_share(codes: list[np.ndarray], i: np.ndarray) -> float:
        chosen = np.concatenate([codes[k] for k in i])
        return len(np.unique(chosen)) / len(chosen) if len(chosen) else 1.0

    return lambda i: distinct_share(generated_codes, i) / distinct_share(real_codes, i)
