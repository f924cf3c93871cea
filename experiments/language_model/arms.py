"""Collect the study on a real language model: how similar each objective makes answers to the human ones, and at what cost.

    bash experiments/language_model/play.sh        # about an hour; finished stages are reused
    python -m experiments.collect language_model   # writes results.csv, effects.csv and figure.png, prints the tables

Every arm of a seed starts from the same SFT policy and takes the same number of steps. Its learning rate is chosen on the
validation prompts of seed 0; the comparison uses the held-out prompts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure

from experiments.tables import COLOURS, MARKERS, RUNS, Row, Where, mean_interval, read, select, write
from spin.evaluation.measure_table import MEASURES
from spin.evaluation.measures import HeldOut, held_out_of, statistics
from spin.method.pairs import read_pairs
from spin.reporting.figures import STYLE
from spin.runtime.store import STAGES

HERE = Path(__file__).parent
FOLDER = RUNS / "language_model"
ARMS = {
    "sft": "continued SFT",
    "spin": "SPIN",
    "anchor": "SPIN, SFT anchor 0.5",
    "space": "SPACE",
    "tspin": "T-SPIN",
}
COMPARED = ("classifier_auc", "human_likelier", "mauve", "nll_per_token", "rouge_l", "length_auc")
RESAMPLES = 1000
LAST = 1  # the last iteration of an arm


def arm_of(config: dict) -> str:
    """Return the key in ARMS of a run, from its config.yaml."""
    loss = config["loss"]
    if config["schedule"]["iterations"] == 0:
        return "sft"
    if loss["objective"] == "space":
        return "space"
    if loss["reference"] == "none":
        return "tspin"
    return "anchor" if loss["sft_weight"] else "spin"


# --- from run folders to results.csv and effects.csv ------------------------------------------------------------------


def collect() -> tuple[list[Row], dict[tuple, HeldOut]]:
    """Return a row of measures for every policy of the arms, and the held-out answers by (arm, seed, lr, iteration)."""
    rows, held_out = [], {}
    for page in sorted(FOLDER.glob("*/*/game.json")):
        folder = page.parent
        config, game = yaml.safe_load((folder / "config.yaml").read_text()), json.loads(page.read_text())
        arm, seed = arm_of(config), config["seed"]
        is_start = arm == "sft" and folder.parent.name == "start"
        lr = config["schedule"]["sft_lr"] if arm == "sft" else config["optimizer"]["lr"]
        stored = stored_evaluations(folder, game["evaluations"])
        for number, evaluation in enumerate(game["evaluations"]):
            t, policy = evaluation["iter"], evaluation["policy"]
            if is_start and policy == "sft":
                key = ("start", seed, config["schedule"]["sft_epochs"], 0)
            elif arm == "sft" and policy == "sft" and not is_start:
                key = (arm, seed, lr, LAST)
            elif t is not None:
                key = (arm, seed, lr, t)
            else:
                continue
            validation = game["validations"][number]
            measured = {f"validation_{name}": validation[name] for name in COMPARED}
            measured |= {name: evaluation[name] for name in COMPARED}
            rows.append(dict(zip(("arm", "seed", "lr", "iter"), key, strict=True)) | measured)
            held_out[key] = stored[number]
    if not rows:
        raise SystemExit(f"{FOLDER}: no finished run; use the commands in experiments/language_model/play.sh.")
    return rows, held_out


def stored_evaluations(folder: Path, evaluations: Sequence[dict]) -> list[HeldOut]:
    """Return the held-out answers of the `evaluations` in a run's game.json."""
    stages = json.loads((folder / STAGES).read_text())
    artifacts = [folder / stages["store"] / stage for stage in stages["stages"] if stage.startswith("evaluate/")]
    stored = [json.loads((artifact / "evaluation.json").read_text()) for artifact in artifacts]
    held_out = []
    for evaluation in evaluations:
        number = next(i for i, record in enumerate(stored) if record["measures"].items() <= evaluation.items())
        pairs, _ = read_pairs(artifacts[number] / "held_out.parquet")
        held_out.append(held_out_of(pairs, stored[number]["per_prompt"]))
    return held_out


def chosen_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Return the learning rate of each arm: that of the seed 0 policy that the classifier distinguishes least from human
    answers on the validation prompts, among the policies of the first iteration that was played."""
    rates = {}
    for arm in ARMS:
        tried = [row for row in rows if row["arm"] == arm and row["seed"] == 0]
        first = min((row["iter"] for row in tried), default=0)
        tried = [row for row in tried if row["iter"] == first]
        if tried:
            badness = MEASURES["classifier_auc"].badness
            rates[arm] = min(tried, key=lambda row: badness(row["validation_classifier_auc"]))["lr"]
    return rates


def chosen_epochs(rows: Sequence[Row]) -> float:
    """Return the epochs of SFT with the lowest validation NLL of seed 0, which define the start of every arm."""
    tried = [row for row in rows if row["arm"] == "start" and row["seed"] == 0]
    return min(tried, key=lambda row: row["validation_nll_per_token"])["lr"]


def effects(rows: Sequence[Row], held_out: dict[tuple, HeldOut]) -> list[Row]:
    """Return the differences of each arm, at its chosen rate, from the start and from continued SFT.

    One row per arm, seed, iteration, base and measure.
    """
    rates, epochs, changes = chosen_rates(rows), chosen_epochs(rows), []
    for arm, seed, lr, t in held_out:
        if rates.get(arm) == lr:
            bases = {"start": ("start", seed, epochs, 0)}
            if t == LAST and arm != "sft":
                bases["sft"] = ("sft", seed, rates.get("sft"), LAST)
            for against, base in bases.items():
                if base in held_out:
                    labels = {"arm": arm, "lr": lr, "seed": seed, "iter": t, "against": against}
                    pair = held_out[arm, seed, lr, t], held_out[base]
                    changes += [labels | row for row in differences(*pair)]
    return changes


def differences(a: HeldOut, b: HeldOut) -> list[Row]:
    """Return a - b on the same prompts and its bootstrap standard error over prompts, for each measure.

    For measures with an ideal value, the distances from it are compared, so that lower is better.
    """
    rng, n = np.random.default_rng(0), len(a.pairs)
    draws = [np.arange(n), *rng.integers(0, n, size=(RESAMPLES, n))]
    rows = []
    for name in COMPARED:
        of_a, of_b, ideal = statistics(a, None)[name], statistics(b, None)[name], MEASURES[name].ideal
        values = np.array([[of_a(draw), of_b(draw)] for draw in draws])
        change, *resampled = (values if ideal is None else abs(values - ideal)) @ [1.0, -1.0]
        rows.append({"measure": name, "change": float(change), "error": float(np.std(resampled))})
    return rows


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return the `new` rows, and the `old` rows of all other seeds."""
    new_seeds = {row["seed"] for row in new}
    return [*(row for row in old if row["seed"] not in new_seeds), *new]


# --- the table and the figure -----------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row], where: Where) -> tuple[float, float, float, int] | None:
    """Return the mean change of the rows `where`, half its 95 % intervals over prompts and seeds, and the number of rows."""
    selected = select(rows, where)
    if not selected:
        return None
    mean, half = mean_interval([row["change"] for row in selected])
    prompts = 1.96 * float(np.sqrt(sum(row["error"] ** 2 for row in selected))) / len(selected)
    return mean, prompts, half, len(selected)


def table(rows: Sequence[Row], against: str) -> str:
    """Return a Markdown table with one row per arm after its last iteration. Bold: the interval over prompts excludes 0."""
    header = ["arm", "learning rate", *map(title_of, COMPARED), "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for arm, title in ARMS.items():
        where = {"arm": arm, "iter": LAST, "against": against}
        summaries = [summarize(rows, where | {"measure": name}) for name in COMPARED]
        if summaries[0]:
            cells = [cell(*values) for values in summaries if values]
            lines.append(f"| {title} | {select(rows, where)[0]['lr']:g} | {' | '.join(cells)} | {summaries[0][3]} |")
    return "\n".join(lines)


def title_of(name: str) -> str:
    measure = MEASURES[name]
    return measure.title if measure.ideal is None else f"{measure.title}: distance from {measure.ideal:g}"


def cell(mean: float, prompts: float, seeds: float, count: int) -> str:
    """Return "+0.012 ± 0.010 (0.021)": the mean, and half its 95 % intervals over prompts and over seeds."""
    text = f"{mean:+.3f} ± {prompts:.3f}"
    return (f"**{text}**" if abs(mean) > prompts else text) + (f" ({seeds:.3f})" if count > 1 else "")


def draw(rows: Sequence[Row]) -> Figure:
    """Plot the change from the start after each iteration with its interval over prompts, one panel per measure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        for axis, name in zip(figure.subplots(2, 3).flat, COMPARED, strict=True):
            axis.axhline(0, color="#333333", linewidth=0.8)
            for i, (arm, title) in enumerate(ARMS.items()):
                where = {"arm": arm, "against": "start", "measure": name}
                summaries = [(t, summarize(rows, where | {"iter": t})) for t in range(LAST + 1)]
                points = [(t + 0.07 * (i - 2), *values[:2]) for t, values in summaries if values]
                x, y, half = zip(*points, strict=True) if points else ((), (), ())
                style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "capsize": 2}
                axis.errorbar(x, y, half, label=title, linewidth=1.2, **style)
            axis.set_title(title_of(name).replace(": distance", ":\ndistance"), loc="left")
            axis.set_xticks(range(LAST + 1), [f"iteration {t}" for t in range(LAST + 1)])
        handles, names = axis.get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=3,
            title="continued SFT: the same number of steps as both iterations",
        )
    return figure


def redraw() -> None:
    """Write results.csv and effects.csv from the run folders, if there are any, then the figure, and print the tables."""
    old = {name: read(HERE / name) if (HERE / name).exists() else [] for name in ("results.csv", "effects.csv")}
    if FOLDER.exists():
        rows, held_out = collect()
        rows = merge(old["results.csv"], rows)
        write(rows, HERE / "results.csv")
        write(merge(old["effects.csv"], effects(rows, held_out)), HERE / "effects.csv")
    if not (HERE / "effects.csv").exists():
        print("language_model: not run; use the commands in experiments/language_model/play.sh.\n")
        return
    rows = read(HERE / "effects.csv")
    draw(rows).savefig(HERE / "figure.png", dpi=150)
    print(
        f"language_model\n\nfrom the start:\n\n{table(rows, 'start')}\n\nfrom continued SFT:\n\n{table(rows, 'sft')}\n"
    )
