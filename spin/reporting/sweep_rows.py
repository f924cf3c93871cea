"""The rows of a sweep's table, read from the folders of its points."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spin.evaluation.measure_table import MEASURES, Measure, is_known, ranking_measures

VALIDATION = "validation_"  # prefix of the column that points are sorted by
RECORD = "point.json"  # in a point's folder: its status, and a hash of its configuration


@dataclass(frozen=True)
class Point:
    """One point of a sweep: the values of the swept settings, its folder (None if it could not be composed), and the
    reason why it has no result, if this is known without the folder."""

    swept: dict[str, str]
    folder: Path | None
    problem: str | None = None


def read_record(folder: Path) -> dict:
    """Return the latest record of `pipeline.points.record_status`; an empty one if it is missing or unreadable."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def rows_of(points: Sequence[Point]) -> list[dict]:
    """Return the table, best point first: rows of kind "point", "mean" (over seeds, if `seed` is swept) and "start".

    A point's row has its swept settings, status (done, failed, unfinished), reason, and the held-out measures, with
    intervals, of its selected policy or else its last one. Points are sorted by the value that selected their policies
    (`validation_<measure>`), which is independent of the held-out measures, or else by the first held-out measure. A
    "mean" row has the means over points that differ only in the seed, their number `seeds`, and standard errors
    `<measure>_se`. There is a "start" row if all points share the policy that self-play started from.
    """
    played = [_read_point(point) for point in points]
    rows = [row for row, _ in played]
    order = sorted_by(rows)

    def badness(row: dict) -> float:
        value = row.get(order[0]) if order else None
        return order[1].badness(value) if order and is_known(value) else math.inf

    table = sorted(rows, key=badness) + sorted(_means_over_seeds(rows), key=badness)
    starts = [start for _, game in played if game and (start := _start(game))]
    if len({json.dumps(start) for start in starts}) == 1:
        table.append({"kind": "start", "status": "done", **starts[0]})
    return table


def sorted_by(rows: Sequence[dict]) -> tuple[str, Measure] | None:
    """Return the column that the rows are sorted by, and its measure; None if there is no such column."""
    for key in (key for row in rows for key in row if key.startswith(VALIDATION)):
        name = key.removeprefix(VALIDATION)
        return key, MEASURES.get(name, Measure(name, name, "share", "", better="higher"))
    ranking = ranking_measures(rows)
    return (ranking[0].name, ranking[0]) if ranking else None


def settings_of(rows: Iterable[dict]) -> list[str]:
    """Return the swept settings: the keys of a point's row between `kind` and `status`."""
    keys = list(next(row for row in rows if row["kind"] == "point"))
    return keys[1 : keys.index("status")]


def _read_point(point: Point) -> tuple[dict, dict | None]:
    """Return the row of a point, and the content of its game.json if it is done."""
    folder, game = point.folder, None
    record = read_record(folder) if folder and not point.problem else {}
    row: dict[str, Any] = {"kind": "point", **point.swept, "status": "done", "reason": None}
    if folder and record.get("status") == "done":
        game = json.loads((folder / "game.json").read_bytes())
        row |= result(game)
    else:
        is_failed = point.problem or record.get("status") == "failed"
        reason = point.problem or record.get("reason") or "not played to its end: run the same command to continue"
        row |= {"status": "failed" if is_failed else "unfinished", "reason": reason}
    if folder and folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return row | {"folder": folder and str(folder)}, game


def result(game: dict) -> dict:
    """Return the results of the selected policy in game.json's content, or else of the last one: its label, the value
    that it was selected by, held-out measures and benchmarks."""
    row: dict[str, Any] = {}
    evaluations, selected = game["evaluations"], game["selected"]
    if selected:
        row |= {"policy": selected["policy"], f"{VALIDATION}{selected['measure']}": selected["value"]}
        evaluations = [evaluation for evaluation in evaluations if evaluation["policy"] == selected["policy"]]
    if evaluations:
        row |= _without_iter(evaluations[-1])
    for external in game["external"][::-1]:
        if external["policy"] == row.get("policy", external["policy"]):
            for task in external["harness"] or []:
                row |= {task["task"]: task["value"], f"{task['task']}_se": task["stderr"]}
            if external["mt_bench"]:
                row["mt_bench"] = external["mt_bench"]["score"]
            break
    return row


def _without_iter(evaluation: dict) -> dict:
    return {key: value for key, value in evaluation.items() if key != "iter"}


def _start(game: dict) -> dict | None:
    """Return the evaluation of the policy that self-play started from, if any."""
    before = [evaluation for evaluation in game["evaluations"] if evaluation["iter"] is None]
    return _without_iter(before[-1]) if before and game["iterations"] else None


def _means_over_seeds(rows: Sequence[dict]) -> list[dict]:
    """Return the means over finished points that differ only in the seed."""
    settings = [key for key in settings_of(rows) if key != "seed"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "seed" in row and row["status"] == "done":
            groups.setdefault(tuple(row[key] for key in settings), []).append(row)
    return [_mean_row(group, settings) for group in groups.values() if len(group) > 1]


def _mean_row(group: Sequence[dict], settings: Sequence[str]) -> dict:
    first, count = group[0], len(group)
    row = {"kind": "mean", **{key: first[key] for key in settings}, "seed": f"mean of {count}", "status": "done"}
    row["seeds"] = count
    for key in first:
        values: list[Any] = [point.get(key) for point in group]
        is_result = key in MEASURES or key.startswith(VALIDATION) or f"{key}_se" in first or key == "mt_bench"
        if is_result and all(map(is_known, values)):
            row |= {key: mean(values), f"{key}_se": stdev(values) / math.sqrt(count)}
    return row
