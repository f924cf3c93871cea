"""What all studies share: where runs lie, results.csv, intervals over seeds, and how series are drawn."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RUNS = Path("outputs/studies")
# Okabe and Ito's colours, each with its own marker: told apart with any colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, two-sided, by seeds

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
    """The rows of a results.csv: numbers as numbers, what is empty as None."""

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
    """Mean over seeds, and half the width of its 95 % interval by Student's t. NaN width for a single seed."""
    n = len(values)
    half = T95[n] * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), half


def plain(number: float) -> str:
    """3e-5, 0.1, 512: as people write settings."""
    return f"{number:.0e}".replace("e-0", "e-") if 0 < number < 1e-2 else f"{number:g}"
