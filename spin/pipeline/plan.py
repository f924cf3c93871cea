"""The plan of a command: each declared stage is looked up in the store, and none is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from spin.engines.disk import fp32_bytes, training_bytes
from spin.pipeline.context import Run
from spin.pipeline.score import format_counts
from spin.pipeline.stage import Results, Stage
from spin.runtime.artifacts import CorruptArtifact, folder_size, verify_artifact
from spin.runtime.checkpoints import describe_progress
from spin.runtime.progress import format_seconds
from spin.runtime.tracking import Tracker


@dataclass(frozen=True)
class Planned:
    """The planned `status` of a stage: "reuse", "resume" (from `resumable_bytes` in the store) or "play"."""

    stage: str
    subject: str
    status: str
    remark: str
    resumable_bytes: int


def look_up(run: Run, stages: Sequence[Stage], thorough: bool = False) -> list[Planned]:
    """Look up every stage, in order. With `thorough`, also verify the files of models."""
    silent = replace(run, tracker=Tracker(run.folder, name="", config={}, rank=1))  # reading a result may log and warn
    results = Results()
    return [Planned(stage.name, stage.subject, *_look_up(silent, stage, results, thorough)) for stage in stages]


def _look_up(run: Run, stage: Stage, results: Results, thorough: bool) -> tuple[str, str, int]:
    """Return the last three fields of the stage's `Planned`. Add its result, if it exists, to `results`."""
    try:
        needs = stage.needs(results)
    except KeyError:  # its key depends on results that do not exist yet
        return "play", "", 0
    inputs = stage.inputs(run, **needs)
    artifact = run.store.peek(stage.name, inputs)
    if artifact is None:
        resume = run.store.resume(stage.name, inputs)
        progress = describe_progress(resume)
        return "resume" if progress else "play", progress or "", folder_size(resume)
    if thorough or stage.name not in ("sft", "train", "merge"):
        try:
            verify_artifact(artifact.folder)
        except CorruptArtifact as damage:
            return "play", f"damaged: {damage}", 0
    results[stage] = stage.read(run, artifact, **needs)
    took, finished = format_seconds(artifact.manifest["seconds"]), artifact.manifest["finished"]
    return "reuse", f"took {took}, finished {finished}", 0


def bytes_to_write(run: Run, planned: Sequence[Planned]) -> int:
    """Return the number of bytes that the planned stages may still write to the store."""
    missing = [entry for entry in planned if entry.status != "reuse"]
    trainings = [entry for entry in missing if entry.stage in ("sft", "train")]
    if not trainings:
        return 0
    merged = fp32_bytes(run.start.base_or_self.folder) if any(entry.stage == "merge" for entry in missing) else 0
    written = len(trainings) * run.policy_bytes + training_bytes(run.policy_bytes, run.config.optimizer)
    return merged + max(0, written - sum(entry.resumable_bytes for entry in trainings))


def describe_run(run: Run) -> str:
    """Return a line with the model, the sizes of the data sets, the counts of answers by reason, and the device."""
    names, data = f"{run.config.model.name} on {run.config.data.name}", run.data
    sizes = f"{len(data.train)} training, {len(data.validation)} validation and {len(data.held_out)} held-out examples"
    return f"{names}: {sizes} ({format_counts(data.counts)}); {run.numerics['precision']} on {run.device}"


def print_plan(run: Run, stages: Sequence[Stage]) -> None:
    """Print a line that describes the run, a table of the planned stages, and a line with totals."""
    planned = look_up(run, stages, thorough=True)
    table = Table("stage", "of", "would", "", box=None, pad_edge=False)
    for entry in planned:
        table.add_row(entry.stage, entry.subject, entry.status, entry.remark)
    run.say(describe_run(run))
    run.tracker.console.print(table)
    counts = {status: sum(entry.status == status for entry in planned) for status in ("reuse", "resume", "play")}
    run.say(
        f"{counts['reuse']} stages to reuse, {counts['resume']} to resume, {counts['play']} to play; "
        f"up to {bytes_to_write(run, planned) / 2**30:.1f} GiB to write to {run.store.path}."
    )
