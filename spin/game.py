"""Self-play fine-tuning: the outer loop of the paper (arXiv 2401.01335, Algorithm 1).

`declare_game` is the algorithm. It declares stages, which `play` finds in the store or builds and `show_plan` looks up.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin.config.schema import Config
from spin.method.objectives import make_objective
from spin.pipeline.context import Run, prepare_run
from spin.pipeline.evaluate import Evaluate, Validate
from spin.pipeline.external import declare_external
from spin.pipeline.generate import Generate
from spin.pipeline.live import live_report
from spin.pipeline.plan import print_plan
from spin.pipeline.record import IterationRecord, replayed
from spin.pipeline.run_folder import check_resources, open_run, write_record
from spin.pipeline.score import Score
from spin.pipeline.select import final_stages, link_selected, should_stop
from spin.pipeline.stage import Player, PolicySource, Stage
from spin.pipeline.summary import finish
from spin.pipeline.train import Sft, Train
from spin.runtime.files import write_text
from spin.runtime.tracking import Tracker


def declare_game(run: Run) -> Iterator[IterationRecord]:
    """Declare the stages of a game: the start, SFT, then generate -> score -> train -> evaluate for t = 0, 1, 2, ...

    At iteration t the opponent p_t answers every training prompt, and the policy p_(t+1) starts as p_t and learns to
    distinguish the human answers from those of p_t (section 4.2).
    """
    config = run.config
    policy: PolicySource = run.start
    measured = declare_measures(run, None, policy)
    yield IterationRecord(None, policy, **measured)
    if config.schedule.sft_epochs > 0:
        policy = sft = Sft(None, policy)
        measured = declare_measures(run, None, policy)
        yield IterationRecord(None, policy, train=sft, **measured)

    first_opponent = policy  # the paper's p_theta_0
    answers: list[Generate] = []
    for t in range(config.iterations):
        opponent = policy
        generate = Generate(t, opponent)
        answers.append(generate)
        scored = replayed(config, t, answers)
        scores = {"opponent": Score(t, opponent, "opponent", scored)}
        objective = make_objective(config.loss, t)
        if "start" in objective.references:
            scores["start"] = Score(t, first_opponent, "start", scored)
        policy = train = Train(t, opponent, scores, answers[0] if "first" in objective.responses else None)
        measured = declare_measures(run, t, policy, measured["evaluation"])
        yield IterationRecord(t, policy, generate, scores, train, **measured)


def declare_evaluations(run: Run) -> Iterator[IterationRecord]:
    """Declare the stages of stage=evaluate: measurement of the start and of the policy to compare it with, if any."""
    evaluation = None
    for policy in reversed(run.policies):
        measured = declare_measures(run, None, policy, evaluation)
        yield IterationRecord(None, policy, **measured)
        evaluation = measured["evaluation"]


def declare_measures(
    run: Run, iteration: int | None, policy: PolicySource, opponent: Evaluate | None = None
) -> dict[str, Any]:
    """Return the stages that measure a policy, as fields of its record. `opponent` is its opponent's evaluation."""
    config, data, enabled = run.config, run.data, run.config.evaluation.enabled
    evaluation = Evaluate(iteration, policy, opponent) if enabled and data.held_out else None
    validates = enabled and data.validation and config.stage == "game"
    return {
        "evaluation": evaluation,
        "validation": Validate(iteration, policy) if validates else None,
        "external": declare_external(config, iteration, policy, evaluation, opponent),
    }


def declare(run: Run) -> tuple[list[IterationRecord], list[Stage]]:
    """Return all records and all stages that the run's settings require, in playing order."""
    records = [*(declare_evaluations(run) if run.config.stage == "evaluate" else declare_game(run))]
    return records, [*(stage for record in records for stage in record.stages), *final_stages(run, records)]


def play(config: Config, folder: Path, command: str, group: str | None = None) -> dict:
    """Play the game in the run's folder. Return the summary, which is the content of game.json and of the report.

    `group` is the sweep's name, if any. Raises UserError for errors that a user can fix, as early as possible.
    """
    with open_run(config, folder, group) as tracker:
        run = prepare_run(config, folder, tracker)
        records, stages = declare(run)
        check_resources(run, stages)
        if run.ranks.is_main_process:
            write_text(folder / "config.yaml", config.yaml)
        player = Player(run)
        with live_report(player, records, stages, command):
            for played, record in enumerate(records, 1):
                for stage in record.stages:
                    player.play(stage)
                if run.ranks.is_main_process:
                    write_record(player, record)
                if should_stop(player, records[:played]):
                    break
            selection = link_selected(player, records[:played])
        return finish(player, records[:played], selection, command) if run.ranks.is_main_process else {}


def show_plan(config: Config, folder: Path) -> None:
    """Print the sizes of the data and which stages `play` would reuse, resume and play. Nothing is computed or logged."""
    run = prepare_run(config, folder, Tracker(folder, wandb="disabled"))
    print_plan(run, declare(run)[1])
