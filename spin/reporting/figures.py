"""The figures of a run's report, and the style that all figures share."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spin.evaluation.measure_table import MEASURES, Measure, is_known, known_measures
from spin.reporting.text import plain_number

# Okabe and Ito's colours, distinguishable with any colour vision; each has the same meaning in all figures.
REAL, GENERATED, NEUTRAL, REFERENCE, PLAIN = "#0072B2", "#D55E00", "#333333", "#777777", "#56B4E9"
WIDTH = 7.2  # inches: 1080 pixels at 150 dpi, so that 9 point type is legible at 900 pixels
DASHES: Any = (0, (4, 3))
STYLE: Any = rc_params_from_file(Path(__file__).parent / "assets" / "figures.mplstyle", use_default_template=False)
# Measures whose panel also shows another measure, as a dashed line.
DASHED = {"model_length": "human_length", "mauve": "mauve_if_equal"}


def panels(count: int, columns: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, `columns` per row, each `height` inches high; `shared` is for `subplots`."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, **shared).flatten())
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def _iteration_panels(count: int, height: float, label: str, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return `panels`, one per iteration, with a common label of the vertical axis."""
    figure, grid = panels(count, 2 if count == 4 else min(count, 3), height, sharey=True, **shared)
    figure.supylabel(label, fontsize=9)
    return figure, grid


def add_legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def save_figures(folder: Path, figures: Mapping[str, Figure | None]) -> dict[str, Path]:
    """Save each figure as `folder/figures/<name>.png` and return the paths. Remove old files of those that are None."""
    paths = {name: folder / "figures" / f"{name}.png" for name in figures}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        paths[name].unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(paths[name], dpi=150)
    return {name: path for name, path in paths.items() if figures[name] is not None}


def label_measure(axes: Axes, measure: Measure) -> None:
    """Label a panel with a measure's title and unit, and draw its ideal value."""
    axes.set(title=measure.title, ylabel=measure.unit)
    if measure.ideal is not None:
        axes.axhline(measure.ideal, color=REFERENCE, linestyle=DASHES, linewidth=1.2)


def plot_measure(axes: Axes, measure: Measure, x: Sequence[float], rows: Sequence[dict], **style: Any) -> None:
    """Draw a line with a marker for each known value in `rows`, and a bar for its interval, which need not contain the
    value, or for the value ± standard error."""
    points = [(at, row) for at, row in zip(x, rows, strict=True) if is_known(row.get(measure.name))]
    axes.plot([at for at, _ in points], [row[measure.name] for _, row in points], marker="o", markersize=4.5, **style)
    bars = []
    for at, row in points:
        value, error = row[measure.name], row.get(f"{measure.name}_se")
        interval = row.get(f"{measure.name}_interval") if error is None else (value - error, value + error)
        if is_known(interval):
            bars.append((at, *interval))
    if bars:
        axes.vlines(*zip(*bars, strict=True), color=style["color"], linewidth=1.6)


def draw_measures(evaluations: Sequence[dict]) -> Figure | None:
    """Draw each known measure by policy, with its interval."""
    measures = [measure for measure in known_measures(evaluations) if measure.name not in DASHED.values()]
    if not measures:
        return None
    figure, grid = panels(len(measures), 3, 1.85)
    labels = [row["policy"] if row["iter"] is None else str(row["iter"]) for row in evaluations]
    for axes, measure in zip(grid, measures, strict=True):
        label_measure(axes, measure)
        if other := MEASURES.get(DASHED.get(measure.name, "")):
            values = np.array([row.get(other.name) for row in evaluations], dtype=float)
            axes.plot(range(len(labels)), values, color=REFERENCE, linestyle=DASHES, linewidth=1.2, label=other.title)
        plot_measure(axes, measure, range(len(labels)), evaluations, color=NEUTRAL, linewidth=1)
        axes.grid(axis="x", visible=False)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    for axes in grid[-3:]:
        axes.set_xlabel("policy after iteration")
    return figure


def draw_logps(train: dict[int, list[dict]], iterations: Sequence[dict]) -> Figure | None:
    """Draw the change of log p of real and generated answers over each iteration's steps, raw (thin) and smoothed."""
    played = [iteration for iteration in iterations if train.get(iteration["iter"])]
    if not played:
        return None
    import pandas as pd

    figure, grid = _iteration_panels(len(played), 2.4, "change of log p\n(nats per sequence)")
    for axes, iteration in zip(grid, played, strict=True):
        rows = train[iteration["iter"]]
        steps = [row["step"] for row in rows]
        axes.axhline(0, color=REFERENCE, linewidth=0.8)
        for key, color, label in (("real", REAL, "log p(real)"), ("generated", GENERATED, "log p(generated)")):
            change = pd.Series(_log_ratios(rows, key, iteration["beta"] or 1.0))
            window = len(change) // 20
            if window > 1:
                axes.plot(steps, change, color=color, linewidth=0.6, alpha=0.35)
                change = change.rolling(window, center=True, min_periods=1).mean()
            axes.plot(steps, change, color=color, linewidth=1.8, label=label, marker="o" if len(steps) == 1 else None)
        beta = f"beta {iteration['beta']:g}, " if iteration["beta"] is not None else ""
        title = f"iteration {iteration['iter']} ({beta}lr {plain_number(iteration['lr'])})"
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto"))
    add_legend(figure, grid[0])
    return figure


def _log_ratios(rows: Sequence[dict], key: str, beta: float) -> np.ndarray:
    """Return [steps]: the log-ratio to the opponent, in nats. Raw log p would mostly show a step's answer lengths.

    A reward is beta times the log-ratio. Variants of the loss log the log-ratio itself.
    """
    if f"gains/{key}" in rows[0]:
        return np.array([row[f"gains/{key}"] for row in rows], dtype=float)
    return np.array([row.get(f"rewards/{key}") for row in rows], dtype=float) / beta


def draw_margins(folder: Path, iterations: Sequence[dict]) -> Figure | None:
    """Draw histograms of the margins on held-out prompts, from `iter<t>/margins.json`."""
    margins = {}
    for iteration in iterations:
        path = folder / f"iter{iteration['iter']}" / "margins.json"
        values = json.loads(path.read_text())["margin"] if path.exists() else []
        if known := [value for value in values if is_known(value)]:
            margins[iteration["iter"]] = np.array(known)
    if not margins:
        return None
    low, high = np.quantile(np.concatenate(list(margins.values())), [0.01, 0.99])
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / _num_bins(margins.values()) or 1.0
    # 0 is a bin edge, so that no bin contains both positive and negative margins.
    bins = width * np.arange(math.floor(low / width), math.ceil(high / width) + 2)
    figure, grid = _iteration_panels(len(margins), 2.2, "share of prompts", sharex=True)
    for axes, (iteration, values) in zip(grid, margins.items(), strict=True):
        axes.stairs(_shares(np.clip(values, low, high), bins), bins, fill=True, color=PLAIN)
        axes.axvline(0, color=NEUTRAL, linewidth=1)
        axes.axvline(np.median(values), color=GENERATED, linewidth=1.4, linestyle=DASHES)
        share, median = f"{np.mean(values > 0):.0%} above 0", f"median {np.median(values):.2f} (dashed)"
        axes.set(title=f"iteration {iteration}: {share}\n{median}", xlabel="margin (nats)")
    return figure


def draw_lengths(folder: Path, iterations: Sequence[dict]) -> Figure | None:
    """Draw histograms of the answer lengths in the training pairs, from `iter<t>/pairs.parquet`."""
    lengths = {}
    for iteration in iterations:
        path = folder / f"iter{iteration['iter']}" / "pairs.parquet"
        if path.exists() and (table := pq.read_table(path, columns=["real_ids", "generated_ids"])).num_rows:
            lengths[iteration["iter"]] = [pc.list_value_length(column).to_numpy() for column in table.columns]
    if not lengths:
        return None
    every_length = np.concatenate([array for columns in lengths.values() for array in columns])
    longest = max(2, math.ceil(np.quantile(every_length, 0.99)))
    # With a fractional bin width some bins would cover more lengths than others.
    width = max(1, math.ceil((longest + 1) / _num_bins(real for real, _ in lengths.values())))
    bins = np.arange(0, longest + 1 + width, width) - 0.5
    figure, grid = _iteration_panels(len(lengths), 2.4, "share of answers", sharex=True)
    for axes, (iteration, (real, generated)) in zip(grid, lengths.items(), strict=True):
        shapes: Any = (
            (real, {"label": "real", "color": REAL, "fill": True, "alpha": 0.35}),
            (generated, {"label": "generated", "color": GENERATED, "linewidth": 1.6}),
        )
        for values, shape in shapes:
            axes.stairs(_shares(np.minimum(values, longest), bins), bins, **shape)
        medians = f"median {np.median(real):.0f} real, {np.median(generated):.0f} generated"
        axes.set(title=f"iteration {iteration}\n{medians}", xlabel="length (tokens)")
    add_legend(figure, grid[0])
    return figure


def _num_bins(samples: Any) -> int:
    """Return the number of bins that shows the shape of the smallest sample, but not its noise."""
    return min(40, max(10, round(1.2 * math.sqrt(min(map(len, samples))))))


def _shares(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Return the share of the values in each bin."""
    return np.histogram(values, bins)[0] / len(values)
