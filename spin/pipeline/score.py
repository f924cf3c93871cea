"""The score stage: log-probs of every pair under a frozen model, computed once and used by all trainings."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import Tensor

from spin.engines.logps import compute_logps
from spin.engines.packing import Continuations
from spin.generation.answers import Answer
from spin.method.pairs import (
    Logps,
    Pair,
    group_by_prompt,
    make_pairs,
    read_pairs,
    split_responses,
    to_continuations,
    write_pairs,
)
from spin.models.policy import Policy
from spin.pipeline.context import Run
from spin.pipeline.generate import Generate
from spin.pipeline.stage import Stage, Work
from spin.runtime.errors import UserError
from spin.runtime.progress import Progress
from spin.runtime.store import Artifact
from spin.runtime.tables import Rows


@dataclass(frozen=True)
class Scores:
    """Pairs, and the log-probs of their responses under one model."""

    pairs: Rows[Pair]
    logps: Logps
    key: str  # of the stage


@dataclass(frozen=True, eq=False)
class Score(Stage[Scores]):
    """The pairs of an iteration and of the iterations that it replays, scored by `model` ("opponent" or "start").

    `answers` holds the answers by iteration, beginning with this one's.
    """

    name = "score"
    iteration: int
    model: str
    answers: Mapping[int, Generate]

    @property
    def title(self) -> str:
        return f"iter {self.iteration}: score" + (" under the start" if self.model == "start" else "")

    @property
    def labels(self) -> dict:
        return {"iter": self.iteration} | ({"under": self.model} if self.model == "start" else {})

    def pairs(self, run: Run, answers: Mapping[int, Rows[Answer]]) -> tuple[Rows[Pair], dict[str, int]]:
        """Return the pairs and the number of dropped pairs by reason. Raises UserError if no pair is left."""
        parts = [make_pairs(run.data.train, of_iteration, t) for t, of_iteration in answers.items()]
        pairs = reduce(add, [rows for rows, _ in parts])
        dropped = {reason: sum(counts[reason] for _, counts in parts) for reason in parts[0][1]}
        if not pairs:
            raise UserError(
                f"iteration {self.iteration}: no pair is left, because every answer is empty or equals the human one "
                f"({format_counts(dropped)}). Sample with generation.temperature=1, or add data."
            )
        return pairs, dropped

    def inputs(self, run: Run, policy: Policy, answers: Mapping[int, Rows[Answer]]) -> dict:
        return {
            "policy": policy.id,
            "model": self.model,
            "iter": self.iteration,
            "pairs": self.pairs(run, answers)[0].digest,
            "numerics": run.numerics,
        }

    def build(self, run: Run, work: Work, policy: Policy, answers: Mapping[int, Rows[Answer]]) -> dict:
        started = time.perf_counter()
        pairs, dropped = self.pairs(run, answers)
        items = to_continuations(pairs)
        with run.progress(self.title, len(items), "prompts") as bar:
            values = score_items(run, work, policy, items, bar)
        logps = split_responses(values, [len(group) for group in group_by_prompt(pairs)])
        write_pairs(work.folder / "pairs.parquet", pairs, {self.model: logps})
        rate = len(pairs) / (time.perf_counter() - started + work.earlier_seconds)
        means = {f"logps/{name}": value.double().mean().item() for name, value in logps.items()}
        work.log({"step": 0, "pairs": len(pairs), **means, "pairs_per_second": rate})
        forward = run.forward(run.load(policy), policy)
        return {"pairs": len(pairs), "dropped": dropped, "layout": forward.layout, "head": forward.head}

    def read(self, run: Run, artifact: Artifact, **needs) -> Scores:
        pairs, logps = read_pairs(artifact.folder / "pairs.parquet")
        return Scores(pairs, logps[self.model], artifact.key)


def score_items(
    run: Run, work: Work, policy: Policy, items: Sequence[Continuations], bar: Progress | None = None
) -> Tensor:
    """Return the log-probs of all responses of `items` under the policy, computed by all ranks, resumed from shards."""
    model = run.load(policy)
    shards = work.shards("scores", bar, len(items) / sum(len(item.responses) for item in items))  # one row per response
    advance = bar.advance if bar else lambda items: None
    forward = run.forward(model, policy)
    return compute_logps(model, items, forward, advance, shards, run.shard_size(len(items)))


def format_counts(counts: Mapping[str, int]) -> str:
    """Format counts as in "3 identical, 1 empty", without zeros."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
