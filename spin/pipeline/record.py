"""Records of the stages that a game declares for its start, its SFT stage and each iteration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spin.config.schema import Config
from spin.pipeline.evaluate import Evaluate, Validate
from spin.pipeline.external import External
from spin.pipeline.generate import Generate
from spin.pipeline.score import Score
from spin.pipeline.stage import PolicySource, Stage
from spin.pipeline.train import Sft, Train


@dataclass(frozen=True)
class IterationRecord:
    """The stages and the resulting policy of an iteration, of the start, or of SFT (`iteration` is None for both)."""

    iteration: int | None
    policy: PolicySource
    generate: Generate | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    train: Sft | Train | None = None
    evaluation: Evaluate | None = None
    validation: Validate | None = None
    external: Sequence[External] = ()

    @property
    def opponent(self) -> PolicySource | None:
        return self.generate.policy if self.generate else None

    @property
    def stages(self) -> list[Stage]:
        parts = (self.generate, *self.scores.values(), self.train, self.validation, self.evaluation)
        return [stage for stage in (*parts, *self.external) if stage is not None]


def replayed(config: Config, iteration: int, answers: Sequence[Generate]) -> dict[int, Generate]:
    """Return the answers used in `iteration`, by iteration: first its own, then those that schedule.replay adds."""
    first = {"none": iteration, "previous": max(0, iteration - 1), "all": 0}[config.schedule.replay]
    return {k: answers[k] for k in (iteration, *range(first, iteration))}
