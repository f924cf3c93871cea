"""The game: SFT, then generate -> score -> train -> evaluate for t = 0, 1, 2, ...

The run's folder shows the stages' results under the names that people look for.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spin import report
from spin.config import Config, at
from spin.errors import UserError
from spin.evaluate import held_out_margins
from spin.model import Policy, weight_files
from spin.pairs import Answer
from spin.stages import Evaluated, Stages, counted, replayed
from spin.store import Stage, link_file, link_tree
from spin.track import Tracker, format_seconds


def play(config: Config, folder: Path, command: str) -> dict:
    """Play the game of `config`; `folder` is the run's. Returns what `report` shows, also written as game.json.

    Raises UserError for anything that a user can put right, before any long work where that can be known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(
        folder,
        name=config.name,
        config=asdict(config),
        wandb=config.tracking.wandb,
        project=config.tracking.project,
        entity=config.tracking.entity,
    )
    try:
        return _play(config, folder, command, tracker)
    finally:
        tracker.close()


def _play(config: Config, folder: Path, command: str, tracker: Tracker) -> dict:
    started = time.perf_counter()
    stages = Stages(config, folder, tracker)
    check_room(stages.store.path, folder, stages.start, config)
    remove_stale(folder, config)
    examples = stages.data
    tracker.say(
        f"{config.model.name} on {config.data.name}: {len(examples.train)} training and {len(examples.held_out)} "
        f"held-out examples ({counted(examples.counts)}); {stages.numerics['precision']} on {stages.device}"
    )
    iterations: list[dict] = []
    evaluations: list[Evaluated] = []

    def evaluate(policy: Policy, iteration: int | None, opponent: Evaluated | None) -> Evaluated | None:
        if not (config.evaluation.enabled and examples.held_out):
            return None
        evaluations.append(stages.evaluate(policy, iteration, opponent))
        return evaluations[-1]

    policy = stages.start
    last = evaluate(policy, None, None)
    if config.schedule.sft_epochs > 0:
        policy = stages.sft()
        last = evaluate(policy, None, None)

    answers: list[list[Answer]] = []
    for t in range(config.iterations):
        opponent, opponents = policy, last
        answers.append(stages.generate(opponent, t))
        pairs, score = stages.score(opponent, t, answers)
        policy, train = stages.train(opponent, t, pairs, score)
        show_iteration(folder / f"iter{t}", score, train, opponent, policy, config, t)
        last = evaluate(policy, t, opponents)
        if last and opponents:
            margins = held_out_margins(last.held_out, opponents.held_out).tolist()
            (folder / f"iter{t}" / "margins.json").write_text(json.dumps({"margin": margins}) + "\n")
        iterations.append(
            {
                "iter": t,
                "beta": at(config.loss.beta, t),
                "lr": at(config.optimizer.lr, t),
                "pairs": len(pairs),
                "dropped": score.manifest["facts"]["dropped"],
                "policy": f"iter{t}/policy",
                "opponent": opponent.label,
            }
        )

    peak = stages.peak_memory_gib
    summary: dict[str, Any] = {
        "command": command,
        "name": config.name,
        "model": config.model.path or config.model.package,
        "data": {"train": len(examples.train), "held_out": len(examples.held_out), "counts": examples.counts},
        "iterations": iterations,
        "evaluations": [{"policy": e.policy.label, "iter": e.iteration, **e.measures} for e in evaluations],
        "samples": _samples(evaluations, config.evaluation.samples),
        "seconds": {stage: round(seconds, 1) for stage, seconds in stages.seconds.items()},
        "peak_memory_gib": round(peak, 2),
    }
    (folder / "game.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    page = report.write(folder, summary)
    report.summary(summary, tracker.console)
    if stages.played == 0:
        tracker.say("Everything was done before: nothing was computed again.")
    else:
        took = format_seconds(time.perf_counter() - started)
        tracker.say(f"{stages.played} stages played in {took}, peak memory {peak:.2f} GiB.")
    tracker.close({"peak_memory_gib": peak})
    tracker.say(f"report: {page}")
    tracker.say(f"trained model: {folder / iterations[-1]['policy']}")
    return summary


def show_iteration(
    folder: Path, score: Stage, train: Stage, opponent: Policy, policy: Policy, config: Config, iteration: int
) -> None:
    """Lay out `iter<t>/`: pairs.parquet, policy/, and a manifest that says in words what made them."""
    folder.mkdir(parents=True, exist_ok=True)
    link_file(score.folder / "pairs.parquet", folder / "pairs.parquet")
    link_tree(train.folder / "policy", folder / "policy")
    manifest = {
        "iteration": iteration,
        "data": asdict(config.data),
        "start_of_the_game": config.model.path or config.model.package,
        "policy": {"label": policy.label, "weights": policy.id, "starts_as": opponent.label},
        "opponent": {"label": opponent.label, "weights": opponent.id},
        "loss": {"link": config.loss.link, "beta": at(config.loss.beta, iteration)},
        "replay": [f"iter{k}" for k in replayed(config.schedule.replay, iteration)],
        "generation": asdict(config.generation),
        "stages": {"score": score.manifest, "train": train.manifest},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def check_room(store: Path, folder: Path, start: Policy, config: Config) -> None:
    """Raise UserError if the store's disk can't take the policies of a new game (fp32, one a stage).

    Where the run's folder holds a finished game, most of this one may be in the store already: then nothing is said here.
    """
    store.mkdir(parents=True, exist_ok=True)
    stages = config.iterations + (config.schedule.sft_epochs > 0)
    size, free = fp32_bytes(start.folder), shutil.disk_usage(store).free
    if free < stages * size and not (folder / "game.json").exists():
        raise UserError(
            f"store.path={store}: {free / 2**30:.1f} GiB are free, but {stages} policies of {size / 2**30:.1f} GiB "
            "will be written. Free some space or give another store.path."
        )


def remove_stale(folder: Path, config: Config) -> None:
    """Take away what an earlier game in this folder showed and this one will not: the store still has it."""
    for path in folder.glob("iter*"):
        number = path.name.removeprefix("iter")
        if path.is_dir() and number.isdecimal() and int(number) >= config.iterations:
            shutil.rmtree(path)
    if config.schedule.sft_epochs == 0:
        shutil.rmtree(folder / "sft", ignore_errors=True)


def fp32_bytes(folder: Path) -> int:
    """The size of a model folder's weights, were they all fp32."""
    from safetensors import safe_open

    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                count = 1
                for size in file.get_slice(name).get_shape():
                    count *= size
                total += 4 * count
    return total


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
