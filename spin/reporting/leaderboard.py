"""The points of a sweep: what became of each, and all of them in one table, with a figure.

Everything is read from the points' folders, so it does not matter in which process, or on which machine, a point was played.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spin.pipeline.points import Point, read_record
from spin.reporting.report import MEASURES, STYLE, WIDTH, _known, _md, _number, _table
from spin.runtime.errors import brief
from spin.runtime.files import write_text
from spin.runtime.tracking import Tracker

# Measures that tell points apart: what is good is low (1), high (-1), or near a target (0). The first that is known ranks.
SHOWN = {"exact_match": -1, "classifier_auc": 0, "human_likelier": 0, "nll_per_token": 1, "mauve": -1}
TITLES = {key: (title, unit, target) for key, title, unit, target in MEASURES}
HEADS = {
    "exact_match": "right\nanswers",
    "classifier_auc": "classif.\nAUC",
    "human_likelier": "human\nlikelier",
    "nll_per_token": "NLL\nnats/token",
    "mauve": "\nMAUVE",
}
# Okabe and Ito's colours, for as many lines as a person can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")


# --- the rows of the table --------------------------------------------------------------------------------------------


def rows_of(points: Sequence[Point]) -> list[dict]:
    """The table, best point first: rows of kind "point", "mean" (over seeds, where `seed` is swept) and "start".

    A point's row has its swept settings, status (done, failed, unfinished), reason, and of its last policy the held-out
    measures, with the ends of their intervals as `<measure>_low` and `<measure>_high`. A mean's row has the means over
    seeds with equal other settings, their number `seeds`, and standard errors `<measure>_se`. The start's row is there where
    all points share the policy that self-play started from.
    """
    games = [_game(point) for point in points]
    rows = [_point_row(point, game) for point, game in zip(points, games, strict=True)]
    starts = [_measures(start) for game in games if game and (start := _start(game))]
    common: list[dict] = []
    if len({json.dumps(start) for start in starts}) == 1:
        common = [{"kind": "start", "status": "done", **starts[0]}]
    means = _means_over_seeds(rows)
    key = _ranking(rows)
    return [
        *sorted(rows, key=lambda row: _badness(row, key)),
        *sorted(means, key=lambda row: _badness(row, key)),
        *common,
    ]


def _game(point: Point) -> dict | None:
    if point.folder is None or point.problem or read_record(point.folder).get("status") != "done":
        return None
    try:
        return json.loads((point.folder / "game.json").read_bytes())
    except (OSError, ValueError):
        return None


def _point_row(point: Point, game: dict | None) -> dict:
    row: dict[str, Any] = {"kind": "point", **point.swept, "status": "done"}
    if game is None:
        record = read_record(point.folder) if point.folder else {}
        failed = point.problem or record.get("status") == "failed"
        reason = point.problem or record.get("reason") or "not played to its end: run the same command to go on"
        return row | {"status": "failed" if failed else "unfinished", "reason": reason, "folder": _shown(point.folder)}
    played = game["evaluations"]
    measured = _measures(played[-1]) if played else {}
    last = next((one for one in reversed(game["exams"]) if not played or one["policy"] == played[-1]["policy"]), None)
    for one in (last and last["harness"]) or []:
        measured |= {one["task"]: one["value"], f"{one['task']}_se": one["stderr"]}
    if last and last["mt_bench"]:
        measured["mt_bench"] = last["mt_bench"]["score"]
    return row | {"reason": None, **measured, "folder": _shown(point.folder)}


def _measures(evaluation: dict) -> dict:
    found: dict[str, Any] = {}
    for key, value in evaluation.items():
        if key.endswith("_interval"):
            name = key.removesuffix("_interval")
            found |= {f"{name}_low": value[0], f"{name}_high": value[1]}
        elif key != "iter":
            found[key] = value
    return found


def _start(game: dict) -> dict | None:
    """The evaluation of the policy that self-play started from."""
    before = [one for one in game["evaluations"] if one["iter"] is None]
    return before[-1] if before and game["iterations"] else None


def _means_over_seeds(rows: Sequence[dict]) -> list[dict]:
    settings = [key for key in settings_of(rows) if key != "seed"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "seed" in row and row["status"] == "done":
            groups.setdefault(tuple(row[key] for key in settings), []).append(row)
    return [_mean_row(group, settings) for group in groups.values() if len(group) > 1]


def _mean_row(group: Sequence[dict], settings: Sequence[str]) -> dict:
    """The mean of points that differ by their seed alone."""
    first, count = group[0], len(group)
    result = {key: first[key] for key in settings}
    result |= {"kind": "mean", "seed": f"mean of {count}", "status": "done", "seeds": count}
    for key in first:
        if f"{key}_low" in first or f"{key}_se" in first or key in ("mauve_if_equal", "mt_bench"):
            values = [one[key] for one in group if _known(one.get(key))]
            if len(values) == count:
                result |= {key: mean(values), f"{key}_se": stdev(values) / math.sqrt(count)}
    return result


def settings_of(rows: Iterable[dict]) -> list[str]:
    """The swept settings: what a point's row has before its status."""
    row = next((row for row in rows if row["kind"] == "point"), {"kind": "point", "status": ""})
    keys = list(row)
    return keys[1 : keys.index("status")]


def _badness(row: dict, key: str | None) -> float:
    """How far a row is from good by the measure `key`; infinite where it has none."""
    value = row.get(key) if key else None
    if not _known(value):
        return math.inf
    target = TITLES[key][2] if key else None
    return abs(value - target) if target is not None else SHOWN[key or ""] * value


def _shown(path: Path | None) -> str | None:
    if path is None:
        return None
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# --- the leaderboard --------------------------------------------------------------------------------------------------


def write_leaderboard(folder: Path, points: Sequence[Point], tracker: Tracker, is_new: bool = True) -> int:
    """Write `sweep.csv`, `sweep.md` and `figures/` into the sweep's `folder`, print the table, and where something was
    played (`is_new`) send it to W&B. Returns how many points have no result."""
    rows = rows_of(points)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name in ("heatmap", "lines"):
        (figures / f"{name}.png").unlink(missing_ok=True)
    drawn: list[Path] = []
    with matplotlib.rc_context(STYLE):
        if (found := draw(rows)) is not None:
            name, figure = found
            drawn = [figures / f"{name}.png"]
            figure.savefig(drawn[0], dpi=150)
    write_text(folder / "sweep.csv", _csv(rows))
    write_text(folder / "sweep.md", _page(folder, rows, drawn))
    _show(rows, tracker.console)
    if is_new:
        columns = _columns(rows)
        tracker.leaderboard(columns, [[row.get(column) for column in columns] for row in rows], drawn)
    tracker.say(f"leaderboard: {folder / 'sweep.md'}")
    return sum(row["status"] != "done" for row in rows)


def _columns(rows: Sequence[dict]) -> list[str]:
    first = ["kind", *settings_of(rows), "status", "reason", "policy", "n", "seeds"]
    found = dict.fromkeys(key for row in rows for key in row)
    return [*(key for key in first if key in found), *(key for key in found if key not in (*first, "folder")), "folder"]


def _csv(rows: Sequence[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _ranking(rows: Sequence[dict]) -> str | None:
    """The measure that rows are sorted by: the first of `SHOWN` that is known."""
    return next(iter(_measures_shown(rows)), None)


def _ranked_by(rows: Sequence[dict]) -> str | None:
    if (key := _ranking(rows)) is None:
        return None
    how = {-1: "highest", 0: f"nearest to {TITLES[key][2]}", 1: "lowest"}[SHOWN[key]]
    return f"{HEADS[key].replace(chr(10), ' ').strip()}, {how} first"


def _page(folder: Path, rows: Sequence[dict], drawn: Sequence[Path]) -> str:
    settings, measures = settings_of(rows), _measures_shown(rows)
    head = ["", *settings, "status", *(f"{TITLES[key][0]} ({TITLES[key][1]})" for key in measures), "report"]
    cells = []
    for row in rows:
        done = row["status"] == "done"
        shown = [_title(row), *(str(row.get(key, "")) for key in settings)]
        shown.append("done" if done else f"{row['status']}: {row['reason']}")
        shown += [_cell(row, key, " [{}, {}]") if done else "" for key in measures]
        report = f"[report]({_link(folder, row['folder'])})" if done and row.get("folder") else ""
        cells.append([*(_md(text) for text in shown), report])
    order = _ranked_by(rows)
    is_mean = any(row["kind"] == "mean" for row in rows)
    parts = [f"# {_md(folder.name)}"]
    if order:
        parts.append(
            f"Sorted by {order}. Measures of each point's last policy on the held-out prompts, in brackets 95 % bootstrap "
            f"intervals over prompts{'; in rows of means, ± the standard error over seeds' if is_mean else ''}."
        )
    parts.append(_table(head, cells))
    if any(row["kind"] == "start" for row in rows):
        parts.append("*start*: the policy that self-play started from, the same for all points.")
    for path in drawn:
        parts += [f"![Measures by setting](figures/{path.name})", CAPTIONS[path.stem]]
    return "\n\n".join(parts) + "\n"


CAPTIONS = {
    "heatmap": "*The last policy of each point on the held-out prompts. Lighter: better; grey: no result.*",
    "lines": "*The last policy of each point on the held-out prompts. Bars: 95 % bootstrap intervals over prompts, or the "
    "standard error where means over seeds are drawn. Grey dashes: the value at which human and own answers cannot be told "
    "apart.*",
}


def _link(folder: Path, place: str) -> str:
    path = Path(place).absolute()
    inside = folder.absolute()
    text = path.relative_to(inside).as_posix() if path.is_relative_to(inside) else path.as_posix()
    return f"<{text}/report.md>"


def _measures_shown(rows: Sequence[dict]) -> list[str]:
    return [key for key in SHOWN if any(_known(row.get(key)) for row in rows)]


def _title(row: dict) -> str:
    return {"point": "", "mean": "mean", "start": f"start ({row.get('policy')})"}[row["kind"]]


def _cell(row: dict, key: str, interval: str) -> str:
    digits = 3 if key == "nll_per_token" else 2
    text = _number(row.get(key), digits)
    if _known(spread := row.get(f"{key}_se")) and row["kind"] == "mean":
        return f"{text} ± {_number(spread, digits)}"
    ends = [row.get(f"{key}_low"), row.get(f"{key}_high")]
    return text + (interval.format(*(_number(end, digits) for end in ends)) if _known(ends) else "")


def _show(rows: Sequence[dict], console: Console) -> None:
    settings, measures = settings_of(rows), _measures_shown(rows)
    order = _ranked_by(rows)
    title = f"Sweep, {sum(row['kind'] == 'point' for row in rows)} points" + (f" ({order})" if order else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for key in settings:
        table.add_column(Text(f"\n{key}"), overflow="fold")
    for key in measures or ["status"]:
        table.add_column(HEADS.get(key, ""), justify="right" if measures else "left", no_wrap=True)
    lines: list[Text] = []
    for row in rows:
        label = [_title(row), *[""] * (len(settings) - 1)] if row["kind"] == "start" and settings else None
        cells = label or [str(row.get(key, "")) for key in settings]
        if row["status"] == "done":
            values = [_cell(row, key, "\n{}, {}") for key in measures] or [row["status"]]
        else:
            values = [row["status"], *[""] * (len(measures) - 1)]
            at = ", ".join(f"{key}={row[key]}" for key in settings) or "the point"
            lines.append(Text(f"{at}: {row['status']}: {brief(row['reason'], 400)}"))
        table.add_row(*(Text(text) for text in (*cells, *values)))
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[dict]) -> tuple[str, Figure] | None:
    """A heat map where exactly two settings are swept and both are numbers, lines over the one that is; else nothing.

    Where `seed` is swept as well the means over seeds are drawn.
    """
    settings = [key for key in settings_of(rows) if key != "seed"]
    kind = "mean" if any(row["kind"] == "mean" for row in rows) else "point"
    drawn = [row for row in rows if row["kind"] == kind]
    numeric = [key for key in settings if all(_numeric(row[key]) for row in rows if row["kind"] == "point")]
    measures = _measures_shown(drawn)[:4]
    if not measures:
        return None
    if len(numeric) == 2 and len(settings) == 2:
        return "heatmap", _heat_map(drawn, numeric, measures)
    if len(numeric) == 1:
        others = [key for key in settings if key not in numeric]
        return "lines", _lines(drawn, numeric[0], others, measures)
    return None


def _numeric(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _panels(measures: Sequence[str], height: float) -> tuple[Figure, list]:
    columns = min(2, len(measures))
    lines = math.ceil(len(measures) / columns)
    figure = Figure(figsize=(WIDTH, height * lines + 0.2), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axes in grid[len(measures) :]:
        axes.remove()
    return figure, grid[: len(measures)]


def _heat_map(rows: Sequence[dict], settings: Sequence[str], measures: Sequence[str]) -> Figure:
    """The first setting up, the second to the right, in their numbers' order and evenly spaced."""
    up, right = (sorted({row[key] for row in rows}, key=float) for key in settings)
    figure, grid = _panels(measures, 0.42 * len(up) + 1.0)
    colors = matplotlib.colormaps["cividis_r"].with_extremes(bad="#D9D9D9")
    for axes, key in zip(grid, measures, strict=True):
        cells = {(row[settings[0]], row[settings[1]]): row for row in rows}
        values = np.array([[_badness(cells.get((u, r), {}), key) for r in right] for u in up])
        known = np.isfinite(values)
        axes.imshow(np.where(known, values, np.nan), cmap=colors, origin="lower", aspect="auto")
        low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 1.0)
        for i, u in enumerate(up):
            for j, r in enumerate(right):
                is_dark = known[i, j] and values[i, j] > (low + high) / 2
                text = _number(cells.get((u, r), {}).get(key), 3 if key == "nll_per_token" else 2)
                axes.text(j, i, text, ha="center", va="center", color="white" if is_dark else "black")
        title, unit, target = TITLES[key]
        goal = {1: "lower is better", -1: "higher is better", 0: f"{target} is the goal"}[SHOWN[key]]
        axes.set_title(f"{title}\n({unit}; {goal})", loc="left")
        axes.set_xticks(range(len(right)), right)
        axes.set_yticks(range(len(up)), up)
        axes.grid(visible=False)
        axes.set_xlabel(settings[1])
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(settings[0])
    return figure


def _lines(rows: Sequence[dict], setting: str, others: Sequence[str], measures: Sequence[str]) -> Figure:
    """Each measure over `setting`, a line for each combination of the `others`."""
    figure, grid = _panels(measures, 2.2)
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(", ".join(f"{key}={row[key]}" for key in others), []).append(row)
    values = [float(row[setting]) for row in rows]
    is_wide = min(values) > 0 and max(values) / min(values) >= 8
    for axes, key in zip(grid, measures, strict=True):
        title, unit, target = TITLES[key]
        if target is not None:
            axes.axhline(target, color="#777777", linestyle=(0, (4, 3)), linewidth=1.2)
        for number, (label, group) in enumerate(groups.items()):
            found = sorted((row for row in group if _known(row.get(key))), key=lambda row: float(row[setting]))
            ends = np.array([_ends(row, key) for row in found]).reshape(-1, 2)
            middle = np.array([row[key] for row in found])
            axes.errorbar(
                [float(row[setting]) for row in found],
                middle,
                yerr=np.abs(ends.T - middle),
                color=COLORS[number % len(COLORS)],
                linestyle=("-", "--", ":")[number // len(COLORS) % 3],
                marker="o",
                markersize=4.5,
                linewidth=1.4,
                label=label,
            )
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
        axes.set_xlabel(setting)
        if is_wide:
            axes.set_xscale("log")
        axes.set_xticks(sorted({*values}), sorted({row[setting] for row in rows}, key=float))
        axes.minorticks_off()
    if others:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(groups)))
    return figure


def _ends(row: dict, key: str) -> tuple[float, float]:
    """What the bar of a value spans: ± a standard error, or its interval; nothing where neither is known."""
    value, spread, ends = row[key], row.get(f"{key}_se"), (row.get(f"{key}_low"), row.get(f"{key}_high"))
    if row["kind"] == "mean" and _known(spread):
        return value - spread, value + spread
    return ends if _known(ends) else (value, value)
