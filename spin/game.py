"""Self-play fine-tuning: the outer loop of the paper (arXiv 2401.01335, algorithm 1).

`declare_game` is the algorithm. It declares stages, which `play` finds in the store or builds, and `show_plan` looks up.
"""

from collections.abc import Iterator
from pathlib import Path

from spin.config.schema import Config
from spin.method.objectives import make_objective
from spin.models.policy import Policy
from spin.pipeline.context import Run, prepare_run
from spin.pipeline.evaluate import Evaluate
from spin.pipeline.external import declare_external
from spin.pipeline.generate import Generate
from spin.pipeline.plan import look_up, print_plan
from spin.pipeline.record import IterationRecord, replayed, without_evaluation
from spin.pipeline.run_folder import check_resources, open_run, prepare_folder, show_record
from spin.pipeline.score import Score
from spin.pipeline.stage import Given, Node, Player
from spin.pipeline.summary import finish
from spin.pipeline.train import Merge, Sft, Train
from spin.runtime.tracking import Tracker


def declare_game(config: Config, start: Policy) -> Iterator[IterationRecord]:
    """Declare the stages of a game: the start, SFT, then generate -> score -> train -> evaluate for t = 0, 1, 2, ...

    At iteration t the opponent p_t answers every training prompt, and the policy p_(t+1) starts as p_t and learns to tell
    the human answers from those of p_t (section 4.2).
    """
    policy: Node[Policy] = Given(start)
    evaluation = declare_evaluation(config, None, policy)
    yield IterationRecord(None, policy, evaluation=evaluation, external=declare_external(config, None, policy))
    if config.schedule.sft_epochs > 0:
        policy = sft = Sft(policy)
        evaluation = declare_evaluation(config, None, policy)
        external = declare_external(config, None, policy)
        yield IterationRecord(None, policy, train=sft, evaluation=evaluation, external=external)

    first_opponent = policy  # the paper's p_theta_0
    answers: list[Generate] = []
    for t in range(config.iterations):
        opponent = policy
        generate = Generate(t, opponent)
        answers.append(generate)
        pairs = replayed(config, t, answers)
        scores = {"opponent": Score(t, "opponent", opponent, pairs)}
        objective = make_objective(config.loss, t)
        if "start" in objective.references:
            scores["start"] = Score(t, "start", first_opponent, pairs)
        policy = train = Train(t, opponent, scores, answers[0] if "first" in objective.responses else None)

        before, evaluation = evaluation, declare_evaluation(config, t, policy, evaluation)
        external = declare_external(config, t, policy, evaluation, before)
        merge = Merge(policy) if config.model.merge and t == config.iterations - 1 else None
        yield IterationRecord(t, policy, generate, scores, train, evaluation, external, merge)


def declare_evaluations(config: Config, start: Policy, against: Policy | None) -> Iterator[IterationRecord]:
    """Declare the stages of stage=evaluate: measures of `start`, and of `against` to compare it with."""
    before = None
    for policy in (against, start):
        if policy is not None:
            node = Given(policy)
            evaluation = declare_evaluation(config, None, node, before)
            external = declare_external(config, None, node, evaluation, before)
            yield IterationRecord(None, node, evaluation=evaluation, external=external)
            before = evaluation


def declare_evaluation(
    config: Config, iteration: int | None, policy: Node[Policy], opponent: Evaluate | None = None
) -> Evaluate | None:
    """The held-out evaluation of a policy, unless it is switched off."""
    return Evaluate(iteration, policy, opponent) if config.evaluation.enabled else None


def declare(run: Run) -> list[IterationRecord]:
    """All that the run's settings ask for, in playing order."""
    config = run.config if run.data.held_out else without_evaluation(run.config)
    if config.stage == "evaluate":
        return list(declare_evaluations(config, run.start, run.against))
    return list(declare_game(config, run.start))


def play(config: Config, folder: Path, command: str, composed: str | None = None, group: str | None = None) -> dict:
    """Play the game in the run's folder. Returns the summary that game.json holds and the report shows.

    `composed` is the configuration as YAML, written to config.yaml; `group` is the name of the sweep, if any.

    Raises UserError for anything that a user can fix, before long work where that can be known.
    """
    with open_run(config, folder, group) as tracker:
        run = prepare_run(config, folder, tracker)
        records = declare(run)
        check_resources(run, [stage for record in records for stage in record.stages])
        prepare_folder(run, composed)
        player = Player(run)
        for record in records:
            for stage in record.stages:
                player.play(stage)
            if run.ranks.is_main_process:
                show_record(player, record)
        return finish(player, records, command) if run.ranks.is_main_process else {}


def show_plan(config: Config, folder: Path) -> None:
    """Print which stages `play` would reuse, resume and play. Computes nothing, and leaves the run's folder as it is."""
    tracker = Tracker(folder, name=config.name, config={}, rank=1)  # rank 1 logs nothing
    run = prepare_run(config, folder, tracker)
    stages = [stage for record in declare(run) for stage in record.stages]
    print_plan(run, look_up(run, stages, thorough=True), tracker.console)
