"""Print the change from the SFT policy to the selected one in the default game, over five seeds.

python run.py -m seed=0,1,2,3,4
python -m experiments.default_game          # prints the table; accepts the folder of another sweep
"""

import json
import sys
from pathlib import Path

import numpy as np

from spin.evaluation.measure_table import COMPARED, Measure

FOLDER = Path("outputs/smollm2-sharegpt-sweep")


def read_games(folder: Path) -> list[tuple[dict, dict, str]]:
    """Return for each point the evaluations of the start of self-play and of the selected policy, and the seed."""
    games = []
    for page in sorted(folder.glob("*/game.json")):
        game = json.loads(page.read_text())
        before = [row for row in game["evaluations"] if row["iter"] is None][-1]
        selected = next(row for row in game["evaluations"] if row["policy"] == game["selected"]["policy"])
        games.append((before, selected, page.parent.name.rpartition("seed=")[2]))
    return games


def table(games: list[tuple[dict, dict, str]]) -> str:
    """Return a table with a row "SFT → selected" per seed, and the mean change with its standard error over seeds."""
    measures = [measure for measure in COMPARED if all(measure.name in row for row, _, _ in games)]
    header = ["seed", "selected", *(measure.title for measure in measures)]
    rows = [
        [seed, selected["policy"], *(f"{m.show(before[m.name])} → {m.show(selected[m.name])}" for m in measures)]
        for before, selected, seed in games
    ]
    changes = ["mean change", "", *(mean_change(games, measure) for measure in measures)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows, changes])


def mean_change(games: list[tuple[dict, dict, str]], measure: Measure) -> str:
    """Return the mean change with its standard error, and a verdict: better or worse if it is larger than the error."""
    pairs = [(before[measure.name], selected[measure.name]) for before, selected, _ in games]
    changes = np.array([after - before for before, after in pairs])
    worse = np.array([measure.badness(after) - measure.badness(before) for before, after in pairs])
    error = worse.std(ddof=1) / len(worse) ** 0.5
    verdict = "better" if worse.mean() < -error else "worse" if worse.mean() > error else "same"
    return f"{changes.mean():+.3f} ± {changes.std(ddof=1) / len(changes) ** 0.5:.3f}, {verdict}"


if __name__ == "__main__":
    print(table(read_games(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)))
