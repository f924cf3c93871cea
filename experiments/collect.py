"""Collect and plot the studies: `python -m experiments.collect links`, or without a name all of them.

Reads the run folders of a study in outputs/studies/<study>/, measures their policies exactly (chains.py) and writes
experiments/<study>/results.csv. Then writes figure.png and prints the table of effects, both from results.csv alone.
Without run folders only the second step is done, so published figures and tables can be reproduced from committed files.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure

from experiments import chains
from experiments.derivation import shares
from experiments.language_model import arms
from experiments.studies import STUDIES, Study
from experiments.tables import COLOURS, MARKERS, RUNS, Row, Where, mean_interval, plain, read, select, write
from spin.models.policy import content_id
from spin.reporting.figures import STYLE

HERE = Path(__file__).parent
MEASURES = {  # column: title of its panel, unit
    "kl": ("distance to the data: KL(human || model)", "change, nats per answer"),
    "right": ("right answers", "change, share of model answers"),
}


# --- from run folders to results.csv ----------------------------------------------------------------------------------


def collect(study: str) -> list[Row]:
    """Return one row for every policy of the study's runs, including the measures of the policy that its run started from."""
    cache = RUNS / "measured.json"
    measures_by_id = json.loads(cache.read_text()) if cache.exists() else {}

    def measured(policy: Path) -> dict[str, float]:
        identity = content_id(policy)
        if identity not in measures_by_id:
            measures_by_id[identity] = chains.measure(policy)
            cache.write_text(json.dumps(measures_by_id))
        return measures_by_id[identity]

    rows = []
    for page in sorted((RUNS / study).glob("*/*/game.json")):
        folder = page.parent
        config = yaml.safe_load((folder / "config.yaml").read_text())
        model = Path(config["model"]["path"])
        continued = model.is_dir() and config["schedule"]["sft_epochs"] > 0
        start = measured(model if model.is_dir() else folder / "sft" / "policy")
        common = {"part": folder.parent.name, "seed": config["seed"], "start_epochs": _start_epochs(config)}
        if continued:  # a control: its result is the SFT policy, and the iteration after it is not used
            passes, lr = config["schedule"]["sft_epochs"], config["schedule"]["sft_lr"]
            policies = [
                {"method": "sft", "policy": "sft", "passes": passes, "lr": lr} | measured(folder / "sft" / "policy")
            ]
        else:
            policies = [
                _played(config, folder, t) | measured(folder / f"iter{t}" / "policy") for t in range(_count(folder))
            ]
        shared = {"size": config["data"]["size"]}
        rows += [common | shared | row | {f"{name}_start": start[name] for name in start} for row in policies]
    if not rows:
        raise SystemExit(f"{RUNS / study}: no finished run; use the commands in experiments/{study}/README.md.")
    return rows


def _count(folder: Path) -> int:
    return len(list(folder.glob("iter*/policy")))


def _start_epochs(config: dict) -> int:
    """Return the SFT epochs of the start: those of this run, or from the name of the start's folder, <seed>-<epochs>."""
    path = Path(config["model"]["path"])
    return int(path.parts[-3].split("-")[1] if path.is_dir() else config["schedule"]["sft_epochs"])


def _played(config: dict, folder: Path, t: int) -> Row:
    """Return the settings of iteration t and the last metrics of its training."""

    def at(value: Any, k: int = t) -> float:
        return float(value[k] if isinstance(value, list) else value)

    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in steps if row.get("stage") == "train" and row.get("iter") == t][-1]
    game = json.loads((folder / "game.json").read_text())["iterations"][t]
    generation = config["generation"]
    return {
        "method": "spin",
        "policy": f"iter{t}",
        "iter": t,
        "passes": sum(at(config["schedule"]["epochs"], k) for k in range(t + 1)),
        "epochs": at(config["schedule"]["epochs"]),
        "lr": at(config["optimizer"]["lr"]),
        "objective": _objective(config["loss"]),
        "beta": at(config["loss"]["beta"]) if config["loss"]["beta"] is not None else None,
        "link": config["loss"]["link"],
        "reference": config["loss"]["reference"],
        "answers": generation["answers"] if "answers" in generation else generation["num_answers"],
        "replay": config["schedule"]["replay"],
        "temperature": config["generation"]["temperature"],
        "pairs": game["pairs"],
        "dropped": sum(game["dropped"].values()),
        "loss": last["loss"],
    }


def _objective(loss: dict) -> str:
    """Return a short name of the objective, for example "spin 0.1 sft 0.5" or "space"."""
    if loss.get("objective") == "space":
        words = ["space"]
    else:
        words = ["none" if loss["reference"] == "none" else "spin", f"{loss['beta']}".replace(".0", "")]
    for key, name in (("sft_weight", "sft"), ("real_floor", "floor"), ("history_weight", "history")):
        words += [name, f"{loss[key]:g}"] if loss.get(key) else []
    return " ".join(words)


# --- statistics -------------------------------------------------------------------------------------------------------


def by_seed(rows: Sequence[Row], where: Where, measure: str, tuned: str | None = None) -> dict[float, float]:
    """Return the change of `measure` from the start for each seed. `tuned` is as in `Effect`; the lowest KL is best."""
    chosen = select(rows, where)
    changes: dict[float, float] = {}
    for seed in sorted({row["seed"] for row in chosen}):
        seed_rows = [row for row in chosen if row["seed"] == seed]
        if tuned:
            kl_changes: dict[Any, list[float]] = {}  # of the other seeds, by value of the tuned column
            for row in chosen:
                if row["seed"] != seed:
                    kl_changes.setdefault(row[tuned], []).append(row["kl"] - row["kl_start"])
            best = min(kl_changes, key=lambda value: float(np.mean(kl_changes[value])))
            seed_rows = [row for row in seed_rows if row[tuned] == best]
        if len(seed_rows) != 1:
            raise ValueError(f"{where}, seed {seed:g}: {len(seed_rows)} policies, not one")
        changes[seed] = seed_rows[0][measure] - seed_rows[0][f"{measure}_start"]
    return changes


def effects(study: str, rows: Sequence[Row]) -> list[tuple[str, dict[str, tuple[float, float, int]]]]:
    """Return each effect's text and, by measure, the mean over seeds, half the 95 % interval, and the number of seeds."""
    results = []
    for effect in STUDIES[study].effects:
        values = {}
        for measure in MEASURES:
            a = by_seed(rows, effect.a, measure, effect.tuned)
            b = by_seed(rows, effect.b, measure, effect.tuned) if effect.b else dict.fromkeys(a, 0.0)
            seeds = sorted(a.keys() & b.keys())
            values[measure] = (*mean_interval([a[seed] - b[seed] for seed in seeds]), len(seeds))
        results.append((effect.text, values))
    return results


def table(study: str, rows: Sequence[Row]) -> str:
    """Return the study's effects as a Markdown table. Bold: the 95 % interval excludes 0."""
    lines = ["| difference | KL, nats per answer | right answers | seeds |", "|---|---|---|---|"]
    for text, values in effects(study, rows):
        cells = [shown(*values[measure][:2]) for measure in MEASURES]
        lines.append(f"| {text} | {' | '.join(cells)} | {values['kl'][2]} |")
    return "\n".join(lines)


def shown(mean: float, half: float) -> str:
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(study: str, rows: Sequence[Row]) -> Figure:
    """Plot the change from the start against the study's x: mean over seeds and 95 % interval, a row of panels per measure."""
    layout = STUDIES[study]
    rows = select(rows, layout.where)
    facets: dict[Any, str] = layout.facets or {None: ""}
    several = len(facets) > 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.0 if several else 2.9), layout="constrained")
        shape = (len(MEASURES), len(facets)) if several else (1, len(MEASURES))
        axes = figure.subplots(*shape, squeeze=False, sharey="row" if several else False)
        panels = [(measure, facet) for measure in MEASURES for facet in facets]
        for axis, (measure, facet) in zip(axes.flat, panels, strict=True):
            title, unit = MEASURES[measure]
            first = facet == next(iter(facets))
            _lines(axis, layout, select(rows, {layout.facet: facet}) if layout.facet else rows, measure)
            axis.set_title("\n".join([title if first else "", facets[facet]] if several else [title]), loc="left")
            axis.set_xlabel(layout.label)
            if measure in layout.limits:
                axis.set_ylim(layout.limits[measure])
            if first:
                axis.set_ylabel(unit)
        handles, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return figure


def _lines(axis: Any, layout: Study, rows: Sequence[Row], measure: str) -> None:
    """Plot one line per series, with small horizontal offsets that keep all error bars visible."""
    axis.axhline(0, color="#333333", linewidth=0.8)
    ticks = sorted({row[layout.x] for row in rows})
    for i, (key, name) in enumerate(layout.names.items()):
        series = select(rows, {layout.series: key})
        x = [tick for tick in ticks if select(series, {layout.x: tick})]
        changes = [[row[measure] - row[f"{measure}_start"] for row in select(series, {layout.x: tick})] for tick in x]
        offset = i - (len(layout.names) - 1) / 2
        shifted = [tick * 1.05**offset if layout.log else tick + 0.015 * offset * (ticks[-1] - ticks[0]) for tick in x]
        mean, half = zip(*map(mean_interval, changes), strict=True)
        style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "capsize": 2, "linewidth": 1.2}
        axis.errorbar(shifted, mean, half, label=name, **style)
    if layout.log:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(ticks, [plain(tick) for tick in ticks])


# --- the command ------------------------------------------------------------------------------------------------------


def main(names: Sequence[str]) -> None:
    special = {"derivation": shares.redraw, "language_model": arms.redraw}  # studies with their own rows and figures
    studies = [*STUDIES, *special]
    if unknown := set(names) - set(studies):
        raise SystemExit(f"no such study: {', '.join(sorted(unknown))}. The studies are {', '.join(studies)}.")
    for study in names or studies:
        if study in special:
            special[study]()
            continue
        folder = HERE / study
        if (RUNS / study).exists():
            write(collect(study), folder / "results.csv")
        if not (folder / "results.csv").exists():
            print(f"{study}: not run; use the commands in experiments/{study}/README.md.\n")
            continue
        rows = read(folder / "results.csv")
        draw(study, rows).savefig(folder / "figure.png", dpi=150)
        print(f"{study}\n\n{table(study, rows)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
