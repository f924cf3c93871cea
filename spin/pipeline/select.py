"""Selection of a game's final policy: the best on validation prompts, which are not the held-out ones of reports."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spin.evaluation.external.harness import parse_tasks
from spin.evaluation.measure_table import CLASSIFIER_PROMPTS, COMPARED, MEASURES
from spin.evaluation.selection import best_policy
from spin.models.policy import Policy
from spin.pipeline.context import Run
from spin.pipeline.record import IterationRecord
from spin.pipeline.run_folder import link_model, remove_linked
from spin.pipeline.stage import Player, Stage
from spin.pipeline.train import Merge
from spin.runtime.errors import UserError
from spin.runtime.files import write_text

UNKNOWN = Policy("the final policy", Path(), id="")  # placeholder before the selection; no stage has its id
HARNESS = "harness"  # evaluation.select=harness: the mean over the benchmarks' tasks


@dataclass(frozen=True)
class Selection:
    """The selected policy, its folder, and the value that it was selected by.

    `path` is relative to the run's folder, or absolute for the start. `interval` is a 95 % bootstrap interval over `n`
    prompts, or None for benchmarks. `last` is the label of the last policy.
    """

    policy: str
    iter: int | None
    path: str
    measure: str
    value: float
    interval: list[float] | None
    n: int
    last: str


def criterion(run: Run) -> str | None:
    """Return the selection criterion: evaluation.select, or a default among the run's measures. None: no selection.

    Raises UserError if the run does not measure the criterion.
    """
    config, n = run.config, len(run.data.validation) if run.config.evaluation.enabled else 0
    name, tasks = config.evaluation.select, [task.task for task in parse_tasks(config.evaluation.harness or [])]
    if config.stage != "game" or (name is None and n == 0):
        return None
    if name is None:
        by_prompts = "classifier_auc" if n >= CLASSIFIER_PROMPTS else "nll_per_token"
        return "exact_match" if config.data.check != "none" else HARNESS if tasks else by_prompts
    if name == "exact_match" and config.data.check == "none":
        raise UserError("evaluation.select=exact_match: needs data.check, which says when an answer is right.")
    checked = [measure.name for measure in COMPARED if measure.name != "exact_match" or config.data.check != "none"]
    known = [*checked, *([HARNESS, *tasks] if tasks else [])]
    if name not in known:
        raise UserError(f"evaluation.select={name}: it does not rank policies here; choose one of {', '.join(known)}.")
    if name in MEASURES and n < MEASURES[name].min_prompts:
        needed = f"data.validation of {MEASURES[name].min_prompts} or more prompts"
        raise UserError(f"evaluation.select={name}: needs {needed}, there are {n}.")
    return name


def select_policy(player: Player, records: Sequence[IterationRecord]) -> Selection | None:
    """Return the best of the played policies, including the start, or None if there is no criterion.

    The main process selects by `best_policy` on validation prompts, or by the highest benchmark value.
    """
    ranks, name = player.run.ranks, criterion(player.run)
    if name is None:
        return None
    return ranks.broadcast(_best(player, records, name) if ranks.is_main_process else None)


def _best(player: Player, records: Sequence[IterationRecord], name: str) -> Selection:
    if name in MEASURES:
        evaluations = [player.result(record.validation) for record in records if record.validation]
        settings = player.run.config.evaluation.bootstrap, player.run.config.seed
        index = best_policy([evaluation.held_out for evaluation in evaluations], name, *settings)
        chosen = evaluations[index].measures
        value, interval, n = chosen[name], chosen[f"{name}_interval"], chosen["n"]
    else:
        scores = [_benchmark(player, record, name) for record in records]
        index = max(range(len(records)), key=lambda i: scores[i][0])
        (value, n), interval = scores[index], None
    record = records[index]
    label, last = record.policy.label, records[-1].policy.label
    path = f"{label}/policy" if record.train else str(player.results[record.policy].folder.absolute())
    return Selection(label, record.iteration, path, name, value, interval, n, last)


def _benchmark(player: Player, record: IterationRecord, name: str) -> tuple[float, int]:
    """Return the value of a task, or the mean over all tasks, and the number of questions."""
    results = [player.result(stage) for stage in record.external if stage.name == HARNESS]
    chosen = [result for result in results if name in (HARNESS, result["task"])]
    return sum(result["value"] for result in chosen) / len(chosen), sum(result["n"] for result in chosen)


def final_stages(run: Run, records: Sequence[IterationRecord]) -> list[Stage]:
    """Return the stages that `link_selected` will play. Raises UserError if the run does not measure its criterion."""
    policy = records[-1].policy if criterion(run) is None else UNKNOWN
    return [Merge(None, policy)] if run.config.model.merge and records[-1].train else []


def should_stop(player: Player, records: Sequence[IterationRecord]) -> bool:
    """Return whether schedule.stop=no_gain ends the game: the best policy is schedule.patience iterations old."""
    run, t = player.run, records[-1].iteration
    if run.config.schedule.stop == "none" or t is None or t == run.config.iterations - 1:
        return False
    selection = select_policy(player, records)
    assert selection is not None  # schedule.stop requires data.validation
    best = -1 if selection.iter is None else selection.iter
    if t - best < run.config.schedule.patience:
        return False
    run.say(f"iteration {t} gained nothing over {selection.policy} on the validation prompts: the game stops here.")
    return True


def link_selected(player: Player, records: Sequence[IterationRecord]) -> Selection | None:
    """Select a policy and link it into `best/`.

    With model.merge, merge the adapter of the selected policy, or of the last one if none is selected.
    If the start is selected, `best/` contains no model, because the start is the user's own.
    """
    run, record, selection = player.run, records[-1], select_policy(player, records)
    if selection:
        record = next(record for record in records if record.policy.label == selection.policy)
    merged = None
    if run.config.model.merge and record.train:
        player.play(merge := Merge(None, record.policy))
        merged = player.artifacts[merge].folder / "merged"
    if not run.ranks.is_main_process or run.config.stage != "game":
        return selection
    if record.train:
        link_model(merged, run.folder / record.policy.label / "merged")
    best = run.folder / "best"
    if selection is None:
        remove_linked(best)
        return None
    best.mkdir(exist_ok=True)
    link_model(player.results[record.policy].folder if record.train else None, best / "policy")
    link_model(merged, best / "merged")
    write_text(best / "selection.json", json.dumps(asdict(selection), indent=2) + "\n")
    return selection
