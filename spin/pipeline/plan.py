"""What a command would do: every stage of the game looked up, none played."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from spin.config.schema import Config
from spin.pipeline.stages import Stages
from spin.runtime.artifacts import CorruptArtifact, folder_size, verify_artifact
from spin.runtime.checkpoints import describe_progress
from spin.runtime.progress import format_seconds
from spin.runtime.store import Artifact
from spin.runtime.tracking import Tracker


@dataclass(frozen=True)
class Planned:
    """A stage ("train"), of what ("iter 1"), what would happen ("reuse", "resume" or "play"), a remark, and how many bytes
    an earlier try has left of it."""

    stage: str
    of: str
    status: str
    remark: str = ""
    left: int = 0


class _Unknown:
    """Stands for the result of a stage that is not played yet, and for the policy in it."""

    @property
    def policy(self) -> "_Unknown":
        return self


class _Missing(Exception):
    """The stage is not in the store; `found` is what an earlier try left, in words."""

    def __init__(self, found: str | None = None, damage: str = "", left: int = 0):
        self.found, self.damage, self.left = found, damage, left


def _looked_up(method: Callable) -> Callable:
    @functools.wraps(method)
    def look(self: "Lookup", *arguments: Any) -> Any:
        self.of = _of(method.__name__, arguments)
        try:
            # What is made from the unknown can't be looked up: its key is the hash of what made it.
            given = (part for a in arguments for part in (a if isinstance(a, list) else [a]))
            if any(isinstance(part, _Unknown) for part in given):
                raise _Missing
            return method(self, *arguments)
        except _Missing as missing:
            status, remark = ("resume", missing.found) if missing.found else ("play", missing.damage)
            self.planned.append(Planned(method.__name__, self.of, status, remark, missing.left))
            return _Unknown()

    return look


def _of(stage: str, arguments: tuple) -> str:
    """What the stage is of, in words, whether or not its policy is known."""
    if stage == "sft":
        return "start"
    if stage in ("evaluate", "harness", "mt_bench", "compare"):
        policy, iteration = arguments[:2]
        return f"iter {iteration}" if iteration is not None else getattr(policy, "label", "sft")
    if stage == "merge":
        return "the last policy"
    return f"iter {arguments[1]}"


class Lookup(Stages):
    """The stages of a run, looked up and not played. `thorough` checks the files of policies, too."""

    def __init__(self, stages: Stages, thorough: bool):
        self.__dict__ |= stages.__dict__  # their data, tokenizer and numerics, loaded once
        self.tracker = Tracker(stages.folder, name="", config={}, rank=1)  # rank 1: silent
        self.planned: list[Planned] = []
        self.of = ""
        self.thorough = thorough

    def stage(
        self, name: str, title: str, labels: dict, inputs: dict, build: Callable, by_rank_0: bool = False
    ) -> Artifact:
        found = self.store.peek(name, inputs)
        if found is None:
            resume = self.store.resume(name, inputs)
            raise _Missing(describe_progress(resume), left=folder_size(resume))
        if self.thorough or name not in ("sft", "train"):
            try:
                verify_artifact(found.folder)
            except CorruptArtifact as damage:
                raise _Missing(damage=f"it is damaged: {damage}") from damage
        took = format_seconds(found.manifest["seconds"])
        self.planned.append(Planned(name, self.of, "reuse", f"took {took}, finished {found.manifest['finished']}"))
        return found

    generate = _looked_up(Stages.generate)
    score = _looked_up(Stages.score)
    train = _looked_up(Stages.train)
    sft = _looked_up(Stages.sft)
    evaluate = _looked_up(Stages.evaluate)
    harness = _looked_up(Stages.harness)
    mt_bench = _looked_up(Stages.mt_bench)
    compare = _looked_up(Stages.compare)
    merge = _looked_up(Stages.merge)


def look_up(
    turns: Callable[[Config, Stages], Iterable], config: Config, stages: Stages, thorough=False
) -> list[Planned]:
    """Walk through the game `turns` without playing it: the stages in their order, with what would happen to each."""
    lookup = Lookup(stages, thorough)
    for _ in turns(config, lookup):
        pass
    return lookup.planned


def trainings(planned: Iterable[Planned]) -> int:
    """How many policies are still to be made."""
    return sum(one.stage in ("sft", "train") and one.status != "reuse" for one in planned)


def room(planned: Iterable[Planned], stages: Stages) -> int:
    """Bytes that may still be written to the store: policies, and checkpoints but for those that are there."""
    todo = [one for one in planned if one.status != "reuse"]
    missing = [one for one in todo if one.stage in ("sft", "train")]
    merged = stages.merged_bytes if any(one.stage == "merge" for one in todo) else 0
    return merged + (max(0, stages.training_bytes(len(missing)) - sum(one.left for one in missing)) if missing else 0)


def show(planned: list[Planned], stages: Stages, console: Console) -> None:
    """The plan as a table, and one line that sums it up."""
    table = Table("stage", "of", "would", "", box=None, pad_edge=False)
    for one in planned:
        table.add_row(one.stage, one.of, one.status, one.remark)
    console.print(table)
    counts = {status: sum(one.status == status for one in planned) for status in ("reuse", "resume", "play")}
    console.print(
        f"{counts['reuse']} stages to reuse, {counts['resume']} to resume, {counts['play']} to play; "
        f"up to {room(planned, stages) / 2**30:.1f} GiB to write to {stages.store.path}.",
        soft_wrap=True,
        highlight=False,
    )
