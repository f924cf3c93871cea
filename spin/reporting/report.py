"""The report of a run as Markdown and HTML: tables, figures and samples from its folder and game.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from spin.evaluation.measure_table import COMPARED, MEASURES, Measure, is_known, show
from spin.reporting.figures import STYLE, draw_lengths, draw_logps, draw_margins, draw_measures, save_figures
from spin.reporting.html_page import html_page
from spin.reporting.pages import render
from spin.runtime.files import write_text


def write_report(folder: Path, game: dict, sets: Sequence[dict] = (), status: str | None = None) -> Path:
    """Write `folder/report.html` and, after the run, `report.md` with `figures/*.png`. Return the path of report.md.

    `game` is the content of game.json. Figures are drawn from metrics.jsonl, `iter<t>/pairs.parquet` and
    `iter<t>/margins.json` in `folder`, and omitted if these are missing. `sets` are the samples for report.html
    (`spin.reporting.samples`). `status` describes the current activity of an unfinished run.
    """
    iterations, page = game["iterations"], folder / "report.md"
    with matplotlib.rc_context(STYLE):
        figures = {
            "measures": draw_measures(game["evaluations"]),
            "logps": draw_logps(_train_rows(folder), iterations),
            "margins": draw_margins(folder, iterations),
            "lengths": draw_lengths(folder, iterations),
        }
        if status is None:
            save_figures(folder, figures)
    drawn = [name for name, figure in figures.items() if figure is not None]
    head = render("report_head.md", game=game, status=status, result=conclude(game, status is None))
    body = _render("report_body.md", game, drawn=drawn)
    compared = [game["differences"][0][key] for key in ("against", "policy")] if game["differences"] else [None, None]
    compared[1] = game["selected"]["policy"] if game["selected"] else compared[1]
    data = {"name": game["name"], "sets": sets, "compare": compared, "live": status is not None}
    write_text(folder / "report.html", html_page(game["name"], head, body, figures, **data))
    if status is None:
        samples = render("samples.md", samples=game["samples"])
        write_text(page, f"{head}{body}{samples}".rstrip("\n") + "\n")
    return page


def _train_rows(folder: Path) -> dict[int, list[dict]]:
    """Return the rows of metrics.jsonl for training steps, by iteration."""
    path = folder / "metrics.jsonl"
    rows: dict[int, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        if row.get("stage") == "train":
            rows.setdefault(row["iter"], []).append(row)
    return rows


def conclude(game: dict, ended: bool = True) -> str:
    """Return the section "Result": whether self-play helped, how much, on how many prompts, and which policy to use."""
    first = game["differences"][0] if game["differences"] else None
    verdicts = {row["verdict"] for row in first["measures"].values()} if first else set()
    return _render("result.md", game, ended=ended, first=first, better="better" in verdicts, worse="worse" in verdicts)


def _render(template: str, game: dict, **values: Any) -> str:
    functions = (describe_selection, known_changes, paper_values, verdict)
    return render(template, game=game, **values, **{function.__name__: function for function in functions})


def describe_selection(selected: dict) -> str:
    """Return which policy was selected, by which value, and whether it is the last.

    Example: "iter0, not the last (iter1); classifier AUC 0.63 [0.55, 0.70] on 96 validation prompts".
    """
    measure = MEASURES.get(selected["measure"])
    benchmark = "mean of the benchmarks" if selected["measure"] == "harness" else f"benchmark {selected['measure']}"
    title = measure.title if measure else benchmark
    value = show(selected["value"], selected["interval"], measure.format if measure else ".3f")
    rank = "the last policy" if selected["policy"] == selected["last"] else f"not the last ({selected['last']})"
    prompts = "validation prompts" if measure else "questions"
    return f"{selected['policy']}, {rank}; {title} {value} on {selected['n']:,} {prompts}"


def paper_values(row: dict) -> list[float]:
    """Return the paper's values (percent) for a policy's benchmarks, in order; none unless all were run as in the paper."""
    paper, tasks = row["paper"] or {}, row["harness"]
    keys = [f"{task['task']}:{task['shots']}:{task['metric']}" for task in tasks]
    has_all = paper.keys() >= set(keys) and not any(task.get("limit") for task in tasks)
    return [paper[key] for key in keys] if has_all else []


def known_changes(difference: dict) -> list[tuple[Measure, dict]]:
    """Return the measures with a known difference between two policies, each with its entry in `difference`."""
    changes = [(measure, difference["measures"].get(measure.name)) for measure in COMPARED]
    return [(measure, change) for measure, change in changes if change and is_known(change["change"])]


def verdict(difference: dict) -> str:
    """Return a sentence on the measures in which two policies differ, according to the intervals of the differences."""
    measures: dict[str, list[str]] = {"better": [], "worse": [], "same": []}
    for measure, change in known_changes(difference):
        values = "" if change["verdict"] == "same" else f" ({change['first']:.3f} → {change['last']:.3f})"
        measures[change["verdict"]].append(measure.title + values)
    pair = f"{difference['policy']} against {difference['against']}, n={difference['n']:,}"
    if not measures["better"] and not measures["worse"]:
        return f"{pair}: no difference seen, the intervals of all differences contain 0."
    labels = {"better": "better in ", "worse": "worse in ", "same": "no difference seen in "}
    return f"{pair}: " + "; ".join(labels[key] + ", ".join(titles) for key, titles in measures.items() if titles) + "."
