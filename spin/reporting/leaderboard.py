"""The leaderboard of a sweep: sweep.csv, sweep.md and sweep.html with a figure, a table on the console, and W&B."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.text import Text

from spin.evaluation.measure_table import MEASURES, missing_prompts, ranking_measures
from spin.reporting.figures import STYLE, save_figures
from spin.reporting.html_page import html_page
from spin.reporting.pages import render
from spin.reporting.report import conclude
from spin.reporting.summary import measure_table
from spin.reporting.sweep_figures import draw
from spin.reporting.sweep_rows import Point, rows_of, settings_of, sorted_by
from spin.runtime.errors import brief
from spin.runtime.files import write_text
from spin.runtime.tracking import Tracker


def write_leaderboard(folder: Path, points: Sequence[Point], tracker: Tracker, is_new: bool = True) -> int:
    """Write `sweep.csv`, `sweep.md`, `sweep.html` and `figures/` to the sweep's `folder`, print the table, and send it
    to W&B if any point was played (`is_new`). Return the number of points without a result."""
    import pandas as pd

    rows = rows_of(points)
    with matplotlib.rc_context(STYLE):
        figures = draw(rows)
        drawn = list(save_figures(folder, {"heatmap": None, "lines": None, **figures}).values())
    settings, flat_rows = settings_of(rows), [_flatten(row) for row in rows]
    first = ("kind", *settings, "status", "reason", "policy", "n", "seeds")
    keys = {key for row in flat_rows for key in row}
    more = dict.fromkeys(key for row in flat_rows for key in row if key not in (*first, "folder"))
    columns = [*(key for key in first if key in keys), *more, "folder"]
    table = pd.DataFrame(flat_rows, columns=columns, dtype=object)
    write_text(folder / "sweep.csv", table.to_csv(index=False))
    games = _games(rows, settings)
    page = partial(
        render,
        "sweep.md",
        folder=folder,
        rows=rows,
        games=games,
        conclude=conclude,
        settings=settings,
        order=_order(rows),
        notes=_notes(rows),
        drawn=figures,
        title=_title,
        relpath=os.path.relpath,
    )
    write_text(folder / "sweep.md", page(report="report.md").rstrip("\n") + "\n")
    sets = [_samples(label, game["samples"]) for label, game in games.items() if game["samples"]]
    data = {"name": folder.name, "sets": sets, "compare": [], "sortable": True}
    write_text(folder / "sweep.html", html_page(folder.name, page(report="report.html"), "", figures, **data))
    _print(rows, settings, tracker.console)
    if is_new:
        tracker.leaderboard(columns, [[row.get(column) for column in columns] for row in flat_rows], drawn)
    tracker.say(f"leaderboard: {folder / 'sweep.md'} and sweep.html")
    return sum(row["status"] != "done" for row in rows)


def _flatten(row: dict) -> dict:
    """Return the row with each interval split into two columns, `<measure>_low` and `<measure>_high`."""
    flat: dict = {}
    for key, value in row.items():
        name = key.removesuffix("_interval")
        flat |= {key: value} if name == key else {f"{name}_low": value[0], f"{name}_high": value[1]}
    return flat


def _order(rows: Sequence[dict]) -> str | None:
    """Return the sort order, "classifier AUC on validation prompts, nearest to 0.5 first"; None for unsorted rows."""
    if (order := sorted_by(rows)) is None:
        return None
    key, measure = order
    first = {"lower": "lowest", "higher": "highest", "near": f"nearest to {measure.ideal}"}[measure.better or ""]
    where = " on validation prompts" if key != measure.name and measure.name in MEASURES else ""
    return f"{measure.title}{where}, {first} first"


def _notes(rows: Sequence[dict]) -> list[str]:
    counts = [row["n"] for row in rows if "n" in row]
    return missing_prompts(min(counts)) if counts else []


def _title(row: dict) -> str:
    return {"point": "", "mean": "mean", "start": f"start ({row.get('policy')})"}[row["kind"]]


def _label(row: dict, settings: Sequence[str]) -> str:
    return ", ".join(f"{key}={row[key]}" for key in settings)


def _games(rows: Sequence[dict], settings: Sequence[str]) -> dict[str, dict]:
    """Return the content of game.json of each finished point, by the point's settings, best point first."""
    done = [row for row in rows if row["kind"] == "point" and row["status"] == "done"]
    return {_label(row, settings): json.loads((Path(row["folder"]) / "game.json").read_bytes()) for row in done}


def _samples(label: str, samples: Sequence[dict]) -> dict:
    """Return the samples in a point's game.json as a sample set for sweep.html."""
    rows = []
    for sample in samples:
        answers = [{"text": text} for text in (sample["real"], *sample["answers"].values())]
        rows.append({"id": sample["prompt"], "prompt": sample["prompt"], "answers": answers})
    return {"name": label, "labels": ["human", *samples[0]["answers"]], "total": len(rows), "rows": rows}


def _print(rows: Sequence[dict], settings: Sequence[str], console: Console) -> None:
    measures = ranking_measures(rows)
    title = f"Sweep, {sum(row['kind'] == 'point' for row in rows)} points"
    table = measure_table(title + (f" ({order})" if (order := _order(rows)) else ""))
    for key in settings:
        table.add_column(Text(f"\n{key}"), overflow="fold")
    for heading in [measure.heading for measure in measures] or [""]:
        table.add_column(heading, justify="right" if measures else "left", no_wrap=True)
    lines = _notes(rows)
    for row in rows:
        cells = [str(row.get(key, "")) for key in settings]
        if row["kind"] == "start" and settings:
            cells = [_title(row), *[""] * (len(settings) - 1)]
        if row["status"] == "done":
            values = [measure.cell(row, "\n{}, {}") for measure in measures] or ["done"]
        else:
            values = [row["status"], *[""] * (len(measures) - 1)]
            point = _label(row, settings) or "the point"
            lines.append(f"{point}: {row['status']}: {brief(row['reason'], 400)}")
        table.add_row(*map(Text, (*cells, *values)))
    console.print(table)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
