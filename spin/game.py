"""The game: SFT, then generate -> score -> train -> evaluate for t = 0, 1, 2, ...

The run's folder shows the stages' results under the names that people look for.
"""

import json
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spin.config.schema import Config, value_at_iteration
from spin.evaluation.external.harness import PAPER
from spin.evaluation.measures import differences, held_out_margins
from spin.generation.answers import Answer
from spin.method.pairs import write_start_logps
from spin.models.policy import Policy
from spin.pipeline import external as exams
from spin.pipeline import plan
from spin.pipeline.external import Exams
from spin.pipeline.stages import Evaluated, Scored, Stages, Trained, check_room, counted, replayed
from spin.reporting import report
from spin.runtime import process_group as ranks
from spin.runtime import signals as interrupt
from spin.runtime.errors import UserError
from spin.runtime.files import hold_lock, link_file, link_tree, write_text
from spin.runtime.progress import format_seconds
from spin.runtime.store import Artifact
from spin.runtime.tracking import Tracker


@dataclass(frozen=True)
class Turn:
    """What the game did at one of its turns: the start (all None but the evaluation), the SFT stage, an iteration."""

    iteration: int | None
    evaluated: Evaluated | None
    trained: Trained | None = None
    opponent: Policy | None = None
    opponents: Evaluated | None = None  # the evaluation of the opponent
    scored: Scored | None = None
    exams: Exams | None = None
    merged: Artifact | None = None  # of the last policy, where it is an adapter and that was asked for

    @property
    def policy(self) -> Policy | None:
        """Whose turn it is, where anything is known of it."""
        return self.trained.policy if self.trained else self.evaluated.policy if self.evaluated else None


def turns(config: Config, stages: Stages) -> Iterator[Turn]:
    """The game itself: the start, an SFT stage, then generate -> score -> train -> evaluate (section 4.2 of the paper).

    With `stage=evaluate` the start is measured and nothing is played.
    """

    asked = config.evaluation

    def evaluate(policy: Policy, iteration: int | None, opponents: Evaluated | None) -> tuple[Evaluated | None, Exams]:
        measured = stages.evaluate(policy, iteration, opponents) if asked.enabled and stages.data.held_out else None
        return measured, Exams(
            stages.harness(policy, iteration) if asked.harness else None,
            stages.mt_bench(policy, iteration) if asked.questions else None,
            stages.compare(policy, iteration, measured, opponents) if asked.judge and measured and opponents else None,
        )

    policy = stages.start
    if config.stage == "evaluate":
        opponents = None
        if stages.against:
            opponents, found = evaluate(stages.against, None, None)
            yield Turn(None, opponents, exams=found)
        evaluated, found = evaluate(policy, None, opponents)
        yield Turn(None, evaluated, opponents=opponents, exams=found)
        return
    evaluated, found = evaluate(policy, None, None)
    yield Turn(None, evaluated, exams=found)
    if config.schedule.sft_epochs > 0:
        trained = stages.sft()
        policy = trained.policy
        evaluated, found = evaluate(policy, None, None)
        yield Turn(None, evaluated, trained, exams=found)

    answers: list[list[Answer]] = []
    start = policy  # of self-play: the paper's p_theta_0
    for t in range(config.iterations):
        opponent, opponents = policy, evaluated
        answers.append(stages.generate(opponent, t))
        scored = stages.score(opponent, t, answers, start)
        trained = stages.train(opponent, t, scored)
        policy = trained.policy
        evaluated, found = evaluate(policy, t, opponents)
        merged = stages.merge(policy) if config.model.merge and t == config.iterations - 1 else None
        yield Turn(t, evaluated, trained, opponent, opponents, scored, found, merged)


def play(config: Config, folder: Path, command: str, composed: str | None = None, group: str | None = None) -> dict:
    """Play the game of `config`; `folder` is the run's. Returns what `report` shows, also written as game.json.

    `composed`, the configuration as people write it, becomes config.yaml once the game can begin. `group` is the sweep that
    the game is a point of, if any.

    Raises UserError for anything that a user can put right, before any long work where that can be known.
    """
    together = ranks.join_group(config.engine.name, config.engine.device)
    if together.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if together.size > 1:
            stack.enter_context(interrupt.deferred())  # they stop together, where `Ranks.check` is
        if together.is_main_process:
            stack.enter_context(
                hold_lock(folder / ".lock", f"another run is at work in {folder}", partial(print, flush=True))
            )
        together.barrier()
        tracker = Tracker(
            folder,
            name=folder.name if group else config.name,
            config=config.model_dump(),
            wandb=config.tracking.wandb,
            project=config.tracking.project,
            entity=config.tracking.entity,
            group=group,
            rank=together.rank,
        )
        try:
            summary = _play(config, folder, command, composed, tracker)
        finally:
            tracker.close()
    ranks.leave_group()
    return summary


def _play(config: Config, folder: Path, command: str, composed: str | None, tracker: Tracker) -> dict:
    started = time.perf_counter()
    stages = Stages(config, folder, tracker)
    leads = stages.ranks.is_main_process
    planned = stages.ranks.broadcast(plan.look_up(turns, config, stages) if leads else None)
    _check_store(stages)
    check_room(stages.store, plan.room(planned, stages), f"{plan.trainings(planned)} policies and checkpoints")
    examples = stages.data
    if config.stage == "game":
        if leads:
            remove_stale(folder, config)
    elif (folder / "iter0").exists():
        raise UserError(f"{folder} holds a game, which stage=evaluate would overwrite: give another hydra.run.dir.")
    elif not examples.held_out:
        raise UserError("stage=evaluate: no prompt is left to measure on: the model was trained on all that there are.")
    tracker.say(
        f"{config.model.name} on {config.data.name}: {len(examples.train)} training and {len(examples.held_out)} "
        f"held-out examples ({counted(examples.counts)}); {stages.numerics['precision']} on {stages.device}"
    )
    if stages.ranks.size > 1:
        tracker.say(f"{stages.ranks.size} processes, ZeRO stage {config.engine.zero_stage}")
    if composed is not None and leads:
        write_text(folder / "config.yaml", composed)
    if any(one.status != "reuse" for one in planned):
        stages.check_memory()
    if examples.seen:
        tracker.say(f"{examples.seen} prompts are not held out: the model was trained on them.")
    played = []
    for turn in turns(config, stages):
        if leads:
            show(turn, folder, config)
        played.append(turn)
    if not leads:
        return {}

    evaluations = [turn.evaluated for turn in played if turn.evaluated]
    peak = stages.peak_memory_gib
    summary: dict[str, Any] = {
        "command": command,
        "name": config.name,
        "model": config.model.path or config.model.package,
        "data": {"train": len(examples.train), "held_out": len(examples.held_out), "counts": examples.counts},
        "iterations": [
            {
                "iter": turn.iteration,
                "beta": value_at_iteration(config.loss.beta, turn.iteration),
                "lr": value_at_iteration(config.optimizer.lr, turn.iteration),
                "pairs": len(turn.scored.pairs),
                "dropped": turn.scored.stage.manifest["facts"]["dropped"],
                "policy": f"iter{turn.iteration}/policy",
                "opponent": turn.opponent.label,
            }
            for turn in played
            if turn.iteration is not None and turn.scored and turn.opponent
        ],
        "evaluations": [{"policy": e.policy.label, "iter": e.iteration, **e.measures} for e in evaluations],
        "differences": _differences(evaluations, config),
        "exams": _exams(played),
        "samples": _samples(evaluations, config.evaluation.samples),
        "seconds": {stage: round(seconds, 1) for stage, seconds in stages.seconds.items()},
        "peak_memory_gib": round(peak, 2),
    }
    write_text(folder / "game.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    page = report.write_report(folder, summary)
    stages.store.refer(folder, stages.used, only=True)
    report.print_summary(summary, tracker.console)
    if stages.played == 0:
        tracker.say("Everything was done before: nothing was computed again.")
    else:
        took = format_seconds(time.perf_counter() - started)
        tracker.say(f"{stages.played} stages played in {took}, peak memory {peak:.2f} GiB.")
    tracker.close({"peak_memory_gib": peak})
    tracker.say(f"report: {page}")
    if summary["iterations"]:
        tracker.say(f"trained model: {folder / summary['iterations'][-1]['policy']}")
    return summary


def _check_store(stages: Stages) -> None:
    """Raise UserError unless all ranks see the disk that rank 0 keeps the store on."""
    if stages.ranks.size == 1:
        return
    stages.store.path.mkdir(parents=True, exist_ok=True)
    sign = stages.ranks.broadcast(f".seen-{uuid.uuid4().hex}" if stages.ranks.is_main_process else None)
    if stages.ranks.is_main_process:
        (stages.store.path / sign).touch()
    stages.ranks.barrier()
    blind = not (stages.store.path / sign).exists()
    if stages.ranks.all_reduce_max(blind):
        raise UserError(
            f"store.path={stages.store.path} is not the same disk for all processes: give a folder that all machines share."
        )
    if stages.ranks.is_main_process:
        (stages.store.path / sign).unlink()


def show_plan(config: Config, folder: Path) -> None:
    """Say which stages `play` would reuse, resume and play. Nothing is computed, and no result in the run's folder touched."""
    tracker = Tracker(folder, name=config.name, config={}, rank=1)  # rank 1: silent
    stages = Stages(config, folder, tracker)
    plan.show(plan.look_up(turns, config, stages, thorough=True), stages, tracker.console)


def show(turn: Turn, folder: Path, config: Config) -> None:
    """Lay out the run's folder: `sft/policy`, and `iter<t>/` with pairs.parquet, policy/, and a manifest in words."""
    if turn.exams and turn.exams.mt_bench and turn.policy:
        name = f"{config.name}-{turn.policy.label.replace('/', '-')}"
        exams.write_answers(turn.exams.mt_bench, name, folder / "mt_bench")
    if turn.trained is None:
        return
    policy, train = turn.trained.policy, turn.trained.stage
    if turn.iteration is None:
        link_tree(train.folder / "policy", folder / "sft" / "policy")
        return
    assert turn.opponent and turn.scored
    t, score, shown = turn.iteration, turn.scored.stage, folder / f"iter{turn.iteration}"
    shown.mkdir(parents=True, exist_ok=True)
    if turn.scored.start:
        write_start_logps(turn.scored.pairs, turn.scored.start.pairs, shown / "pairs.parquet")
    else:
        link_file(score.folder / "pairs.parquet", shown / "pairs.parquet")
    link_tree(train.folder / "policy", shown / "policy")
    if turn.merged:
        link_tree(turn.merged.folder / "merged", shown / "merged")
    else:
        shutil.rmtree(shown / "merged", ignore_errors=True)
    manifest = {
        "iteration": t,
        "data": config.data.model_dump(),
        "start_of_the_game": config.model.path or config.model.package,
        "policy": {"label": policy.label, "weights": policy.id, "starts_as": turn.opponent.label, **_base(policy)},
        "opponent": {"label": turn.opponent.label, "weights": turn.opponent.id},
        "loss": {**config.loss.model_dump(), "beta": value_at_iteration(config.loss.beta, t)},
        "replay": [f"iter{k}" for k in replayed(config.schedule.replay, t)],
        "generation": config.generation.model_dump(),
        "stages": {"score": score.manifest, "train": train.manifest},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    write_text(shown / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    if turn.evaluated and turn.opponents:
        margins = held_out_margins(turn.evaluated.held_out, turn.opponents.held_out).tolist()
        write_text(shown / "margins.json", json.dumps({"margin": margins}) + "\n")


def _base(policy: Policy) -> dict:
    """Of an adapter, the model that it belongs to."""
    base = policy.base
    return {"adapter_of": {"weights": base.id, "quantization": base.quantization}} if base else {}


def remove_stale(folder: Path, config: Config) -> None:
    """Take away what an earlier game in this folder showed and this one will not: the store still has it."""
    for path in folder.glob("iter*"):
        number = path.name.removeprefix("iter")
        if path.is_dir() and number.isdecimal() and int(number) >= config.iterations:
            shutil.rmtree(path)
    if config.schedule.sft_epochs == 0:
        shutil.rmtree(folder / "sft", ignore_errors=True)


def _exams(played: Sequence[Turn]) -> list[dict]:
    """What benchmarks and judges say of every policy; of MT-Bench the grades."""
    has_sft = any(turn.iteration is None and turn.trained for turn in played)
    rows = []
    for turn in played:
        policy = turn.policy
        if turn.exams and policy and any((turn.exams.harness, turn.exams.mt_bench, turn.exams.comparison)):
            graded = turn.exams.mt_bench and turn.exams.mt_bench["score"]
            found = {"harness": turn.exams.harness, "mt_bench": graded, "comparison": turn.exams.comparison}
            # Zephyr, with no SFT stage before it, is the paper's SFT model.
            paper = PAPER.get("sft" if policy.label == "start" and not has_sft else policy.label)
            rows.append({"policy": policy.label, "iter": turn.iteration, "paper": paper, **found})
    return rows


def _differences(evaluations: Sequence[Evaluated], config: Config) -> list[dict]:
    """The last policy against the one that self-play started from, and against iteration 0's; or against the other of
    two that are measured."""
    played = [e for e in evaluations if e.iteration is not None]
    before = [e for e in evaluations if e.iteration is None]
    pairs = [(before[-1], played[-1])] if played and before else []
    pairs += [(played[0], played[-1])] if len(played) > 1 else []
    pairs += [(before[0], before[1])] if config.stage == "evaluate" and len(before) > 1 else []
    return [
        {
            "policy": last.policy.label,
            "against": first.policy.label,
            "n": len(last.held_out.pairs),
            "measures": differences(last.held_out, first.held_out, config.evaluation.bootstrap, config.seed),
        }
        for first, last in pairs
    ]


def _samples(evaluations: Sequence[Evaluated], count: int) -> list[dict]:
    """The first held-out prompts, with the human answer and every policy's."""
    if not evaluations:
        return []
    return [
        {
            "prompt": pair.prompt,
            "real": pair.real,
            "answers": {e.policy.label: e.held_out.pairs[i].generated for e in evaluations},
        }
        for i, pair in enumerate(evaluations[0].held_out.pairs[:count])
    ]
