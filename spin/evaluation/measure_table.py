"""The table of held-out measures: their names and meanings, which values are good, and number formats."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard


@dataclass(frozen=True)
class Measure:
    """A measure of a policy on held-out prompts."""

    name: str  # key in game.json, sweep.csv and W&B; `<name>_interval` has the ends of its 95 % interval
    title: str
    unit: str
    meaning: str
    heading: str = ""  # two lines, for the console; a measure without a heading is shown in the report only
    better: Literal["lower", "higher", "near"] | None = None  # near `ideal`; None if it does not rank policies
    ideal: float | None = None
    format: str = ".2f"
    min_prompts: int = 1  # the measure is omitted if there are fewer held-out prompts

    @property
    def goal(self) -> str:
        return f"{self.ideal:g} is ideal" if self.better == "near" else f"{self.better} is better"

    def badness(self, value: float) -> float:
        """Return the badness of a value: of two policies, the one with the lower badness is better."""
        if self.better == "near":
            assert self.ideal is not None
            return abs(value - self.ideal)
        return value if self.better == "lower" else -value

    def show(self, value: float | None) -> str:
        return show(value, None, self.format)

    def cell(self, row: Mapping[str, Any], template: str = " [{}, {}]") -> str:
        """Return the measure's value in a row with its interval, formatted by `template`, or ± its standard error."""
        if f"{self.name}_se" in row:
            return f"{self.show(row[self.name])} ± {self.show(row[f'{self.name}_se'])}"
        return show(row.get(self.name), row.get(f"{self.name}_interval"), self.format, template)


# With this many prompts, human answers to other prompts are detected in at least 80 % of samples (docs/evaluation.md).
CLASSIFIER_PROMPTS, MAUVE_PROMPTS = 40, 25
# In the order of display.
_MEASURES = (
    Measure("exact_match", "right answers", "share of prompts", "pass@1", "right\nanswers", "higher"),
    Measure(
        "classifier_auc", "classifier AUC", "share of answer pairs",
        "how often a classifier of words, letters, lengths and what answer and prompt share, cross-validated over prompts, "
        "finds a human answer more human than a model answer; 0.5 is ideal",
        "classif.\nAUC", "near", 0.5, min_prompts=CLASSIFIER_PROMPTS,
    ),
    Measure(
        "human_likelier", "human likelier", "share of prompts",
        "the policy gives the human answer a higher log-probability per token than the model answer; 0.5 is ideal",
        "human\nlikelier", "near", 0.5,
    ),
    Measure(
        "nll_per_token", "NLL of human answers", "nats per token",
        "negative log-likelihood under the policy", "NLL\nnats/token", "lower", format=".3f",
    ),
    Measure(
        "mauve", "MAUVE", "likeness", "likeness of the distributions of human and model answers, at most 1",
        "\nMAUVE", "higher", min_prompts=MAUVE_PROMPTS,
    ),
    Measure("mauve_if_equal", "MAUVE if equal", "likeness", "the value of MAUVE if the distributions are equal"),
    Measure(
        "length_auc", "length AUC", "share of answer pairs",
        "how often a human answer is longer than a model answer; 0.5 is ideal", "length\nAUC", "near", 0.5,
    ),
    Measure("rouge_l", "ROUGE-L", "F1", "longest common subsequence of words with the human answer", better="higher"),
    Measure("model_length", "model length", "tokens", "mean over model answers", "model\ntokens", format=".0f"),
    Measure("human_length", "human length", "tokens", "mean over human answers", "human\ntokens", format=".0f"),
    Measure("finished", "finished", "share of answers", "the policy ended the answer itself"),
    Measure("distinct_2", "distinct-2", "share of word pairs", "distinct word pairs within each answer"),
    Measure(
        "diversity", "diversity", "model / human",
        "distinct word pairs over all model answers, against the human answers; 1 is ideal", ideal=1.0,
    ),
    Measure(
        "margin", "margin", "nats",
        "the SPIN margin over the policy's opponent, without beta; not comparable between iterations", "margin\nnats",
    ),
    Measure("accuracy", "accuracy", "share of prompts", "the margin is above 0; not comparable between iterations"),
)  # fmt: skip
MEASURES = {measure.name: measure for measure in _MEASURES}
COMPARED = [measure for measure in _MEASURES if measure.better]


def known_measures(rows: Iterable[Mapping[str, Any]]) -> list[Measure]:
    """Return the measures with a known value in at least one of the evaluations `rows`."""
    rows = list(rows)
    return [measure for measure in _MEASURES if any(is_known(row.get(measure.name)) for row in rows)]


def ranking_measures(rows: Iterable[Mapping[str, Any]]) -> list[Measure]:
    """Return the known measures that rank policies and have a heading. A sweep is sorted by the first."""
    return [measure for measure in known_measures(rows) if measure.better and measure.heading]


def missing_prompts(n: int) -> list[str]:
    """Return a note per measure that needs more than `n` prompts: "MAUVE: needs 25 held-out prompts, there are 8"."""
    return [
        f"{measure.title}: needs {measure.min_prompts} held-out prompts, there are {n}"
        for measure in _MEASURES
        if n < measure.min_prompts
    ]


def is_known(value: Any) -> TypeGuard[Any]:
    """Return whether a number is not None and finite; for an interval, whether both ends are."""
    if isinstance(value, (list, tuple)):
        return all(is_known(end) for end in value)
    return value is not None and math.isfinite(value)


def show(value: float | None, interval: Any, form: str, template: str = " [{}, {}]") -> str:
    """Return `value` in the format `form` and, if known, the ends of its interval in `template`."""
    shown = f"{value:{form}}" if is_known(value) else "–"
    return shown + template.format(*(f"{end:{form}}" for end in interval)) if is_known(interval) else shown
