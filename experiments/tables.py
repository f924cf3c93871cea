"""Shared by all studies: the folder of runs, results.csv, intervals over seeds, and the style of series."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

RUNS = Path("outputs/studies")
# Okabe and Ito's colours, each with its own marker: distinguishable with any colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")

Row = dict[str, Any]
Where = dict[str, Any]


def write(rows: Sequence[Row], path: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def read(path: Path) -> list[Row]:
    """Return the rows of a results.csv, with numbers as float and empty cells as None."""

    def value(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def select(rows: Sequence[Row], where: Where) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its 95 % interval (Student's t), which is NaN for a single seed."""
    n = len(values)
    if n == 1:
        return float(values[0]), math.nan
    quantile = round(float(stats.t.ppf(0.975, n - 1)), 3)  # to the decimals of printed tables, as in published results
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def plain(number: float) -> str:
    """Return a number in the usual notation of settings: 3e-5, 0.1, 512."""
    return f"{number:.0e}".replace("e-0", "e-") if 0 < number < 1e-2 else f"{number:g}"
