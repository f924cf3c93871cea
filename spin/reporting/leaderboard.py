"""The leaderboard of a sweep: sweep.csv, sweep.md and sweep.html with a figure, the table on the console, and W&B."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.text import Text

from spin.evaluation.measure_table import MEASURES, missing_prompts
from spin.reporting.figures import STYLE, save_figures
from spin.reporting.html_page import html_page
from spin.reporting.pages import render
from spin.reporting.report import conclude
from spin.reporting.summary import measure_table
from spin.reporting.sweep_figures import draw
from spin.reporting.sweep_rows import Point, ranking_measures, rows_of, settings_of, sorted_by
from spin.runtime.errors import brief
from spin.runtime.files import write_text
from spin.runtime.tracking import Tracker


def write_leaderboard(folder: Path, points: Sequence[Point], tracker: Tracker, is_new: bool = True) -> int:
    """Write `sweep.csv`, `sweep.md`, `sweep.html` and `figures/` into the sweep's `folder`, print the table, and send it to W&B if
    something was played (`is_new`). Returns how many points have no result."""
    import pandas as pd

    rows = rows_of(points)
    with matplotlib.rc_context(STYLE):
        figures = draw(rows)
        drawn = list(save_figures(folder, {"heatmap": None, "lines": None, **figures}).values())
    flat_rows = [_flatten(row) for row in rows]
    columns = _columns(rows, flat_rows)
    table = pd.DataFrame(flat_rows, columns=columns, dtype=object)
    write_text(folder / "sweep.csv", table.to_csv(index=False))
    games = _games(rows)
    write_text(folder / "sweep.md", _page(folder, rows, games, list(figures), "report.md").rstrip("\n") + "\n")
    sets = [_samples(label, game["samples"]) for label, game in games.items() if game["samples"]]
    data = {"name": folder.name, "sets": sets, "compare": [], "sortable": True}
    page = html_page(folder.name, _page(folder, rows, games, list(figures), "report.html"), "", figures, **data)
    write_text(folder / "sweep.html", page)
    _print(rows, tracker.console)
    if is_new:
        tracker.leaderboard(columns, [[row.get(column) for column in columns] for row in flat_rows], drawn)
    tracker.say(f"leaderboard: {folder / 'sweep.md'} and sweep.html")
    return sum(row["status"] != "done" for row in rows)


def _flatten(row: dict) -> dict:
    """The row with two columns, `<measure>_low` and `<measure>_high`, for each interval."""
    flat: dict = {}
    for key, value in row.items():
        name = key.removesuffix("_interval")
        flat |= {key: value} if name == key else {f"{name}_low": value[0], f"{name}_high": value[1]}
    return flat


def _columns(rows: Sequence[dict], flat_rows: Sequence[dict]) -> list[str]:
    first = ["kind", *settings_of(rows), "status", "reason", "policy", "n", "seeds"]
    keys = dict.fromkeys(key for row in flat_rows for key in row)
    return [*(key for key in first if key in keys), *(key for key in keys if key not in (*first, "folder")), "folder"]


def _order(rows: Sequence[dict]) -> str | None:
    """What the rows are sorted by: "classifier AUC on validation prompts, nearest to 0.5 first"; None if by nothing."""
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


def _games(rows: Sequence[dict]) -> dict[str, dict]:
    """What game.json holds of each point that is done, by the point's settings, the best one first."""
    done = [row for row in rows if row["kind"] == "point" and row["status"] == "done"]
    labels = [", ".join(f"{key}={row[key]}" for key in settings_of(rows)) for row in done]
    return {
        label: json.loads((Path(row["folder"]) / "game.json").read_bytes())
        for label, row in zip(labels, done, strict=True)
    }


def _samples(label: str, samples: Sequence[dict]) -> dict:
    """The samples of a point's game.json as a set of sweep.html."""
    answers = [[{"text": text} for text in (sample["real"], *sample["answers"].values())] for sample in samples]
    rows = [{"id": s["prompt"], "prompt": s["prompt"], "answers": a} for s, a in zip(samples, answers, strict=True)]
    return {"name": label, "labels": ["human", *samples[0]["answers"]], "total": len(rows), "rows": rows}


def _page(folder: Path, rows: Sequence[dict], games: dict[str, dict], drawn: Sequence[str], report: str) -> str:
    """The sweep's page in Markdown; rows have a link to the `report` of their point."""
    return render(
        "sweep.md",
        name=folder.name,
        folder=folder,
        rows=rows,
        games=games,
        conclude=conclude,
        settings=settings_of(rows),
        measures=ranking_measures(rows),
        order=_order(rows),
        notes=_notes(rows),
        drawn=drawn,
        report=report,
        title=_title,
        relpath=os.path.relpath,
    )


def _print(rows: Sequence[dict], console: Console) -> None:
    settings, measures = settings_of(rows), ranking_measures(rows)
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
            point = ", ".join(f"{key}={row[key]}" for key in settings) or "the point"
            lines.append(f"{point}: {row['status']}: {brief(row['reason'], 400)}")
        table.add_row(*map(Text, (*cells, *values)))
    console.print(table)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
