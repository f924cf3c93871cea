"""Collect and draw the studies: `python -m experiments.collect links`, or no name for all.

Reads the run folders that a study's commands left in outputs/studies/<study>/, measures their policies exactly
(chains.py) and writes experiments/<study>/results.csv; then, from results.csv alone, figure.png and the table of effects,
which it also prints. Without run folders only the latter: what is published can be drawn again from what is committed.
"""

import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure

from spin.reporting.figures import STYLE

HERE = Path(__file__).parent
RUNS = Path("outputs/studies")
# Okabe and Ito's colours, each with a marker of its own: told apart with any colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
MEASURES = {  # column: title of its panel, unit
    "kl": ("distance to the data: KL(human || own)", "change, nats an answer"),
    "right": ("right answers", "change, share of own answers"),
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, two-sided, by seeds

Row = dict[str, Any]
Where = dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """A difference between two kinds of policies, seed by seed. `b` None: against the start of self-play.

    `tuned` names a column (the learning rate) that is left open in `a` and `b` and chosen for each: for every seed the
    value that was best in the mean of the other seeds, so that no policy is chosen by its own result.
    """

    text: str
    a: Where
    b: Where | None = None
    tuned: str | None = None


@dataclass(frozen=True)
class Study:
    """How a study's rows are drawn, a panel a measure: mean over seeds of the change from the start against `x`."""

    x: str
    label: str
    series: str
    names: dict[Any, str]
    effects: tuple[Effect, ...]
    facet: str | None = None
    facets: dict[Any, str] = field(default_factory=dict)
    where: Where = field(default_factory=dict)
    log: bool = False
    limits: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # by measure, where one point would flatten all others


# --- what the studies compare ---------------------------------------------------------------------------------------


def plain(number: float) -> str:
    """3e-5, 0.1, 512: as people write settings."""
    return f"{number:.0e}".replace("e-0", "e-") if 0 < number < 1e-2 else f"{number:g}"


STARTS = {8: "SFT too short (8 epochs)", 16: "SFT at its best (16)", 32: "SFT too long (32)"}
METHODS = {"spin": "SPIN, 2 iterations of 2 passes", "sft": "continued SFT, 4 passes"}

STUDIES: dict[str, Study] = {
    "continued_sft": Study(
        x="lr",
        label="learning rate",
        log=True,
        series="method",
        names=METHODS,
        facet="start_epochs",
        facets=STARTS,
        where={"passes": 4},
        limits={"kl": (-0.55, 0.45), "right": (-0.15, 0.15)},
        effects=tuple(
            Effect(
                f"{name}; {rate}: {text}",
                {"method": a, "start_epochs": start, **at},
                {"method": b, "start_epochs": start, **at} if b else None,
                tuned,
            )
            for start, name in STARTS.items()
            for rate, tuned, at in (
                ("tuned lr", "lr", {"passes": 4}),
                ("lr 1e-5", None, {"passes": 4, "lr": 1e-5}),
                ("lr 3e-5", None, {"passes": 4, "lr": 3e-5}),
            )
            for text, a, b in (
                ("SPIN − start", "spin", None),
                ("continued SFT − start", "sft", None),
                ("SPIN − continued SFT", "spin", "sft"),
            )
        ),
    ),
    "iterations": Study(
        x="passes",
        label="passes over the prompts",
        series="part",
        names={"iterations": "a new opponent every 2 passes", "epochs": "the first opponent throughout"},
        effects=(
            Effect("iteration 0 − start", {"part": "iterations", "iter": 0}),
            *(
                Effect(
                    f"iteration {t} − iteration {t - 1}",
                    {"part": "iterations", "iter": t},
                    {"part": "iterations", "iter": t - 1},
                )
                for t in (1, 2, 3)
            ),
            *(
                Effect(
                    f"iterations 0 to {t} − {2 * t + 2} passes in iteration 0",
                    {"part": "iterations", "iter": t},
                    {"part": "epochs", "passes": 2 * t + 2},
                )
                for t in (1, 3)
            ),
        ),
    ),
    "data_size": Study(
        x="size",
        label="prompts (the start was fine-tuned on 512)",
        log=True,
        series="method",
        names={"spin": "SPIN, iteration 0", "sft": "continued SFT, as many passes"},
        effects=(
            *(
                Effect(f"SPIN on {size} prompts − start", {"method": "spin", "size": size})
                for size in (128, 256, 512, 2048)
            ),
            Effect("SPIN: 2048 − 128 prompts", {"method": "spin", "size": 2048}, {"method": "spin", "size": 128}),
            Effect(
                "2048 prompts: SPIN − continued SFT", {"method": "spin", "size": 2048}, {"method": "sft", "size": 2048}
            ),
        ),
    ),
    "links": Study(
        x="iter",
        label="iteration",
        series="link",
        names={link: link for link in ("logistic", "hinge", "exponential", "correlation")},
        facet="lr",
        facets={3e-5: "lr 3e-5", 1e-4: "lr 1e-4"},
        effects=tuple(
            Effect(
                f"lr {plain(lr)}: {link} − logistic",
                {"lr": lr, "iter": 1, "link": link},
                {"lr": lr, "iter": 1, "link": "logistic"},
            )
            for lr in (3e-5, 1e-4)
            for link in ("hinge", "exponential", "correlation")
        ),
    ),
    "beta_lr": Study(
        x="lr",
        label="learning rate",
        log=True,
        series="beta",
        names={0.1: "β = 0.1", 1.0: "β = 1", 5.0: "β = 5"},
        facet="iter",
        facets={0: "iteration 0", 1: "iteration 1"},
        effects=tuple(
            Effect(f"lr {plain(lr)}, iteration 1: β {beta:g} − start", {"lr": lr, "beta": beta, "iter": 1})
            for lr in (1e-5, 3e-5, 1e-4)
            for beta in (0.1, 1.0, 5.0)
        ),
    ),
    "last_beta": Study(
        x="beta",
        label="β of the last iteration",
        log=True,
        series="lr",
        names={3e-5: "learning rate as before (3e-5)", 6e-6: "a fifth of it (6e-6)"},
        where={"iter": 3},
        effects=(
            *(
                Effect(
                    f"lr {plain(lr)} in the last iteration: β {beta:g} − β 0.1",
                    {"iter": 3, "lr": lr, "beta": beta},
                    {"iter": 3, "lr": lr, "beta": 0.1},
                )
                for lr in (3e-5, 6e-6)
                for beta in (1.0, 5.0)
            ),
            Effect(
                "β 5: lr 6e-6 − lr 3e-5", {"iter": 3, "lr": 6e-6, "beta": 5.0}, {"iter": 3, "lr": 3e-5, "beta": 5.0}
            ),
            Effect(
                "β 0.1: lr 6e-6 − lr 3e-5", {"iter": 3, "lr": 6e-6, "beta": 0.1}, {"iter": 3, "lr": 3e-5, "beta": 0.1}
            ),
        ),
    ),
    "replay": Study(
        x="iter",
        label="iteration",
        series="replay",
        names={replay: replay for replay in ("none", "previous", "all")},
        effects=tuple(
            Effect(f"iteration 2: {replay} − none", {"iter": 2, "replay": replay}, {"iter": 2, "replay": "none"})
            for replay in ("previous", "all")
        ),
    ),
    "greedy": Study(
        x="iter",
        label="iteration",
        series="temperature",
        names={1.0: "sampled (temperature 1)", 0.0: "greedy"},
        effects=(
            *(
                Effect(
                    f"iteration {t}: greedy − sampled", {"iter": t, "temperature": 0.0}, {"iter": t, "temperature": 1.0}
                )
                for t in range(3)
            ),
            Effect("greedy, iteration 2 − start", {"iter": 2, "temperature": 0.0}),
            Effect("sampled, iteration 2 − start", {"iter": 2, "temperature": 1.0}),
        ),
    ),
    "reference": Study(
        x="iter",
        label="iteration",
        series="reference",
        names={"opponent": "the opponent", "mixture": "mixture, alpha 0.5", "start": "the start"},
        effects=tuple(
            Effect(
                f"iteration {t}: {reference} − opponent",
                {"iter": t, "reference": reference},
                {"iter": t, "reference": "opponent"},
            )
            for t in (1, 2)
            for reference in ("mixture", "start")
        ),
    ),
    "answers": Study(
        x="iter",
        label="iteration",
        series="answers",
        names={1: "one answer a prompt", 4: "four"},
        effects=(
            *(
                Effect(f"iteration {t}: four − one", {"iter": t, "answers": 4}, {"iter": t, "answers": 1})
                for t in (0, 1)
            ),
            Effect("four answers, iteration 1 − start", {"iter": 1, "answers": 4}),
        ),
    ),
}


# --- from run folders to results.csv ----------------------------------------------------------------------------------


def collect(study: str) -> list[Row]:
    """One row for every policy that the study's runs made, and the measures of the policy that each run started from."""
    from spin.models.policy import content_id

    kept = RUNS / "measured.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}

    def measured(policy: Path) -> dict[str, float]:
        from experiments.chains import measure

        identity = content_id(policy)
        if identity not in known:
            known[identity] = measure(policy)
            kept.write_text(json.dumps(known))
        return known[identity]

    rows = []
    for page in sorted((RUNS / study).glob("*/*/game.json")):
        folder = page.parent
        config = yaml.safe_load((folder / "config.yaml").read_text())
        begun = Path(config["model"]["path"])
        continued = begun.is_dir() and config["schedule"]["sft_epochs"] > 0
        start = measured(begun if begun.is_dir() else folder / "sft" / "policy")
        common = {"part": folder.parent.name, "seed": config["seed"], "start_epochs": _start_epochs(config)}
        if continued:  # a control: its product is the SFT policy, and the iteration behind it is of no interest
            passes, lr = config["schedule"]["sft_epochs"], config["schedule"]["sft_lr"]
            found = [
                {"method": "sft", "policy": "sft", "passes": passes, "lr": lr} | measured(folder / "sft" / "policy")
            ]
        else:
            found = [
                _played(config, folder, t) | measured(folder / f"iter{t}" / "policy") for t in range(_count(folder))
            ]
        shared = {"size": config["data"]["size"]}
        rows += [common | shared | row | {f"{name}_start": start[name] for name in start} for row in found]
    if not rows:
        raise SystemExit(f"{RUNS / study}: no finished run. The commands are in experiments/{study}/README.md.")
    return rows


def _count(folder: Path) -> int:
    return len(list(folder.glob("iter*/policy")))


def _start_epochs(config: dict) -> int:
    """Epochs of the SFT stage that made the start: this run's, or by the name of the start's folder, <seed>-<epochs>."""
    path = Path(config["model"]["path"])
    return int(path.parts[-3].split("-")[1] if path.is_dir() else config["schedule"]["sft_epochs"])


def _played(config: dict, folder: Path, t: int) -> Row:
    """The settings of iteration t, and what its training ended with."""

    def at(value: Any, k: int = t) -> float:
        return float(value[k] if isinstance(value, list) else value)

    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in steps if row.get("stage") == "train" and row.get("iter") == t][-1]
    game = json.loads((folder / "game.json").read_text())["iterations"][t]
    return {
        "method": "spin",
        "policy": f"iter{t}",
        "iter": t,
        "passes": sum(at(config["schedule"]["epochs"], k) for k in range(t + 1)),
        "epochs": at(config["schedule"]["epochs"]),
        "lr": at(config["optimizer"]["lr"]),
        "beta": at(config["loss"]["beta"]),
        "link": config["loss"]["link"],
        "reference": config["loss"]["reference"],
        "answers": config["generation"]["num_answers"],
        "replay": config["schedule"]["replay"],
        "temperature": config["generation"]["temperature"],
        "pairs": game["pairs"],
        "dropped": sum(game["dropped"].values()),
        "loss": last["loss"],
    }


def write(rows: Sequence[Row], path: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def read(path: Path) -> list[Row]:
    """The rows of a results.csv: numbers as numbers, what is empty as None."""

    def value(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


# --- statistics -------------------------------------------------------------------------------------------------------


def select(rows: Sequence[Row], where: Where) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % interval by Student's t. NaN width for a single seed."""
    n = len(values)
    half = T95[n] * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), half


def by_seed(rows: Sequence[Row], where: Where, measure: str, tuned: str | None = None) -> dict[float, float]:
    """The change of `measure` from the start, for each seed. `tuned` as in `Effect`, by the least KL."""
    chosen = select(rows, where)
    found: dict[float, float] = {}
    for seed in sorted({row["seed"] for row in chosen}):
        mine = [row for row in chosen if row["seed"] == seed]
        if tuned:
            others: dict[Any, list[float]] = {}
            for row in chosen:
                if row["seed"] != seed:
                    others.setdefault(row[tuned], []).append(row["kl"] - row["kl_start"])
            best = min(others, key=lambda value: float(np.mean(others[value])))
            mine = [row for row in mine if row[tuned] == best]
        if len(mine) != 1:
            raise ValueError(f"{where}, seed {seed:g}: {len(mine)} policies, not one")
        found[seed] = mine[0][measure] - mine[0][f"{measure}_start"]
    return found


def effects(study: str, rows: Sequence[Row]) -> list[tuple[str, dict[str, tuple[float, float, int]]]]:
    """For each effect of the study its text and by measure the mean over seeds, half its 95 % interval, and the seeds."""
    found = []
    for effect in STUDIES[study].effects:
        values = {}
        for measure in MEASURES:
            a = by_seed(rows, effect.a, measure, effect.tuned)
            b = by_seed(rows, effect.b, measure, effect.tuned) if effect.b else dict.fromkeys(a, 0.0)
            seeds = sorted(a.keys() & b.keys())
            values[measure] = (*mean_interval([a[seed] - b[seed] for seed in seeds]), len(seeds))
        found.append((effect.text, values))
    return found


def table(study: str, rows: Sequence[Row]) -> str:
    """The study's effects as a Markdown table. Bold: the 95 % interval leaves 0 out."""
    lines = ["| difference | KL, nats an answer | right answers | seeds |", "|---|---|---|---|"]
    for text, values in effects(study, rows):
        cells = [shown(*values[measure][:2]) for measure in MEASURES]
        lines.append(f"| {text} | {' | '.join(cells)} | {values['kl'][2]} |")
    return "\n".join(lines)


def shown(mean: float, half: float) -> str:
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(study: str, rows: Sequence[Row]) -> Figure:
    """Change from the start against the study's x, mean over seeds with its 95 % interval; a row of panels a measure."""
    how = STUDIES[study]
    rows = select(rows, how.where)
    facets: dict[Any, str] = how.facets or {None: ""}
    several = len(facets) > 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.0 if several else 2.9), layout="constrained")
        shape = (len(MEASURES), len(facets)) if several else (1, len(MEASURES))
        axes = figure.subplots(*shape, squeeze=False, sharey="row" if several else False)
        panels = [(measure, facet) for measure in MEASURES for facet in facets]
        for axis, (measure, facet) in zip(axes.flat, panels, strict=True):
            title, unit = MEASURES[measure]
            first = facet == next(iter(facets))
            _lines(axis, how, select(rows, {how.facet: facet}) if how.facet else rows, measure)
            axis.set_title("\n".join([title if first else "", facets[facet]] if several else [title]), loc="left")
            axis.set_xlabel(how.label)
            if measure in how.limits:
                axis.set_ylim(how.limits[measure])
            if first:
                axis.set_ylabel(unit)
        handles, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return figure


def _lines(axis: Any, how: Study, rows: Sequence[Row], measure: str) -> None:
    """One line a series; each a little aside of the others, so that all error bars are seen."""
    axis.axhline(0, color="#333333", linewidth=0.8)
    ticks = sorted({row[how.x] for row in rows})
    for i, (key, name) in enumerate(how.names.items()):
        inside = select(rows, {how.series: key})
        x = [tick for tick in ticks if select(inside, {how.x: tick})]
        changes = [[row[measure] - row[f"{measure}_start"] for row in select(inside, {how.x: tick})] for tick in x]
        aside = i - (len(how.names) - 1) / 2
        moved = [tick * 1.05**aside if how.log else tick + 0.015 * aside * (ticks[-1] - ticks[0]) for tick in x]
        mean, half = zip(*map(mean_interval, changes), strict=True)
        style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "capsize": 2, "linewidth": 1.2}
        axis.errorbar(moved, mean, half, label=name, **style)
    if how.log:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(ticks, [plain(tick) for tick in ticks])


# --- the command ------------------------------------------------------------------------------------------------------


def main(names: Sequence[str]) -> None:
    known = [*STUDIES, "derivation"]
    if unknown := set(names) - set(known):
        raise SystemExit(f"no such study: {', '.join(sorted(unknown))}. There are: {', '.join(known)}.")
    for study in names or known:
        if study == "derivation":  # of another kind: no policies against a start
            from experiments.derivation import shares

            shares.redraw()
            continue
        folder = HERE / study
        if (RUNS / study).exists():
            write(collect(study), folder / "results.csv")
        if not (folder / "results.csv").exists():
            print(f"{study}: not run. The commands are in experiments/{study}/README.md.\n")
            continue
        rows = read(folder / "results.csv")
        draw(study, rows).savefig(folder / "figure.png", dpi=150)
        print(f"{study}\n\n{table(study, rows)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
