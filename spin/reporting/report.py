"""The report page of a finished run: tables, figures and samples from its folder; and the table at a run's end."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spin.runtime.progress import format_seconds

# Okabe and Ito's colours, told apart with any colour vision; one meaning each, in every figure.
REAL, GENERATED, NEUTRAL = "#0072B2", "#D55E00", "#333333"
WIDTH = 7.2  # inches: 1080 pixels at 150 dpi, so that 9 point type is still read at 900
FIGURES = ("measures", "logps", "margins", "lengths")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
}

# key, title of its panel, unit on its axis, target
MEASURES = (
    ("nll_per_token", "NLL of human answers", "nats per token", None),
    ("human_likelier", "human answer is likelier", "share of prompts", 0.5),
    ("classifier_auc", "a classifier tells them apart", "AUC", 0.5),
    ("mauve", "likeness of distributions", "MAUVE", None),
    ("exact_match", "right answers (pass@1)", "share of prompts", None),
    ("length_auc", "human answer is longer", "AUC", 0.5),
    ("rouge_l", "ROUGE-L to human", "F1", None),
    ("own_length", "length of own answers", "tokens", None),
    ("finished", "answers that ended", "share of answers", None),
    ("distinct_2", "distinct word pairs, each", "share of word pairs", None),
    ("diversity", "distinct word pairs, all", "own / human", 1.0),
    ("margin", "margin over the opponent", "nats", None),
    ("accuracy", "margin above 0", "share of prompts", None),
)
# Measures that say whether two policies differ: how a sentence names each.
COMPARED = {
    "exact_match": "exact match",
    "nll_per_token": "NLL of the human answers",
    "human_likelier": "how often the human answer is likelier",
    "classifier_auc": "classifier AUC",
    "mauve": "MAUVE",
    "length_auc": "length AUC",
    "rouge_l": "ROUGE-L",
}


def write_report(folder: Path, game: dict) -> Path:
    """Write `folder/report.md` and `folder/figures/*.png` and return the page's path.

    `game` is what `game.play` returns; the rest is read from `folder`: metrics.jsonl, `iter<t>/pairs.parquet` and
    `iter<t>/margins.json`. A figure whose data are not there is left out, and an older one of that name removed.
    """
    folder = Path(folder)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        (figures / f"{name}.png").unlink(missing_ok=True)
    train = _train_rows(folder)
    with matplotlib.rc_context(STYLE):
        drawn = {
            "measures": _draw_measures(game["evaluations"]),
            "logps": _draw_logps(train, game["iterations"]),
            "margins": _draw_margins(folder, game["iterations"]),
            "lengths": _draw_lengths(folder, game["iterations"]),
        }
        for name, figure in drawn.items():
            if figure is not None:
                figure.savefig(figures / f"{name}.png", dpi=150)
    page = folder / "report.md"
    shown = {name for name, figure in drawn.items() if figure is not None}
    page.write_text(_page(game, train, shown), encoding="utf-8")
    return page


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(game: dict, train: dict[int, list[dict]], drawn: set[str]) -> str:
    data, evaluations = game["data"], game["evaluations"]
    parts = [
        f"# {_md(game['name'])}",
        f"Self-play fine-tuning of {_code(game['model'])}.",
        _fence(game["command"], "sh"),
    ]

    parts += ["## Data", f"{data['train']:,} training examples, {data['held_out']:,} held out."]
    if data["counts"]:
        rows = [[_md(reason), f"{count:,}"] for reason, count in data["counts"].items()]
        parts.append(_table(["", "examples"], rows))

    parts.append("## Iterations")
    rows = [
        [
            str(played["iter"]),
            _md(played["opponent"]),
            f"{played['beta']:g}",
            _rate(played["lr"]),
            f"{played['pairs']:,}",
            _md(", ".join(f"{count:,} {reason}" for reason, count in played["dropped"].items() if count) or "none"),
            _code(played["policy"]),
        ]
        for played in game["iterations"]
    ]
    parts.append(_table(["iteration", "opponent", "beta", "learning rate", "pairs", "dropped", "result"], rows))

    parts.append("## Held-out measures")
    if evaluations:
        parts.append(_measures_table(evaluations))
        parts.append(
            f"In brackets: 95 % bootstrap intervals over the {evaluations[-1]['n']:,} held-out prompts. NLL: negative "
            "log-likelihood of the human answers. Human likelier: share of prompts whose human answer has a higher "
            "log-probability a token than the policy's own answer. Classifier AUC: how often a classifier of words, "
            "letters, length and what answer and prompt share, cross-validated over prompts, finds a human answer more "
            "human than an own one. Length AUC: how often a human answer is longer. These three are 0.5 where human and own "
            "answers cannot be told apart that way. MAUVE: likeness of the two distributions, at most 1; *if equal* is what "
            "it comes to with so few prompts where they are equal. Diversity: distinct word pairs over all own answers, "
            "against the human ones. Margin and accuracy "
            "set a policy against its own opponent, so they cannot be compared between iterations."
        )
        parts += [f"**{sentence}**" if i == 0 else sentence for i, sentence in enumerate(verdict(game))]
        if game["differences"]:
            parts.append(_differences_table(game["differences"]))
    else:
        parts.append("Nothing was evaluated: there are no held-out prompts, or evaluation was switched off.")
    if "measures" in drawn:
        parts += ["![Held-out measures by iteration](figures/measures.png)", MEASURES_CAPTION]

    parts += _exam_parts(game["external"])

    parts.append("## Training")
    if "logps" in drawn:
        parts += ["![Change of log p during training](figures/logps.png)", LOGPS_CAPTION, _logps_table(train)]
        parts.append(WHY_REAL_FALLS)
    else:
        parts.append("No training steps are on record, so there is no training figure.")
    if "margins" in drawn:
        parts += ["![Distribution of margins](figures/margins.png)", MARGINS_CAPTION]

    if "lengths" in drawn:
        parts += ["## Lengths", "![Lengths of answers](figures/lengths.png)", LENGTHS_CAPTION]

    if game["samples"]:
        parts.append("## Samples")
        for number, sample in enumerate(game["samples"], 1):
            parts += [f"### Prompt {number}", _fence(sample["prompt"])]
            parts += ["Human answer:", _fence(sample["real"])]
            for policy, answer in sample["answers"].items():
                parts += [f"Answer of {_md(policy)}:", _fence(answer)]

    parts.append("## Cost")
    rows = [[_md(stage), format_seconds(seconds)] for stage, seconds in game["seconds"].items()]
    if rows:
        rows.append(["**all**", format_seconds(sum(game["seconds"].values()))])
        parts.append(_table(["stage", "time"], rows))
    else:
        parts.append("Every stage was found in the store: nothing was computed in this run.")
    parts.append(f"Peak memory: {game['peak_memory_gib']:.2f} GiB.")
    return "\n\n".join(parts) + "\n"


MEASURES_CAPTION = (
    "*By policy: `start` is the model as it was given, `sft` after fine-tuning on the human answers, a number the "
    "policy that this iteration made. Bars: 95 % bootstrap intervals over prompts. Grey dashes: the value at which "
    "human and own answers cannot be told apart. Blue dashes: mean length of the human answers. Distinct word pairs: within "
    "each answer, and over all own answers against the human ones.*"
)
LOGPS_CAPTION = (
    "*Change of log p under the policy since the iteration's first step, for the pairs of each step (mean over "
    "sequences, nats). It is measured against the opponent, which the policy starts as, so both curves start at 0; the "
    "gap between them is the margin. Thin: each step; thick: moving average.*"
)
WHY_REAL_FALLS = (
    "**Why log p(real) can fall while the margin grows.** The loss sees only the gap between the two curves, not where "
    "they are. That log p(generated) falls is no surprise: those answers were drawn from the opponent, which the "
    "policy starts as, so (for fresh answers, sampled at temperature 1) its mean change is −KL(opponent ‖ policy): "
    "below 0 whatever the change. Real answers share words and phrasing with the generated ones, so pushing these down "
    "pulls those along, and nothing in the loss says that the freed probability must go to the real answers rather "
    "than to text that is in neither. Both falling, one faster, is as good for the loss as one rising. But it is a "
    "move away from the human answers: watch the held-out NLL. If log p(real) falls, lower `optimizer.lr`, raise "
    "`loss.beta` (the loss is then satisfied by a smaller move away from the opponent), or train for fewer epochs."
)
MARGINS_CAPTION = (
    "*Held-out prompts by margin: what the policy has gained over its opponent on the human answer, less what it has "
    "gained on the opponent's answer (nats, without beta). Right of 0 the policy tells the two apart. The outermost "
    "1 % on each side is drawn at the edge.*"
)
LENGTHS_CAPTION = (
    "*Lengths of the answers in the training pairs of each iteration. Where the two shapes differ, length alone gives "
    "the opponent away. A spike at the right end of the generated answers is the cap on new tokens. The longest 1 % is "
    "drawn at the edge.*"
)


def _exam_parts(exams: Sequence[dict]) -> list[str]:
    """Benchmarks beside the paper's, MT-Bench, and what a judge prefers; nothing for what was not asked for."""
    parts: list[str] = []
    if rows := [one for one in exams if one["harness"]]:
        parts += ["## Benchmarks", _harness_table(rows)]
        parts.append(
            "Percent, with the harness's standard error and the number of questions. The paper's rows are of Zephyr-7B "
            "(arXiv 2401.01335), by an older harness: compare how they change, not where they are."
        )
    if rows := [one for one in exams if one["mt_bench"]]:
        cells = [
            [
                _md(one["policy"]),
                *(
                    _number(one["mt_bench"][key], 2) + _interval(one["mt_bench"], key, 2, " [{}, {}]")
                    for key in ("score", "first_turn", "second_turn")
                ),
                f"{one['mt_bench']['n']:,}",
                f"{one['mt_bench']['unparsed']:,}",
            ]
            for one in rows
        ]
        head = ["policy", "score, 1 to 10", "first turn", "second turn", "questions", "verdicts not read"]
        parts += ["## MT-Bench", _table(head, cells), "In brackets: 95 % bootstrap intervals over questions."]
    if rows := [one for one in exams if one["comparison"]]:
        parts += ["## A judge's preference", *(_md(one["comparison"]["finding"]) for one in rows)]
        parts.append(
            "Answers to the held-out prompts, blind and in both orders; a win is a verdict that both orders give, all else "
            "is a tie. p is the exact sign test's over the prompts that were decided."
        )
    return parts


def _harness_table(rows: Sequence[dict]) -> str:
    tasks = [(one["task"], one["shots"], one["metric"]) for one in rows[0]["harness"]]
    head = ["policy", *(f"{task}, {shots} shots, {metric}" for task, shots, metric in tasks), "average"]
    cells = []
    for row in rows:
        values = [one["value"] * 100 for one in row["harness"]]
        shown = [
            f"{one['value'] * 100:.2f}"
            + (f" ± {one['stderr'] * 100:.2f}" if _known(one["stderr"]) else "")
            + f" (n={one['n']:,})"
            for one in row["harness"]
        ]
        cells.append([_md(row["policy"]), *shown, f"{sum(values) / len(values):.2f}"])
        paper = row["paper"] or {}
        if all(task in paper for task, _, _ in tasks):
            known = [paper[task] for task, _, _ in tasks]
            mean = sum(known) / len(known)
            cells.append([_md(f"paper: {row['policy']}"), *(f"{value:.2f}" for value in known), f"{mean:.2f}"])
    return _table([_md(name) for name in head], cells)


def verdict(game: dict) -> list[str]:
    """Sentences that say whether policies differ, from `game["differences"]`: where the 95 % interval of the difference
    on the same prompts leaves 0 out."""
    return [_verdict(one) for one in game["differences"]]


def _verdict(one: dict) -> str:
    said: dict[str, list[str]] = {"better": [], "worse": [], "same": []}
    for key, name in COMPARED.items():
        if (found := one["measures"].get(key)) is None or not _known(found["change"]):
            continue
        change = "" if found["verdict"] == "same" else f" ({found['first']:.3f} → {found['last']:.3f})"
        said[found["verdict"]].append(name + change)
    pair = f"{one['policy']} against {one['against']}, n={one['n']:,}"
    if not said["better"] and not said["worse"]:
        return f"{pair}: no difference seen, the intervals of all differences hold 0."
    groups = (("better in ", "better"), ("worse in ", "worse"), ("no difference seen in ", "same"))
    return f"{pair}: " + "; ".join(label + ", ".join(said[kind]) for label, kind in groups if said[kind]) + "."


def _differences_table(differences: Sequence[dict]) -> str:
    names = [key for key in COMPARED if any(key in one["measures"] for one in differences)]
    rows = []
    for one in differences:
        cells = []
        for key in names:
            found = one["measures"].get(key, {"change": None, "interval": None})
            bounds = found["interval"]
            shown = f" [{_number(bounds[0], 3)}, {_number(bounds[1], 3)}]" if _known(bounds) else ""
            cells.append(_number(found["change"], 3) + shown)
        rows.append([_md(f"{one['policy']} − {one['against']}"), f"{one['n']:,}", *cells])
    return _table(["difference", "prompts", *(COMPARED[key] for key in names)], rows)


def _measures_table(evaluations: Sequence[dict]) -> str:
    columns = [
        ("NLL, nats per token", "nll_per_token", 3),
        ("human likelier", "human_likelier", 3),
        ("classifier AUC", "classifier_auc", 3),
        ("MAUVE", "mauve", 3),
        ("MAUVE if equal", "mauve_if_equal", 3),
        ("right answers", "exact_match", 3),
        ("length AUC", "length_auc", 3),
        ("ROUGE-L", "rouge_l", 3),
        ("own length, tokens", "own_length", 1),
        ("human length, tokens", "human_length", 1),
        ("ended by themselves", "finished", 3),
        ("distinct word pairs", "distinct_2", 3),
        ("diversity", "diversity", 3),
        ("margin, nats", "margin", 2),
        ("accuracy", "accuracy", 3),
    ]
    columns = [column for column in columns if any(_known(row.get(column[1])) for row in evaluations)]
    rows = [
        [
            _md(row["policy"]),
            *(_number(row.get(key), digits) + _interval(row, key, digits, " [{}, {}]") for _, key, digits in columns),
        ]
        for row in evaluations
    ]
    return _table(["policy", *(name for name, _, _ in columns)], rows)


def _logps_table(train: dict[int, list[dict]]) -> str:
    rows = []
    for iteration, steps in train.items():
        tenth = max(1, len(steps) // 10)
        cells = [str(iteration), f"{len(steps):,}"]
        for key in ("logps/real", "logps/generated", "rewards/margins", "loss"):
            start, end = (_mean(row.get(key) for row in part) for part in (steps[:tenth], steps[-tenth:]))
            cells.append(f"{_number(start, 3)} → {_number(end, 3)}")
        rows.append(cells)
    head = ["iteration", "steps", "log p(real), nats", "log p(generated), nats", "beta × margin, nats", "loss"]
    return _table(head, rows) + "\n\nMeans of the first and the last tenth of the steps."


# --- figures ----------------------------------------------------------------------------------------------------------


def _draw_measures(evaluations: Sequence[dict]) -> Figure | None:
    panels = [panel for panel in MEASURES if any(_known(row.get(panel[0])) for row in evaluations)]
    if not panels:
        return None
    columns = 3
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH, 1.85 * lines + 0.2), layout="constrained")
    labels = [_tick(row) for row in evaluations]
    for index, (key, title, unit, target) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.grid(axis="x", visible=False)
        color = GENERATED if key == "own_length" else NEUTRAL
        if target is not None:
            axes.axhline(target, color="#777777", linestyle=(0, (4, 3)), linewidth=1.2)
        if key == "own_length":
            human = [row["human_length"] for row in evaluations]
            axes.plot(range(len(labels)), human, color=REAL, linestyle=(0, (4, 3)), linewidth=1.4)
        if key == "mauve":
            equal = [_float(row.get("mauve_if_equal")) for row in evaluations]
            axes.plot(range(len(labels)), equal, color="#777777", linestyle=(0, (4, 3)), linewidth=1.2)
        at = [i for i, row in enumerate(evaluations) if _known(row.get(key))]
        values = [evaluations[i][key] for i in at]
        axes.plot(at, values, color=color, linewidth=1, alpha=0.5)
        for i, value in zip(at, values, strict=True):
            interval = evaluations[i].get(f"{key}_interval")
            if _known(interval):
                axes.plot([i, i], interval, color=color, linewidth=1.6)
            axes.plot([i], [value], marker="o", color=color, markersize=4.5)
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        if index >= len(panels) - columns:
            axes.set_xlabel("policy after iteration")
    return figure


def _draw_logps(train: dict[int, list[dict]], iterations: Sequence[dict]) -> Figure | None:
    panels = [played for played in iterations if train.get(played["iter"])]
    if not panels:
        return None
    figure, grid = _grid(len(panels), height=2.4, sharey=True)
    for axes, played in zip(grid, panels, strict=True):
        steps = train[played["iter"]]
        at = [row["step"] for row in steps]
        axes.axhline(0, color="#777777", linewidth=0.8)
        for key, color, label in (("real", REAL, "log p(real)"), ("generated", GENERATED, "log p(generated)")):
            # A reward is beta times the log-ratio to the opponent on the same pairs: raw log p would mostly show that
            # the answers of one step are longer than those of another.
            change = np.array([_gain(row, key, played["beta"]) for row in steps])
            window = len(change) // 20
            if window > 1:
                axes.plot(at, change, color=color, linewidth=0.6, alpha=0.35)
                change = _smooth(change, window)
            axes.plot(at, change, color=color, linewidth=1.8, label=label, marker="o" if len(at) == 1 else None)
        axes.set_title(f"iteration {played['iter']} (beta {played['beta']:g}, lr {_rate(played['lr'])})", loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto"))
        axes.set_xlabel("step")
    _finish(figure, grid, "change of log p\n(nats per sequence)")
    return figure


def _draw_margins(folder: Path, iterations: Sequence[dict]) -> Figure | None:
    margins = {}
    for played in iterations:
        path = folder / f"iter{played['iter']}" / "margins.json"
        if path.exists():
            found = [value for value in json.loads(path.read_text())["margin"] if _known(value)]
            if found:
                margins[played["iter"]] = np.array(found)
    if not margins:
        return None
    every = np.concatenate(list(margins.values()))
    low, high = np.quantile(every, [0.01, 0.99])
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / _bins(min(len(values) for values in margins.values())) or 1.0
    # 0 is an edge: no bin holds both prompts that are told apart and prompts that are not.
    bins = width * np.arange(math.floor(low / width), math.ceil(high / width) + 2)
    figure, grid = _grid(len(margins), height=2.2, sharey=True, sharex=True)
    for axes, (iteration, values) in zip(grid, margins.items(), strict=True):
        clipped = np.clip(values, low, high)
        axes.hist(clipped, bins=bins, weights=np.full(len(values), 1 / len(values)), color="#56B4E9")
        axes.axvline(0, color=NEUTRAL, linewidth=1)
        axes.axvline(np.median(values), color=GENERATED, linewidth=1.4, linestyle=(0, (4, 3)))
        above, median = f"{np.mean(values > 0):.0%} above 0", f"median {np.median(values):.2f} (dashed)"
        axes.set_title(f"iteration {iteration}: {above}\n{median}", loc="left")
        axes.set_xlabel("margin (nats)")
    _finish(figure, grid, "share of prompts", legend=False)
    return figure


def _draw_lengths(folder: Path, iterations: Sequence[dict]) -> Figure | None:
    lengths = {}
    for played in iterations:
        path = folder / f"iter{played['iter']}" / "pairs.parquet"
        if path.exists():
            table = pq.read_table(path, columns=["real_ids", "generated_ids"])
            if table.num_rows:
                lengths[played["iter"]] = [pc.list_value_length(column).to_numpy() for column in table.columns]
    if not lengths:
        return None
    every = np.concatenate([one for both in lengths.values() for one in both])
    high = max(2, math.ceil(np.quantile(every, 0.99)))
    count = _bins(min(len(real) for real, _ in lengths.values()))
    width = max(1, math.ceil((high + 1) / count))  # whole tokens a bin, or some bins hold more lengths than others
    bins = np.arange(0, high + 1 + width, width) - 0.5
    figure, grid = _grid(len(lengths), height=2.4, sharey=True, sharex=True)
    for axes, (iteration, (real, generated)) in zip(grid, lengths.items(), strict=True):
        for values, color, label, filled in ((real, REAL, "real", True), (generated, GENERATED, "generated", False)):
            weights = np.full(len(values), 1 / len(values))
            shape = {"histtype": "stepfilled", "alpha": 0.35} if filled else {"histtype": "step", "linewidth": 1.6}
            axes.hist(np.minimum(values, high), bins=bins, weights=weights, color=color, label=label, **shape)
        medians = f"median {np.median(real):.0f} real, {np.median(generated):.0f} generated"
        axes.set_title(f"iteration {iteration}\n{medians}", loc="left")
        axes.set_xlabel("length (tokens)")
    _finish(figure, grid, "share of answers")
    return figure


def _grid(count: int, height: float, sharey: bool = False, sharex: bool = False) -> tuple[Figure, list]:
    """A figure with `count` panels, two or three a line; both axes comparable between panels where shared."""
    columns = 2 if count == 4 else min(count, 3)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=sharey, sharex=sharex).flatten()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.tick_params(labelbottom=True)
    return figure, list(grid[:count])


def _bins(values: int) -> int:
    """How many bins show a shape and not the noise of so few values."""
    return min(40, max(10, round(1.2 * math.sqrt(values))))


def _finish(figure: Figure, grid: list, label: str, legend: bool = True) -> None:
    for axes in grid:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(label)
    if legend:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


# --- the table at a run's end -----------------------------------------------------------------------------------------


def print_summary(game: dict, console: Console) -> None:
    """Print the measures of every policy, what they say, and one prompt with all answers side by side."""
    if game["evaluations"]:
        table = _summary_table(game["evaluations"], intervals=True)
        if Measurement.get(console, console.options.update(max_width=1000), table).maximum > console.width:
            table = _summary_table(game["evaluations"], intervals=False)
        console.print(table)
        for sentence in verdict(game):
            console.print(Text(sentence))
    for row in game["external"]:
        if row["harness"]:
            shown = ", ".join(f"{one['task']} {one['value'] * 100:.1f}" for one in row["harness"])
            console.print(Text(f"{row['policy']}: {shown} (percent)"))
        if row["mt_bench"]:
            console.print(Text(f"{row['policy']}: MT-Bench {_number(row['mt_bench']['score'], 2)}"))
        if row["comparison"]:
            console.print(Text(row["comparison"]["finding"]))
    if game["samples"]:
        sample = game["samples"][0]
        console.print()
        console.print(Text("Prompt: ", style="bold").append(_short(sample["prompt"], 400), style="not bold"))
        answers = {"human": sample["real"], **sample["answers"]}
        # Narrower than about 24 characters no answer can be read: then the answers go on in a second table.
        lines = math.ceil(len(answers) / max(1, console.width // 26))
        for part in np.array_split(list(answers), lines):
            table = Table(expand=True)
            for policy in part:
                table.add_column(Text(policy), ratio=1, overflow="fold")
            table.add_row(*(Text(_short(answers[policy], 500)) for policy in part))
            console.print(table)


def _summary_table(evaluations: Sequence[dict], intervals: bool) -> Table:
    note = "own, human: tokens" + ("; below: 95 % intervals" if intervals else "; intervals are in the report")
    table = Table(
        title=f"Held-out measures, {evaluations[-1]['n']:,} prompts ({note})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    columns = [
        ("NLL\nnats/token", "nll_per_token", 3),
        ("human\nlikelier", "human_likelier", 2),
        ("classif.\nAUC", "classifier_auc", 2),
        ("\nMAUVE", "mauve", 2),
        ("right\nanswers", "exact_match", 2),
        ("length\nAUC", "length_auc", 2),
        ("own\n/ human", "own_length", 0),
        ("margin\nnats", "margin", 2),
    ]
    columns = [column for column in columns if any(_known(row.get(column[1])) for row in evaluations)]
    table.add_column("\npolicy", no_wrap=True)
    for name, _, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in evaluations:
        cells = [Text(row["policy"])]
        for _, key, digits in columns:
            human = f" / {_number(row['human_length'], 0)}" if key == "own_length" else ""
            cell = Text(_number(row.get(key), digits) + human)
            cells.append(cell.append(_interval(row, key, digits, "\n{}, {}") if intervals else "", style="dim"))
        table.add_row(*cells)
    return table


# --- text -------------------------------------------------------------------------------------------------------------


def _md(text: str) -> str:
    """`text` as Markdown shows it literally, also inside a table cell."""
    escaped = "".join(f"\\{char}" if char in "\\`*_{}[]<>#|!~$&" else char for char in _printable(text))
    return " ".join(escaped.split())


def _code(text: str) -> str:
    """`text` as inline code; in a table cell a bar would still end the cell, so such text is escaped instead."""
    return _md(text) if "`" in text or "|" in text else f"`{' '.join(_printable(text).split())}`"


def _fence(text: str, language: str = "text") -> str:
    """`text` as a code block, long lines wrapped; the fence is longer than any run of backticks within."""
    wrapper = textwrap.TextWrapper(100, replace_whitespace=False, break_on_hyphens=False)
    lines = []
    for line in _printable(text).split("\n"):
        lines += [line] if language == "sh" else wrapper.wrap(line) or [""]
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n" + "\n".join(lines) + f"\n{fence}"


def _printable(text: str) -> str:
    """`text` without control characters: a model's answer must not be able to steer a terminal."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def _short(text: str, most: int) -> str:
    text = _printable(text)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _tick(row: dict) -> str:
    return row["policy"] if row["iter"] is None else str(row["iter"])


def _interval(row: dict, key: str, digits: int, form: str) -> str:
    bounds = row.get(f"{key}_interval")
    return form.format(*(_number(bound, digits) for bound in bounds)) if _known(bounds) else ""


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if _known(value) else "–"


def _rate(lr: float) -> str:
    return f"{lr:g}".replace("e-0", "e-")


def _gain(row: dict, key: str, beta: float) -> float:
    """How far log p has moved from the opponent's, in nats; a variant of the loss, whose rewards tell it not, logs it."""
    return _float(row[f"gains/{key}"]) if f"gains/{key}" in row else _float(row.get(f"rewards/{key}")) / beta


def _known(value: Any) -> TypeGuard[Any]:
    """Is it there, and not NaN? For an interval: both ends."""
    if isinstance(value, (list, tuple)):
        return all(_known(bound) for bound in value)
    return value is not None and math.isfinite(value)


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values) -> float | None:
    found = [value for value in values if _known(value)]
    return sum(found) / len(found) if found else None


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Moving average of `window` values, fewer at the ends; NaN where all of them are."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    counts = np.convolve(known, kernel, "same")
    sums = np.convolve(np.where(known, values, 0.0), kernel, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _train_rows(folder: Path) -> dict[int, list[dict]]:
    path = folder / "metrics.jsonl"
    rows: dict[int, list[dict]] = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row.get("stage") == "train":
                    rows.setdefault(row["iter"], []).append(row)
    return rows
