"""The console summary of a run: the measures of every policy, their differences, and sample answers side by side."""

import math
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spin.evaluation.measure_table import known_measures, missing_prompts, show
from spin.reporting.report import verdict
from spin.reporting.text import shorten


def print_summary(game: dict, console: Console) -> None:
    """Print the summary of `game`, the content of game.json."""
    if game["evaluations"]:
        for template, note in (("\n{}, {}", "below: 95 % intervals"), ("", "intervals are in the report")):
            table = _measures_table(game["evaluations"], template, note)
            if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
                break
        console.print(table)
        for sentence in (*missing_prompts(game["evaluations"][-1]["n"]), *map(verdict, game["differences"])):
            console.print(Text(sentence))
    for row in game["external"]:
        if row["harness"]:
            shown = ", ".join(f"{task['task']} {task['value'] * 100:.1f}" for task in row["harness"])
            console.print(Text(f"{row['policy']}: {shown} (percent)"))
        if row["mt_bench"]:
            console.print(Text(f"{row['policy']}: MT-Bench {show(row['mt_bench']['score'], None, '.2f')}"))
        if row["comparison"]:
            console.print(Text(row["comparison"]["finding"]))
    if game["samples"]:
        _print_sample(game["samples"][0], console)


def _measures_table(evaluations: Sequence[dict], template: str, note: str) -> Table:
    table = measure_table(f"Held-out measures, {evaluations[-1]['n']:,} prompts ({note})")
    measures = [measure for measure in known_measures(evaluations) if measure.heading]
    table.add_column("\npolicy", no_wrap=True)
    for measure in measures:
        table.add_column(measure.heading, justify="right", no_wrap=True)
    for row in evaluations:
        table.add_row(Text(row["policy"]), *(Text(measure.cell(row, template)) for measure in measures))
    return table


def measure_table(title: str) -> Table:
    """Return an empty table in the common style of tables of measures."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _print_sample(sample: dict, console: Console) -> None:
    console.print()
    console.print(Text("Prompt: ", style="bold").append(shorten(sample["prompt"], 400), style="not bold"))
    answers = {"human": sample["real"], **sample["answers"]}
    # Columns narrower than about 24 characters are illegible, so the answers are split into several tables.
    tables = math.ceil(len(answers) / max(1, console.width // 26))
    for policies in np.array_split(list(answers), tables):
        table = Table(expand=True)
        for policy in policies:
            table.add_column(Text(policy), ratio=1, overflow="fold")
        table.add_row(*(Text(shorten(answers[policy], 500)) for policy in policies))
        console.print(table)
