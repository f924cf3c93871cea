"""What a command would do: every declared stage looked up in the store, none built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from spin.engines.disk import disk_needed
from spin.pipeline.context import Run
from spin.pipeline.stage import Given, Stage
from spin.runtime.artifacts import CorruptArtifact, folder_size, verify_artifact
from spin.runtime.checkpoints import describe_progress
from spin.runtime.progress import format_seconds
from spin.runtime.tracking import Tracker


@dataclass(frozen=True)
class Planned:
    """What would happen to a stage: "reuse", "resume" or "play". `resumable_bytes` is what an interrupted attempt left."""

    stage: str
    subject: str
    status: str
    remark: str = ""
    resumable_bytes: int = 0


def look_up(run: Run, stages: Sequence[Stage], thorough: bool = False) -> list[Planned]:
    """Look up every stage, in order. `thorough` verifies the files of policies, too."""
    silent = replace(run, tracker=Tracker(run.folder, name="", config={}, rank=1))  # reading a result may log and warn
    results: dict[Any, Any] = {}
    planned = []
    for stage in stages:
        needs = [node.value if isinstance(node, Given) else results.get(node) for node in stage.needs]
        if any(result is None for result in needs):  # its key is a hash of results that do not exist yet
            policy = needs[0] if needs else None
            known = [policy] if policy is not None else []
            planned.append(Planned(stage.name, stage.subject(*known), "play"))
            continue
        artifact, entry = _look_up(silent, stage, needs, thorough)
        planned.append(entry)
        if artifact:
            results[stage] = stage.read(silent, artifact, *needs)
    return planned


def _look_up(run: Run, stage: Stage, needs: list, thorough: bool) -> tuple[Any, Planned]:
    inputs, subject = stage.inputs(run, *needs), stage.subject(*needs)
    artifact = run.store.peek(stage.name, inputs)
    if artifact is None:
        resume = run.store.resume(stage.name, inputs)
        progress = describe_progress(resume)
        status = "resume" if progress else "play"
        return None, Planned(stage.name, subject, status, progress or "", folder_size(resume))
    if thorough or stage.name not in ("sft", "train"):
        try:
            verify_artifact(artifact.folder)
        except CorruptArtifact as damage:
            return None, Planned(stage.name, subject, "play", f"damaged: {damage}")
    took, finished = format_seconds(artifact.manifest["seconds"]), artifact.manifest["finished"]
    return artifact, Planned(stage.name, subject, "reuse", f"took {took}, finished {finished}")


def bytes_to_write(run: Run, planned: Sequence[Planned]) -> int:
    """Bytes that the planned stages may still write to the store."""
    missing = [entry for entry in planned if entry.status != "reuse"]
    resumable = sum(entry.resumable_bytes for entry in missing if entry.stage in ("sft", "train"))
    names = [entry.stage for entry in missing]
    return disk_needed(names, run.start, run.policy_bytes, run.config.optimizer, resumable)


def print_plan(run: Run, planned: Sequence[Planned], console: Console) -> None:
    """Print the plan as a table and a line with its totals."""
    table = Table("stage", "of", "would", "", box=None, pad_edge=False)
    for entry in planned:
        table.add_row(entry.stage, entry.subject, entry.status, entry.remark)
    console.print(table)
    counts = {status: sum(entry.status == status for entry in planned) for status in ("reuse", "resume", "play")}
    console.print(
        f"{counts['reuse']} stages to reuse, {counts['resume']} to resume, {counts['play']} to play; "
        f"up to {bytes_to_write(run, planned) / 2**30:.1f} GiB to write to {run.store.path}.",
        soft_wrap=True,
        highlight=False,
    )
