"""The figure of a sweep: a heat map over two settings, or lines over one."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from spin.evaluation.measure_table import Measure, is_known, ranking_measures
from spin.reporting.figures import add_legend, label_measure, panels, plot_measure
from spin.reporting.sweep_rows import settings_of

# Okabe and Ito's colours for lines; further lines differ in line style.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")


def draw(rows: Sequence[dict]) -> dict[str, Figure]:
    """Return {"heatmap": figure} if two settings are swept, both numeric, {"lines": figure} if exactly one is numeric.

    If `seed` is swept too, the means over seeds are drawn.
    """
    settings = [key for key in settings_of(rows) if key != "seed"]
    kind = "mean" if any(row["kind"] == "mean" for row in rows) else "point"
    drawn = [row for row in rows if row["kind"] == kind]
    numeric = [key for key in settings if all(_is_number(row[key]) for row in rows if row["kind"] == "point")]
    measures = ranking_measures(drawn)[:4]
    if measures and len(numeric) == len(settings) == 2:
        return {"heatmap": _heat_map(drawn, numeric, measures)}
    if measures and len(numeric) == 1:
        return {"lines": _lines(drawn, numeric[0], [key for key in settings if key not in numeric], measures)}
    return {}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _heat_map(rows: Sequence[dict], settings: Sequence[str], measures: Sequence[Measure]) -> Figure:
    """Draw the first setting vertically and the second horizontally, both in numeric order and evenly spaced."""
    up, right = (sorted({row[key] for row in rows}, key=float) for key in settings)
    cells = {(row[settings[0]], row[settings[1]]): row for row in rows}
    colors = matplotlib.colormaps["cividis_r"].with_extremes(bad="#D9D9D9")
    figure, grid = panels(len(measures), min(2, len(measures)), 0.42 * len(up) + 1.0)
    for axes, measure in zip(grid, measures, strict=True):
        values = [[cells.get((u, r), {}).get(measure.name) for r in right] for u in up]
        badness = np.array([[measure.badness(v) if is_known(v) else math.nan for v in line] for line in values])
        axes.imshow(badness, cmap=colors, origin="lower", aspect="auto")
        middle = (np.nanmin(badness) + np.nanmax(badness)) / 2
        for (i, j), bad in np.ndenumerate(badness):
            color = "white" if bad > middle else "black"
            axes.text(j, i, measure.show(values[i][j]), ha="center", va="center", color=color)
        title = f"{measure.title}\n({measure.unit}; {measure.goal})"
        axes.set(title=title, xlabel=settings[1], ylabel=settings[0])
        axes.set_xticks(range(len(right)), right)
        axes.set_yticks(range(len(up)), up)
        axes.grid(visible=False)
    return figure


def _lines(rows: Sequence[dict], setting: str, line_settings: Sequence[str], measures: Sequence[Measure]) -> Figure:
    """Draw each measure over `setting`, with one line per combination of `line_settings`."""
    figure, grid = panels(len(measures), min(2, len(measures)), 2.2)
    groups: dict[str, list[dict]] = {}
    ticks: dict[float, str] = {}
    for row in sorted(rows, key=lambda row: float(row[setting])):
        groups.setdefault(", ".join(f"{key}={row[key]}" for key in line_settings), []).append(row)
        ticks[float(row[setting])] = row[setting]
    for axes, measure in zip(grid, measures, strict=True):
        label_measure(axes, measure)
        for number, label in enumerate(sorted(groups)):
            style = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":")[number // len(COLORS) % 3]}
            x = [float(row[setting]) for row in groups[label]]
            plot_measure(axes, measure, x, groups[label], linewidth=1.4, label=label, **style)
        axes.set_xlabel(setting)
        if min(ticks) > 0 and max(ticks) / min(ticks) >= 8:
            axes.set_xscale("log")
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
    if line_settings:
        add_legend(figure, grid[0], min(3, len(groups)))
    return figure
