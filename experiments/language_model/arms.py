"""The study on a real language model: how far each objective brings a model's answers to the human ones, and at what cost.

    bash experiments/language_model/play.sh        # hours; finished stages are found again
    python -m experiments.collect language_model   # results.csv, effects.csv, figure.png and the table

Every arm of a seed starts from the same SFT policy and takes the same number of steps. Its learning rate is chosen on the
validation prompts of seed 0, and it is compared on the held-out prompts.
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
LAST = 1  # the iteration that ends an arm


def arm_of(config: dict) -> str:
    """The key in ARMS of a run by its config.yaml."""
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
    """A row of measures for every policy that the arms made, and the held-out answers behind it."""
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
        raise SystemExit(f"{FOLDER}: no finished run. The commands are in experiments/language_model/play.sh.")
    return rows, held_out


def stored_evaluations(folder: Path, evaluations: Sequence[dict]) -> list[HeldOut]:
    """The held-out answers behind the `evaluations` of a run's game.json."""
    stages = json.loads((folder / STAGES).read_text())
    artifacts = [Path(stages["store"]) / stage for stage in stages["stages"] if stage.startswith("evaluate/")]
    facts = [json.loads((artifact / "evaluation.json").read_text()) for artifact in artifacts]
    found = []
    for evaluation in evaluations:
        number = next(i for i, fact in enumerate(facts) if fact["measures"].items() <= evaluation.items())
        pairs, _ = read_pairs(artifacts[number] / "held_out.parquet")
        found.append(held_out_of(pairs, facts[number]["per_prompt"]))
    return found


def chosen_rates(rows: Sequence[Row]) -> dict[str, float]:
    """For each arm the learning rate whose seed 0 policy is nearest to the human answers on the validation prompts, by the
    classifier, among those tried at the same iteration."""
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
    """The epochs of SFT with the lowest validation NLL of seed 0: the start of every arm."""
    tried = [row for row in rows if row["arm"] == "start" and row["seed"] == 0]
    return min(tried, key=lambda row: row["validation_nll_per_token"])["lr"]


def effects(rows: Sequence[Row], held_out: dict[tuple, HeldOut]) -> list[Row]:
    """The difference of each arm at its chosen rate from the start, and from continued SFT, by seed, iteration and measure."""
    rates, epochs, found = chosen_rates(rows), chosen_epochs(rows), []
    for arm, seed, lr, t in held_out:
        if rates.get(arm) == lr:
            bases = {"start": ("start", seed, epochs, 0)}
            if t == LAST and arm != "sft":
                bases["sft"] = ("sft", seed, rates.get("sft"), LAST)
            for against, base in bases.items():
                if base in held_out:
                    labels = {"arm": arm, "lr": lr, "seed": seed, "iter": t, "against": against}
                    pair = held_out[arm, seed, lr, t], held_out[base]
                    found += [labels | row for row in differences(*pair)]
    return found


def differences(a: HeldOut, b: HeldOut) -> list[Row]:
    """By measure: a - b on the same prompts, and its bootstrap standard error over prompts.

    Of measures with an ideal value the distances from it are compared, so that less is better.
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
    """The rows of this machine's seeds, and the earlier rows of all others."""
    played = {row["seed"] for row in new}
    return [*(row for row in old if row["seed"] not in played), *new]


# --- the table and the figure -----------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row], where: Where) -> tuple[float, float, float, int] | None:
    """Over the seeds of `where`: the mean change, half its 95 % interval over prompts, half that over seeds, and how many."""
    mine = select(rows, where)
    if not mine:
        return None
    mean, half = mean_interval([row["change"] for row in mine])
    prompts = 1.96 * float(np.sqrt(sum(row["error"] ** 2 for row in mine))) / len(mine)
    return mean, prompts, half, len(mine)


def table(rows: Sequence[Row], against: str) -> str:
    """A line an arm after its last iteration. Bold: the interval over prompts leaves 0 out."""
    header = ["arm", "learning rate", *map(title_of, COMPARED), "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for arm, title in ARMS.items():
        where = {"arm": arm, "iter": LAST, "against": against}
        found = [summarize(rows, where | {"measure": name}) for name in COMPARED]
        if found[0]:
            cells = [cell(*values) for values in found if values]
            lines.append(f"| {title} | {select(rows, where)[0]['lr']:g} | {' | '.join(cells)} | {found[0][3]} |")
    return "\n".join(lines)


def title_of(name: str) -> str:
    measure = MEASURES[name]
    return measure.title if measure.ideal is None else f"{measure.title}: distance from {measure.ideal:g}"


def cell(mean: float, prompts: float, seeds: float, count: int) -> str:
    """ "+0.012 ± 0.010 (0.021)": the mean, and half its 95 % intervals over prompts and over seeds."""
    text = f"{mean:+.3f} ± {prompts:.3f}"
    return (f"**{text}**" if abs(mean) > prompts else text) + (f" ({seeds:.3f})" if count > 1 else "")


def draw(rows: Sequence[Row]) -> Figure:
    """The change from the start after each iteration, with its interval over prompts; a panel a measure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        for axis, name in zip(figure.subplots(2, 3).flat, COMPARED, strict=True):
            axis.axhline(0, color="#333333", linewidth=0.8)
            for i, (arm, title) in enumerate(ARMS.items()):
                where = {"arm": arm, "against": "start", "measure": name}
                found = [(t, summarize(rows, where | {"iter": t})) for t in range(LAST + 1)]
                known = [(t + 0.07 * (i - 2), *values[:2]) for t, values in found if values]
                x, y, half = zip(*known, strict=True) if known else ((), (), ())
                style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "capsize": 2}
                axis.errorbar(x, y, half, label=title, linewidth=1.2, **style)
            axis.set_title(title_of(name).replace(": distance", ":\ndistance"), loc="left")
            axis.set_xticks(range(LAST + 1), [f"iteration {t}" for t in range(LAST + 1)])
        handles, names = axis.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=3, title="continued SFT: as many steps as both iterations"
        )
    return figure


def redraw() -> None:
    """Collect if there are runs, and write and print what follows from results.csv and effects.csv."""
    old = {name: read(HERE / name) if (HERE / name).exists() else [] for name in ("results.csv", "effects.csv")}
    if FOLDER.exists():
        rows, held_out = collect()
        rows = merge(old["results.csv"], rows)
        write(rows, HERE / "results.csv")
        write(merge(old["effects.csv"], effects(rows, held_out)), HERE / "effects.csv")
    if not (HERE / "effects.csv").exists():
        print("language_model: not run. The commands are in experiments/language_model/play.sh.\n")
        return
    found = read(HERE / "effects.csv")
    draw(found).savefig(HERE / "figure.png", dpi=150)
    print(
        f"language_model\n\nfrom the start:\n\n{table(found, 'start')}\n\nfrom continued SFT:\n\n{table(found, 'sft')}\n"
    )
