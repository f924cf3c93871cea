"""Tests of the reports of a running and of a stopped game."""

import json

from spin.pipeline import live

# Before iteration 0 is trained, copy the report and run the test's code. Count how often the report is drawn.
SPY = """
import shutil
from spin.pipeline import live
from spin.pipeline.train import Train
from spin.runtime.errors import UserError

build, write_report, drawn = Train.build, live.write_report, []

def spied_write(folder, *args):
    drawn.append(1)
    (folder / "drawn").write_text(str(len(drawn)))
    return write_report(folder, *args)

live.write_report = spied_write

def spied(self, run, *args, **needs):
    shutil.copy(run.folder / "report.html", run.folder / "seen.html")
    {then}
    return build(self, run, *args, **needs)

Train.build = spied
"""


def data_of(page: str) -> dict:
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_report_of_a_running_game(place):
    done = place.games.play(*place.words("iter=0"), code=SPY.format(then=""))
    assert done.returncode == 0, done.stderr
    folder = place.folder / "run"
    running, page = (folder / "seen.html").read_text(), (folder / "report.html").read_text()
    assert "Running: iter 0: train, " in running and "Remaining after this stage: evaluate of iter 0." in running
    assert data_of(running)["live"] and [s["labels"] for s in data_of(running)["sets"]] == [["human", "start", "sft"]]
    assert "there is one policy so far" in running and running.count("Running:") == 1 and live.STATUS not in running
    assert (folder / "drawn").read_text() == "3"  # before the first stage, and after the measures of start and sft
    assert "Running" not in page and not data_of(page)["live"]
    sets = {samples["name"]: samples["labels"] for samples in data_of(page)["sets"]}
    assert sets == {
        "Held-out prompts": ["human", "start", "sft", "iter0"],
        "Training pairs of iteration 0": ["human", "sft"],
    }
    game = json.loads((folder / "game.json").read_text())
    assert game["data"]["dropped"].keys() <= game["data"]["counts"].keys()


def test_report_of_a_stopped_game(place):
    stop = "raise UserError('the disk is full of <b>cats</b>')"
    done = place.games.play(*place.words("iter=0", run="stopped"), code=SPY.format(then=stop))
    assert done.returncode == 1 and done.stderr.endswith("error: the disk is full of <b>cats</b>\n")
    page = (place.folder / "stopped" / "report.html").read_text()
    assert "Stopped: the disk is full of &lt;b&gt;cats&lt;/b&gt;; run the same command to continue" in page
    assert "Remaining: train of iter 0, evaluate of iter 0." in page
    assert not (place.folder / "stopped" / "report.md").exists()
