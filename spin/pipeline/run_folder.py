"""The folder of a run, which one game at a time may use: checks, and the files written for each iteration."""

import json
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from spin.config.load import changed_settings
from spin.config.schema import Config
from spin.engines import memory
from spin.engines.device_memory import free_memory
from spin.evaluation.external.judges import check_judge
from spin.evaluation.measures import held_out_margins
from spin.method.pairs import write_pairs
from spin.pipeline.context import Run
from spin.pipeline.plan import bytes_to_write, describe_run, look_up
from spin.pipeline.record import IterationRecord
from spin.pipeline.stage import Player, Stage
from spin.pipeline.train import Train
from spin.reporting.model_card import CARD, is_own
from spin.reporting.publish import check_hub
from spin.runtime import process_group, signals
from spin.runtime.errors import UserError, brief
from spin.runtime.files import hold_lock, link_file, link_tree, write_text
from spin.runtime.process_group import ProcessGroup
from spin.runtime.tracking import Tracker

LOCK = ".lock"  # in the folder of every run
WRITTEN = ("config.yaml", "metrics.jsonl", "game.json", "report.md", "report.html", "figures", "stages.json")


@contextmanager
def open_run(config: Config, folder: Path, group: str | None) -> Iterator[Tracker]:
    """Join the process group, lock the run's folder, and yield a tracker that logs to it.

    Raises UserError if the folder holds files of the user, or another game.
    """
    ranks = process_group.join_group(config.engine.name, config.engine.device)
    with ExitStack() as stack:
        if ranks.size > 1:
            stack.enter_context(signals.deferred())  # ranks stop together in `ProcessGroup.raise_if_stopped`
        if ranks.is_main_process:
            check_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(folder / LOCK, f"another run plays in {folder}", partial(print, flush=True)))
            stack.callback(remove_unused, folder)  # while the lock is held
            if changed := changed_settings(folder / "config.yaml", config):
                raise UserError(
                    f"{folder} holds another game ({brief('; '.join(changed))}), which would be overwritten: "
                    "set another hydra.run.dir."
                )
        ranks.barrier()
        tracker = Tracker(
            folder,
            name=folder.name if group else config.name,
            config=config.shown,
            **config.tracking.model_dump(exclude={"policies"}),
            group=group,
            rank=ranks.rank,
        )
        stack.callback(tracker.close)
        yield tracker
    process_group.leave_group()


def check_folder(folder: Path) -> None:
    """Raise UserError if a run would overwrite files in a folder that no earlier run has used (it has no lock)."""
    if (folder / LOCK).exists():
        return
    for path in (*(folder / name for name in (*WRITTEN, "sft", "best")), *iteration_folders(folder)):
        if path.exists():
            raise UserError(
                f"{path} was not written by a run, and this run would overwrite it: give another hydra.run.dir."
            )


def remove_unused(folder: Path) -> None:
    """Remove the lock of a run that ended before it wrote anything, and the folder if it is then empty."""
    if not any((folder / name).exists() for name in WRITTEN):
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            folder.rmdir()


def check_resources(run: Run, stages: Sequence[Stage]) -> None:
    """Raise UserError if the disk or the device memory is too small for the run, and print a description of the run."""
    config, data = run.config, run.data
    if run.ranks.is_main_process:
        check_hub(config, run.start)
    planned = run.ranks.broadcast(look_up(run, stages) if run.ranks.is_main_process else None)
    check_shared_store(run.store.path, run.ranks)
    missing = [entry for entry in planned if entry.status != "reuse" and entry.stage != "merge"]  # checks its own disk
    policies = sum(entry.stage in ("sft", "train") for entry in missing)
    run.store.check_free(bytes_to_write(run, planned), f"{policies} policies and checkpoints")
    if config.stage == "evaluate" and not data.held_out:
        raise UserError("stage=evaluate: no prompt is left to measure on, the model was trained on all of them.")
    run.say(describe_run(run))
    if run.ranks.size > 1:
        run.say(f"{run.ranks.size} processes, ZeRO stage {config.engine.zero_stage}")
    if missing:
        check_memory(run)
    if run.ranks.is_main_process and config.evaluation.judge and {"mt_bench", "compare"} & {e.stage for e in missing}:
        check_judge(config.evaluation.judge, config.evaluation.judge_model, config.evaluation.judge_timeout)
    if data.seen:
        run.say(f"{data.seen} examples are not held out: the model was trained on their prompts.")


def check_memory(run: Run) -> None:
    """Print how much memory the run needs. Raises UserError if it does not fit."""
    base = run.start.base_or_self
    architecture = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    shape = memory.shape_of(architecture)
    if run.config.model.adapter == "lora":
        parameters = run.policy_bytes // 4
        shape = replace(shape, adapter=parameters, largest=min(shape.largest, parameters))
    load = memory.load_of(shape, run.config, run.data, base, run.device, run.dtype, run.ranks)
    for line in memory.check_memory(load, free_memory(run.device, run.ranks.here), architecture):
        run.say(line)


def check_shared_store(path: Path, ranks: ProcessGroup) -> None:
    """Raise UserError unless every rank can access the disk with the main process's store."""
    if ranks.size == 1:
        return
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ranks.broadcast(f".seen-{uuid.uuid4().hex}" if ranks.is_main_process else None)
    if ranks.is_main_process:
        probe.touch()
    ranks.barrier()
    is_shared = not ranks.all_reduce_max(not probe.exists())
    if ranks.is_main_process:
        probe.unlink()
    if not is_shared:
        raise UserError(f"store.path={path} is not the same disk for all processes: give a folder that they share.")


def remove_stale(folder: Path, records: Sequence[IterationRecord]) -> None:
    """Remove the folders of policies that an earlier, longer game had beyond `records`. They remain in the store."""
    labels = {record.policy.label for record in records}
    for path in (folder / "sft", *iteration_folders(folder)):
        if path.name not in labels:
            remove_linked(path)


def iteration_folders(folder: Path) -> list[Path]:
    """Return the folders iter0, iter1, ... in a run's folder."""
    return [path for path in folder.glob("iter*") if path.name[4:].isdecimal() and path.is_dir()]


def remove_linked(folder: Path) -> None:
    """Remove what a game wrote to `sft/`, `iter<t>/` or `best/`, and the folder unless it holds files of the user."""
    if not any((folder / name).exists() for name in (".policy.linked", ".merged.linked", "selection.json")):
        return
    for name in ("policy", "merged"):
        link_model(None, folder / name)
    for name in ("pairs.parquet", "manifest.json", "margins.json", "selection.json"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # does not exist, or is not empty
        folder.rmdir()


def link_model(source: Path | None, folder: Path) -> None:
    """Link the files of the model `source` into `folder`. With None, remove the linked model and its card."""
    if source is None and is_own(folder / CARD):
        (folder / CARD).unlink(missing_ok=True)
    link_tree(source, folder)


def write_record(player: Player, record: IterationRecord) -> None:
    """Write the files of a played record: `sft/policy`, or `iter<t>/` with pairs.parquet, policy/ and manifest.json."""
    folder = player.run.folder
    for stage in record.external:
        if (result := player.result(stage)) is not None:
            stage.write_files(result, player.run)
    if record.train is None:
        return
    shown = folder / record.policy.label
    shown.mkdir(exist_ok=True)
    link_tree(player.artifacts[record.train].folder / "policy", shown / "policy")
    if record.iteration is None:
        return
    _show_pairs(player, record, shown / "pairs.parquet")
    link_model(None, shown / "merged")
    write_text(shown / "manifest.json", json.dumps(_manifest(player, record), indent=2) + "\n")
    if record.evaluation and record.evaluation.opponent:
        now, before = (player.result(stage).held_out for stage in (record.evaluation, record.evaluation.opponent))
        write_text(shown / "margins.json", json.dumps({"margin": held_out_margins(now, before).tolist()}) + "\n")


def _show_pairs(player: Player, record: IterationRecord, path: Path) -> None:
    if record.scores.keys() == {"opponent"}:
        link_file(player.artifacts[record.scores["opponent"]].folder / "pairs.parquet", path)
        return
    scores = {model: player.result(stage) for model, stage in record.scores.items()}
    write_pairs(path, scores["opponent"].pairs, {model: score.logps for model, score in scores.items()})


def _manifest(player: Player, record: IterationRecord) -> dict:
    """Return a description of how the iteration was made, for readers and scripts."""
    config, score = player.run.config, record.scores["opponent"]
    assert record.opponent and isinstance(record.train, Train)
    policy, opponent = player.results[record.policy], player.results[record.opponent]
    weights: dict = {"label": policy.label, "weights": policy.id, "starts_as": opponent.label}
    if policy.base:
        weights["adapter_of"] = {"weights": policy.base.id, "quantization": policy.base.quantization}
    return {
        "iteration": record.iteration,
        "data": config.shown["data"],
        "start_of_the_game": config.shown["model"]["path"] or config.model.package,
        "policy": weights,
        "opponent": {"label": opponent.label, "weights": opponent.id},
        "loss": config.shown["loss"] | record.train.objective(player.run).settings,
        "replay": [f"iter{k}" for k in score.answers if k != record.iteration],
        "generation": config.shown["generation"],
        "stages": {stage.name: player.artifacts[stage].manifest for stage in (score, record.train)},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
