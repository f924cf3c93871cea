"""Conversion of matplotlib figures to plain data, from which the HTML page draws interactive charts."""

import base64
import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

MOST_POINTS = 400  # per line; of longer lines only every second, third, ... point is kept


def chart_data(figure: Figure) -> list[dict[str, Any]] | str:
    """Return the panels of a figure: titles, axes with ticks, `lines`, `rules` (straight lines across the whole panel),
    `bars` (intervals) and `steps` (histograms). Return a heat map as a data URL."""
    if any(axes.images for axes in figure.axes):
        figure.savefig(image := io.BytesIO(), dpi=150)
        return f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
    return [_panel(axes, figure.get_supylabel()) for axes in figure.axes]


def _panel(axes: Axes, label: str) -> dict[str, Any]:
    lines, rules = [], []
    for line in axes.lines:
        x, y = (np.asarray(values, dtype=float) for values in (line.get_xdata(), line.get_ydata()))
        in_x, in_y = line.get_transform().contains_branch_seperately(axes.transData)  # matplotlib's spelling
        if in_x and in_y:
            thin = slice(None, None, -(-len(x) // MOST_POINTS) or 1)
            lines.append({**_style(line, line.get_color()), "x": x[thin], "y": y[thin]})
        else:
            rules.append({**_style(line, line.get_color()), **({"x": x[0]} if in_x else {"y": y[0]})})
    steps = [
        {**_style(patch, color), "fill": patch.get_fill(), "x": patch.get_data()[1], "y": patch.get_data()[0]}
        for patch in axes.patches
        if isinstance(patch, StepPatch)
        for color in [patch.get_facecolor() if patch.get_fill() else patch.get_edgecolor()]
    ]
    bars = [
        {"color": to_hex(bars.get_edgecolor()[0]), "x": x, "low": low, "high": high}  # type: ignore[arg-type, index]
        for bars in axes.collections
        for (x, low), (_, high) in bars.get_segments()  # type: ignore[attr-defined]
    ]
    about = {"title": axes.get_title("left"), "xlabel": axes.get_xlabel(), "ylabel": axes.get_ylabel() or label}
    scales = {"x": _axis(axes.xaxis, *axes.get_xlim()), "y": _axis(axes.yaxis, *axes.get_ylim())}
    shapes = {"lines": lines, "rules": rules, "bars": bars, "steps": steps}
    return {**about, "log": axes.get_xscale() == "log", **scales, **shapes}


def _axis(axis: Axis, low: float, high: float) -> dict[str, Any]:
    places = axis.get_major_locator()()
    labels = axis.get_major_formatter().format_ticks(list(places))
    shown = [(place, text) for place, text in zip(places, labels, strict=True) if low <= place <= high]
    return {"limits": (low, high), "ticks": shown}


def _style(artist: Any, color: Any) -> dict[str, Any]:
    label = str(artist.get_label())
    return {
        "label": "" if label.startswith("_") else label,  # matplotlib's prefix for artists without a label
        "color": to_hex(color),
        "width": artist.get_linewidth(),
        "dashed": artist.get_linestyle() not in ("-", "solid"),
        "alpha": artist.get_alpha() or 1,
    }
