"""The summary of a finished game: game.json, the report, and the final output."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spin.config.schema import Config, value_at_iteration
from spin.evaluation.external.harness import PAPER
from spin.evaluation.measures import HeldOut, differences
from spin.pipeline.context import Run
from spin.pipeline.evaluate import Evaluation
from spin.pipeline.record import IterationRecord
from spin.pipeline.run_folder import remove_stale
from spin.pipeline.select import Selection
from spin.pipeline.stage import Player
from spin.pipeline.train import Train
from spin.reporting.model_card import write_cards
from spin.reporting.publish import publish
from spin.reporting.report import describe_selection, write_report
from spin.reporting.samples import sample_set
from spin.reporting.summary import print_summary
from spin.reporting.sweep_rows import result
from spin.reporting.text import printable
from spin.runtime.errors import UserError, brief
from spin.runtime.files import write_text
from spin.runtime.progress import format_seconds


def finish(
    player: Player, records: Sequence[IterationRecord], selection: Selection | None, command: str
) -> dict[str, Any]:
    """Write game.json and the report, print the summary, record the store entries in use, and return the summary.

    Raises UserError at the end, but before anything is published, if a stage was given up.
    """
    run = player.run
    summary = summarize(player, records, selection, command)
    if run.config.stage == "game":
        remove_stale(run.folder, records)
    write_text(run.folder / "game.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    page = write_report(run.folder, summary, sample_sets(player, records))
    write_cards(run.folder, summary, run.config, run.start)
    run.store.refer(run.folder, player.references, only=True)
    print_summary(summary, run.tracker.console)
    built = sum(not artifact.reused for artifact in player.artifacts.values())
    if built == 0 and not player.given_up:
        run.say("All stages were reused: nothing was computed again.")
    else:
        took = format_seconds(time.perf_counter() - player.started)
        run.say(f"{built} stages played in {took}, peak memory {summary['peak_memory_gib']:.2f} GiB.")
    trained = [f"{record.policy.label}/policy" for record in records if record.train]
    _send_policies(run, summary["selected"], trained)
    best = "selected" if selection else "last"
    measures = {f"{best}/{name}": value for name, value in (result(summary) | (summary["selected"] or {})).items()}
    run.tracker.close({"peak_memory_gib": summary["peak_memory_gib"], **measures})
    run.say(f"report: {page} and {page.with_suffix('.html').name}")
    if selection:
        path = selection.path if Path(selection.path).is_absolute() else run.folder / "best" / "policy"
        run.say(f"selected model: {path}: {describe_selection(summary['selected'])}")
    elif trained:
        last = run.folder / trained[-1]
        hint = " (the last policy; data.validation=64 selects the best one)" if run.config.evaluation.enabled else ""
        run.say(f"trained model: {last}{hint}")
    if player.given_up:
        names, reason = brief(", ".join(player.given_up), 300), next(reversed(player.given_up.values()))
        raise UserError(f"no result of {names}: {reason}; run the same command again; only these are repeated.")
    if run.config.publish.hub:
        publish(run.folder, summary, run.config, run.say)
    return summary


def _send_policies(run: Run, selected: dict | None, paths: list[str]) -> None:
    """Upload the policies that tracking.policies selects among those at `paths`, which excludes the user's own start."""
    setting = run.config.tracking.policies
    if setting == "best":
        paths = [selected["path"]] if selected else paths[-1:]
    for path in map(Path, paths if setting != "none" else ()):
        if not path.is_absolute():
            run.tracker.policy(path.parts[0], run.folder / path)


def summarize(
    player: Player, records: Sequence[IterationRecord], selection: Selection | None, command: str
) -> dict[str, Any]:
    """Return the content of game.json: the game's settings, measures, samples and costs."""
    config, data = player.run.config, player.run.data
    evaluations = [player.result(record.evaluation) for record in records if record.evaluation]
    validations = [player.result(record.validation) for record in records if record.validation]
    seconds: dict[str, float] = defaultdict(float)
    for stage, artifact in player.artifacts.items():
        seconds[stage.name] += artifact.manifest["seconds"]
    peaks = [artifact.manifest["facts"]["peak_memory_gib"] for artifact in player.artifacts.values()]
    return {
        "command": command,
        "name": config.name,
        "model": config.model.path or config.model.package,
        "data": {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "validation": len(data.validation),
            "counts": data.counts,
            "dropped": {reason: printable(text) for reason, text in data.dropped.items() if reason in data.counts},
        },
        "iterations": [_iteration(player, record) for record in records if record.iteration is not None],
        "selected": asdict(selection) if selection else None,
        "evaluations": [{"policy": e.label, "iter": e.iteration, **e.measures} for e in evaluations],
        "validations": [{"policy": e.label, "iter": e.iteration, **e.measures} for e in validations],
        "differences": _differences(evaluations, selection, config),
        "external": _external(player, records),
        "given_up": player.given_up,
        "samples": _samples(evaluations, config.evaluation.samples),
        "seconds": {name: round(total, 1) for name, total in seconds.items()},
        "peak_memory_gib": round(max(peaks, default=0.0), 2),
    }


def _iteration(player: Player, record: IterationRecord) -> dict:
    config, t, score = player.run.config, record.iteration, record.scores["opponent"]
    assert t is not None and record.opponent and isinstance(record.train, Train)
    return {
        "iter": t,
        "beta": None if config.loss.beta is None else value_at_iteration(config.loss.beta, t),
        "objective": record.train.objective(player.run).settings,
        "lr": value_at_iteration(config.optimizer.lr, t),
        "pairs": len(player.result(score).pairs),
        "dropped": player.artifacts[score].manifest["facts"]["dropped"],
        "policy": f"iter{t}/policy",
        "opponent": record.opponent.label,
    }


def _external(player: Player, records: Sequence[IterationRecord]) -> list[dict]:
    """Return the results of benchmarks and judges for each policy that has external stages."""
    has_sft = any(record.iteration is None and record.train for record in records)
    rows = []
    for record in records:
        if not record.external:
            continue
        results: dict[str, list] = defaultdict(list)
        for stage in record.external:
            if stage in player.artifacts:
                results[stage.name].append(player.result(stage))
        label = record.policy.label
        row = {
            "policy": label,
            "iter": record.iteration,
            "harness": results["harness"] or None,
            "mt_bench": results["mt_bench"][0]["score"] if results["mt_bench"] else None,
            "comparison": results["compare"][0] if results["compare"] else None,
            # The start of a game without an SFT stage corresponds to the SFT model of the paper.
            "paper": PAPER.get("sft" if label == "start" and not has_sft else label),
        }
        rows.append(row)
    return rows


def _differences(evaluations: Sequence[Evaluation], selection: Selection | None, config: Config) -> list[dict]:
    """Return comparisons of the selected (or else the last) policy with the start of self-play, and of the last policy
    with the selected (or else the first) one; with stage=evaluate, of the two measured policies."""
    played = [e for e in evaluations if e.iteration is not None]
    before = [e for e in evaluations if e.iteration is None]
    result = [e for e in played if selection and e.label == selection.policy] or played[-1:]
    compared = [(before[-1], *result)] if played and before else []
    first = result if selection and result != played[-1:] else played[:1]
    compared += [(*first, played[-1])] if len(played) > 1 and first != played[-1:] else []
    compared += [(before[0], before[1])] if config.stage == "evaluate" and len(before) > 1 else []
    return [
        {
            "policy": last.label,
            "against": first.label,
            "n": len(last.held_out.pairs),
            "measures": differences(last.held_out, first.held_out, config.evaluation.bootstrap, config.seed),
        }
        for first, last in compared
    ]


def sample_sets(player: Player, records: Sequence[IterationRecord]) -> list[dict]:
    """Return the samples of report.html: held-out answers of all policies, and training pairs by iteration."""
    policies: list[tuple[str, HeldOut, HeldOut | None]] = []
    pairs = []
    for record in records:
        if record.evaluation:
            opponent = record.evaluation.opponent
            before = player.result(opponent).held_out if opponent else None
            policies.append((record.policy.label, player.result(record.evaluation).held_out, before))
        if record.opponent:
            scores = player.result(record.scores["opponent"])
            held_out = HeldOut(scores.pairs, {name: values.numpy() for name, values in scores.logps.items()})
            sets = [(record.opponent.label, held_out, None)]
            pairs.append(sample_set(f"Training pairs of iteration {record.iteration}", sets))
    return [*([sample_set("Held-out prompts", policies)] if policies else []), *pairs]


def _samples(evaluations: Sequence[Evaluation], count: int) -> list[dict]:
    """Return the first held-out prompts with the human answer and the answers of all policies."""
    samples = []
    for i, pair in enumerate(evaluations[0].held_out.pairs[:count] if evaluations else ()):
        answers = {e.label: e.held_out.pairs[i].generated for e in evaluations}
        samples.append({"prompt": pair.prompt, "real": pair.real, "answers": answers})
    return samples
