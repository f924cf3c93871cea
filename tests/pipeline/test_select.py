"""Tests of the selection of a policy on validation prompts: its folder in a run, early stopping, and sweeps."""

import csv
import json
import shutil

import pyarrow.parquet as pq
import pytest

from spin.models.policy import content_id
from tests.games import Place
from tests.wandb_log import runs


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("select"), games)
    place.play("data.validation=8", "iter=2", "optimizer.lr=3e-3")
    return place


def game_of(place: Place, run: str = "run") -> dict:
    return json.loads((place.folder / run / "game.json").read_text())


def test_game_names_its_best_policy(played):
    folder, game = played.folder / "run", game_of(played)
    assert [row["policy"] for row in game["validations"]] == ["start", "sft", "iter0", "iter1", "iter2"]
    best = min(game["validations"], key=lambda row: row["nll_per_token"])  # too few prompts for the classifier
    selected = game["selected"]
    assert (selected["policy"], selected["measure"], selected["n"]) == (best["policy"], "nll_per_token", 8)
    assert selected["value"] == best["nll_per_token"] and selected["interval"] == best["nll_per_token_interval"]
    assert selected["last"] == "iter2" and json.loads((folder / "best" / "selection.json").read_text()) == selected
    assert content_id(folder / "best" / "policy") == content_id(folder / selected["path"])
    report = (folder / "report.md").read_text()
    assert "## Selected policy" in report and f"{best['policy']}, " in report
    assert all(row["nll_per_token"] != best["nll_per_token"] for row in game["evaluations"])


def test_last_line_names_the_best(played):
    done = played.play("data.validation=8", "iter=2", "optimizer.lr=3e-3")
    assert "nothing was computed again" in done.stdout
    line = done.stdout.strip().splitlines()[-1]
    selected = game_of(played)["selected"]
    assert line.startswith("selected model: ") and f"best/policy: {selected['policy']}, " in line
    assert f"{selected['value']:.3f}" in line and "8 validation prompts" in line
    assert ("not the last (iter2)" in line) == (selected["policy"] != "iter2")


def test_prompts_are_disjoint(played):
    played.play("evaluation.bootstrap=50", "iter=0", run="plain")

    def prompts(kind: str) -> set[tuple[str, ...]]:
        """Return the prompts of every artifact of a stage."""
        name = "pairs.parquet" if kind == "score" else "held_out.parquet"
        tables = [pq.read_table(path) for path in (played.folder / "store" / kind).glob(f"*/{name}")]
        return {tuple(sorted(set(table["prompt"].to_pylist()))) for table in tables}

    (validation,), (evaluation,) = (
        prompts("validate"),
        prompts("evaluate"),
    )  # one set each, the same for every policy
    assert len(validation) == len(evaluation) == 8  # the held-out prompts are the same without validation
    trained = {prompt for pairs in prompts("score") for prompt in pairs}
    assert not set(validation) & set(evaluation)
    with_validation = [set(pairs) for pairs in prompts("score") if not set(pairs) & set(validation)]
    assert with_validation and not set(evaluation) & trained


def test_start_can_be_best(played):
    """If the start is selected, its path is named, and best/ does not contain it, because its folder is the user's."""
    done = played.play("data.validation=8", "iter=0", "schedule.sft_epochs=0", "optimizer.lr=1", run="spoiled")
    folder, selected = played.folder / "spoiled", game_of(played, "spoiled")["selected"]
    assert selected["policy"] == "start" and selected["last"] == "iter0"
    assert [path.name for path in (folder / "best").iterdir()] == ["selection.json"]
    assert f"selected model: {selected['path']}: start, not the last (iter0)" in done.stdout.replace("\n", " ")


def test_start_that_is_a_policy(played):
    """A selected start is named by its full path, even if that ends like the paths of this run's policies."""
    start = played.folder / "run" / "iter0" / "policy"
    words = [f"model.path={start}", "data.validation=8", "iter=0", "schedule.sft_epochs=0", "optimizer.lr=1"]
    done = played.play(*words, run="continued")
    selected = game_of(played, "continued")["selected"]
    assert (selected["policy"], selected["path"]) == ("start", str(start))
    assert f"selected model: {start}: start, not the last" in " ".join(done.stdout.split())


def test_stop_without_gain_and_resume(played):
    words = ["data.validation=8", "optimizer.lr=1", "iter=3"]  # every step makes it worse
    done = played.play(*words, "schedule.stop=no_gain", run="stopped")
    assert "iteration 0 gained nothing over sft" in done.stdout
    game, before = game_of(played, "stopped"), played.stages()
    assert len(game["iterations"]) == 1 and game["selected"]["policy"] == "sft"
    played.play(*words, "schedule.stop=no_gain", "schedule.patience=2", run="stopped")
    new = played.stages() - before
    assert (new["generate"], new["score"], new["train"]) == (1, 1, 1) and "sft" not in new
    assert (played.folder / "stopped" / "iter1" / "policy").exists()
    done = played.play(*words, "schedule.stop=no_gain", run="stopped")
    assert "nothing was computed again" in done.stdout
    assert not (played.folder / "stopped" / "iter1").exists()  # it is from the longer game, and remains in the store


def test_without_selection_no_best(played):
    shutil.copytree(played.folder / "run", played.folder / "unselected")
    (played.folder / "unselected" / "best" / "mine.txt").write_text("mine")
    (played.folder / "unselected" / "config.yaml").unlink()  # otherwise the folder would be refused as another game's
    done = played.play("iter=0", run="unselected")
    assert game_of(played, "unselected")["selected"] is None and "trained model: " in done.stdout
    assert [path.name for path in (played.folder / "unselected" / "best").iterdir()] == ["mine.txt"]


def test_select_by_benchmark(played):
    words = ["evaluation.harness=[spin_choice:0:acc]", "evaluation.harness_include=tests/tasks"]
    played.play(*words, "evaluation.select=spin_choice", "iter=0", run="benchmark")
    game = game_of(played, "benchmark")
    values = {row["policy"]: row["harness"][0]["value"] for row in game["external"]}
    selected = game["selected"]
    assert selected["value"] == max(values.values()) == values[selected["policy"]] and selected["interval"] is None
    assert "benchmark spin\\_choice" in (played.folder / "benchmark" / "report.md").read_text()


def test_merged_adapter_is_that_of_the_best(played):
    words = ["data.validation=8", "model.adapter=lora", "model.merge=true", "optimizer.lr=1", "iter=1"]
    plan = played.play(*words, "plan=true", run="merged")
    assert "merge" in plan.stdout and "the final policy" in plan.stdout
    played.play(*words, run="merged")
    folder = played.folder / "merged"
    assert game_of(played, "merged")["selected"]["policy"] == "sft"
    assert (folder / "best" / "merged" / "model.safetensors").exists() and (folder / "sft" / "merged").exists()
    assert not (folder / "iter1" / "merged").exists()
    repeated = played.play(*words, run="merged")
    assert "nothing was computed again" in repeated.stdout and "memory needed" not in repeated.stdout
    evaluation = ["stage=evaluate", "model.adapter=lora", "model.merge=true", "plan=true"]
    assert "merge" not in played.play(*evaluation, run="none").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.validation=8", "evaluation.select=diversity"], "it does not rank policies here; choose one of classi"),
        (
            ["data.validation=8", "evaluation.select=classifier_auc"],
            "needs data.validation of 40 or more prompts, there",
        ),
        (["data.validation=8", "evaluation.select=exact_match"], "evaluation.select=exact_match: needs data.check"),
        (["evaluation.select=nll_per_token"], "needs data.validation of 1 or more prompts, there are 0"),
        (["schedule.stop=no_gain"], "schedule.stop=no_gain: needs data.validation of 1 or more"),
        (["data.validation=8", "evaluation.select=harness"], "evaluation.select=harness: it does not rank policies"),
        (["data.validation=40"], "data: too little is left"),
    ],
)
def test_invalid_settings(played, words, message):
    before = played.stages()
    done = played.play(*words, "iter=0", run="invalid", status=1)
    assert message in done.stderr and done.stderr.count("\n") == 1 and played.stages() == before


def test_sweep_ranks_by_validation(played):
    folder = played.folder / "sweep"
    words = ["-m", "data.validation=8", "iter=1", "optimizer.lr=1e-3,3e-3,1", f"hydra.sweep.dir={folder}"]
    done = played.play(*words)
    with (folder / "sweep.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "point"]
    values = [float(row["validation_nll_per_token"]) for row in rows]
    assert values == sorted(values) and rows[-1]["optimizer.lr"] == "1" and rows[-1]["policy"] == "sft"
    for row in rows:
        game = json.loads((folder.parent.parent / row["folder"] / "game.json").read_text())
        assert (
            row["policy"] == game["selected"]["policy"]
            and float(row["validation_nll_per_token"]) == game["selected"]["value"]
        )
        (evaluation,) = [e for e in game["evaluations"] if e["policy"] == row["policy"]]
        assert float(row["nll_per_token"]) == evaluation["nll_per_token"]
    page = (folder / "sweep.md").read_text()
    assert "Sorted by NLL of human answers on validation prompts, lowest first" in page and "selected policy" in page
    assert "on validation prompts, lowest first" in " ".join(done.stdout.split())


def test_wandb_has_the_best(played):
    words = ("data.validation=8", "iter=0", "loss.beta=0.3", "tracking.wandb=offline", "tracking.policies=best")
    played.play(*words, run="wandb")
    (log,) = runs(played.folder / "wandb")
    game = game_of(played, "wandb")
    selected, start = game["selected"], game["selected"]["policy"] == "start"
    for key in ("policy", "value", "path"):
        assert log.summary[f"selected/{key}"] == selected[key]
    (evaluation,) = [e for e in game["evaluations"] if e["policy"] == selected["policy"]]
    assert log.summary["selected/nll_per_token"] == evaluation["nll_per_token"]
    assert any("validate/nll_per_token" in row for row in log.rows)
    policies = {name: files for name, files in log.artifacts.items() if "samples" not in name}
    assert start or [name.rpartition("-")[2] for name in policies] == [selected["policy"]]
    assert all("model.safetensors" in files for files in policies.values())
