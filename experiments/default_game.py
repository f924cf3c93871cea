"""Print the change from the SFT policy to the selected one in the default game, over five seeds.

python run.py -m seed=0,1,2,3,4
python -m experiments.default_game          # prints the table; accepts the folder of another sweep
"""

import json
import sys
from pathlib import Path

from experiments.tables import mean_interval
from spin.evaluation.measure_table import COMPARED, Measure

FOLDER = Path("outputs/smollm2-sharegpt-sweep")


def read_games(folder: Path) -> list[tuple[dict, dict, str]]:
    """Return for each point the evaluations of the start of self-play and of the selected policy, and the seed."""
    games = []
    for page in sorted(folder.glob("*/game.json")):
        game = json.loads(page.read_text())
        if not game["selected"]:
            raise SystemExit(f"{page.parent} selected no policy: play the sweep with data.validation=96.")
        before = [row for row in game["evaluations"] if row["iter"] is None][-1]
        selected = next(row for row in game["evaluations"] if row["policy"] == game["selected"]["policy"])
        games.append((before, selected, page.parent.name.rpartition("seed=")[2]))
    if not games:
        raise SystemExit(f"{folder} has no finished game: run `python run.py -m seed=0,1,2,3,4` first.")
    return games


def table(games: list[tuple[dict, dict, str]]) -> str:
    """Return a table with a row "SFT → selected" per seed, and a row with the mean change over seeds."""
    measures = [measure for measure in COMPARED if all(measure.name in row for row, _, _ in games)]
    header = ["seed", "selected", *(measure.title for measure in measures)]
    rows = [
        [seed, selected["policy"], *(f"{m.show(before[m.name])} → {m.show(selected[m.name])}" for m in measures)]
        for before, selected, seed in games
    ]
    changes = ["mean change", "", *(mean_change(games, measure) for measure in measures)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows, changes])


def mean_change(games: list[tuple[dict, dict, str]], measure: Measure) -> str:
    """Return the mean change, half its 95 % interval over seeds, and a verdict: whether the interval excludes 0.

    For measures with an ideal value, the change of the distance from it.
    """
    sign = -1 if measure.better == "higher" else 1
    changes = [
        sign * (measure.badness(selected[measure.name]) - measure.badness(before[measure.name]))
        for before, selected, _ in games
    ]
    mean, half = mean_interval(changes)
    verdict = "not significant" if not abs(mean) > half else "better" if sign * mean < 0 else "worse"
    return f"{mean:+.3f} ± {half:.3f}, {verdict}"


if __name__ == "__main__":
    print(table(read_games(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)))
