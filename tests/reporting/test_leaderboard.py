"""Tests of the rows and the figure of a sweep, from folders of fabricated points."""

import io
import json
from pathlib import Path
from statistics import mean, stdev

import pytest
from rich.console import Console

from spin.evaluation.measure_table import MEASURES
from spin.pipeline.points import record_status
from spin.reporting.leaderboard import write_leaderboard
from spin.reporting.sweep_figures import draw
from spin.reporting.sweep_rows import Point, rows_of
from spin.runtime.tracking import Tracker


def game(nll: float, start: float = 2.0, **more) -> dict:
    row = {"n": 8, "nll_per_token": nll, "nll_per_token_interval": [nll - 0.1, nll + 0.1], "human_length": 9.0, **more}
    return {
        "command": f"python run.py loss.beta={nll}",
        "evaluations": [
            {"policy": "sft", "iter": None, "n": 8, "nll_per_token": start},
            {"policy": "iter0", "iter": 0, **row},
        ],
        "iterations": [{"iter": 0}],
        "external": [],
        "selected": None,
        "differences": [],
        "samples": [],
    }


def points_of(tmp_path: Path, games: dict) -> list[Point]:
    points = []
    for number, (settings, content) in enumerate(games.items()):
        folder = tmp_path / str(number)
        record_status(folder, "done")
        (folder / "game.json").write_text(json.dumps(content))
        points.append(Point(dict(settings), folder))
    return points


def test_means_over_seeds(tmp_path):
    values = {("0.1", "0"): 1.5, ("0.1", "1"): 1.7, ("0.1", "2"): 1.3, ("1", "0"): 1.1, ("1", "1"): 1.2}
    games = {(("loss.beta", b), ("seed", s)): game(v, start=float(s)) for (b, s), v in values.items()}
    points = [*points_of(tmp_path, games), Point({"loss.beta": "1", "seed": "2"}, tmp_path / "x", "it broke")]
    rows = rows_of(points)
    assert [row["kind"] for row in rows] == ["point"] * 6 + ["mean"] * 2
    best, second = rows[6:]
    assert best["loss.beta"] == "1" and best["seeds"] == 2 and second["seeds"] == 3
    assert second["nll_per_token"] == pytest.approx(mean([1.5, 1.7, 1.3]))
    assert second["nll_per_token_se"] == pytest.approx(stdev([1.5, 1.7, 1.3]) / 3**0.5)
    assert best["nll_per_token_se"] == pytest.approx(0.05)
    assert [row["nll_per_token"] for row in rows[:5]] == sorted(values.values())
    assert rows[5]["status"] == "failed" and rows[5]["reason"] == "it broke"
    ((name, figure),) = draw(rows).items()
    assert name == "lines" and len(figure.axes) == 1
    (line,), (bars,) = figure.axes[0].lines, figure.axes[0].collections
    assert line.get_xydata().tolist() == [[0.1, pytest.approx(1.5)], [1.0, pytest.approx(1.15)]]
    assert bars.get_segments()[1][:, 1].tolist() == pytest.approx([1.10, 1.20])


def test_interval_without_its_value(tmp_path):
    """An interval is drawn as given even if its value lies outside, as with bootstrap intervals of MAUVE."""
    games = {(("beta", str(beta)),): game(1.0, nll_per_token_interval=[0.5, 0.9]) for beta in (1, 2)}
    figure = draw(rows_of(points_of(tmp_path, games)))["lines"]
    assert figure.axes[0].collections[0].get_segments()[0][:, 1].tolist() == [0.5, 0.9]


def test_heat_map_cells(tmp_path):
    values = {("0.5", "1e-07"): 1.5, ("0.5", "0.0005"): 1.7, ("2", "1e-07"): 1.25}
    games = {(("a", a), ("b", b)): game(value) for (a, b), value in values.items()}
    rows = rows_of([*points_of(tmp_path, games), Point({"a": "2", "b": "0.0005"}, None, "no")])
    assert rows[-1] | {"kind": "start", "policy": "sft", "nll_per_token": 2.0} == rows[-1]
    ((name, figure),) = draw(rows).items()
    assert name == "heatmap"
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-07", "0.0005"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.5", "2"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "1.500", (1, 0): "1.700", (0, 1): "1.250", (1, 1): "–"}


def test_not_drawn(tmp_path):
    named_settings = {(("loss", name), ("data", "x")): game(1.0) for name in ("hinge", "logistic")}
    assert not draw(rows_of(points_of(tmp_path, named_settings)))
    three_settings = {(("a", "1"), ("b", str(b)), ("c", "3")): game(1.0) for b in range(2)}
    assert not draw(rows_of(points_of(tmp_path, three_settings)))
    assert not draw(rows_of([Point({"a": "1"}, None, "no"), Point({"a": "2"}, None, "no")]))


def test_benchmarks_in_rows(tmp_path):
    record = game(1.0)
    harness = [{"task": "gsm8k", "value": 0.4, "stderr": 0.01}]
    record["external"] = [{"policy": "iter0", "harness": harness, "mt_bench": {"score": 6.5}}]
    (row, _) = rows_of(points_of(tmp_path, {(): record}))
    assert row["gsm8k"] == 0.4 and row["gsm8k_se"] == 0.01 and row["mt_bench"] == 6.5


def test_benchmarks_of_the_selected_policy(tmp_path):
    """The selected policy's benchmarks are in the row even if nothing was measured on held-out prompts."""
    record = game(1.0) | {"evaluations": []}
    record["external"] = [
        {"policy": f"iter{t}", "harness": [{"task": "gsm8k", "value": value, "stderr": 0.01}], "mt_bench": None}
        for t, value in enumerate((0.4, 0.3))
    ]
    record["selected"] = {"policy": "iter0", "measure": "gsm8k", "value": 0.4}
    (row,) = rows_of(points_of(tmp_path, {(): record}))
    assert row["policy"] == "iter0" and row["gsm8k"] == row["validation_gsm8k"] == 0.4


def test_notes_on_few_prompts(tmp_path):
    points = points_of(tmp_path, {(("a", str(a)),): game(1.0 + a) for a in range(2)})
    output = io.StringIO()
    tracker = Tracker(tmp_path, name="", config={}, wandb="disabled", console=Console(file=output, width=100))
    assert write_leaderboard(tmp_path / "sweep", [*points, Point({"a": "2"}, None, "no")], tracker) == 1
    note = f"MAUVE: needs {MEASURES['mauve'].min_prompts} held-out prompts, there are 8"
    assert note in output.getvalue() and note in (tmp_path / "sweep" / "sweep.md").read_text()
    assert "a=2: failed: no" in output.getvalue()
