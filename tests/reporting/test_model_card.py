"""Tests of model cards: each policy's card has its metadata and measures and is beside its files, not in the store."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from spin.evaluation.measure_table import MEASURES
from spin.models.policy import Policy
from spin.reporting.model_card import MARK, card_text, is_hub_name
from spin.runtime.artifacts import verify_artifact
from tests.config.test_schema import load
from tests.games import Place

GAME = ["data.validation=8", "schedule.sft_epochs=1"]


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("card"), games)
    place.play(*GAME)
    return place


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_every_policy_has_its_card(played):
    run = played.folder / "run"
    game = json.loads((run / "game.json").read_text())
    for row in game["evaluations"][1:]:
        folder = run / row["policy"] / "policy"
        assert AutoModelForCausalLM.from_pretrained(folder)
        page = card(folder)
        assert page.data.library_name == "transformers" and page.data.pipeline_tag == "text-generation"
        assert page.text.strip().startswith(MARK) and f"# smoke, {row['policy']}" in page.text
        for name in ("nll_per_token", "rouge_l", "human_likelier"):
            measure = MEASURES[name]
            line = next(line for line in page.text.splitlines() if line.startswith(f"| {measure.title} ("))
            assert line.split(" | ")[-1].rstrip(" |") == measure.cell(row, " [{}, {}]")
        assert "Not measured: classifier AUC: needs 40 held-out prompts, there are 8;" in page.text
        rounds = [line for line in page.text.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
        assert len(rounds) == {"sft": 0, "iter0": 1, "iter1": 2}[row["policy"]]
    selected = game["selected"]["policy"]
    assert f"# smoke, {selected}\n" in card(run / "best" / "policy").text
    assert "Selected: " in card(run / "best" / "policy").text
    assert str(played.folder) not in "".join(path.read_text() for path in run.glob("*/policy/README.md"))


def test_no_cards_in_the_store(played):
    folders = [path.parent for path in (played.folder / "store").glob("*/*/manifest.json")]
    assert folders and all(verify_artifact(folder) for folder in folders)
    assert not list((played.folder / "store").rglob("README.md"))


def test_cards_of_the_user(played):
    run = played.folder / "run"
    own_card, best, last = (run / place / "policy" / "README.md" for place in ("iter0", "best", "iter1"))
    own_card.write_text("My own words.")
    best.write_text(best.read_text().replace(MARK, "<!-- mine"))
    text = best.read_text()
    last.write_text("truncat" + MARK)
    played.play(*GAME)
    assert own_card.read_text() == "My own words." and best.read_text() == text and "# smoke, iter1" in last.read_text()
    played.play(*GAME, "iter=0")
    assert not last.parent.parent.exists() and own_card.read_text() == "My own words."


def test_adapter_and_merged_model(played):
    played.play(*GAME, "iter=0", "model.adapter=lora", "model.merge=true", run="lora")
    adapter, merged = (card(played.folder / "lora" / "best" / name) for name in ("policy", "merged"))
    assert adapter.data.library_name == "peft" and "lora" in adapter.data.tags and "A LoRA adapter of" in adapter.text
    assert merged.data.library_name == "transformers" and "AutoModelForCausalLM" in merged.text
    played.play(*GAME, "iter=0", "model.adapter=lora", run="lora")
    assert not (played.folder / "lora" / "best" / "merged").exists()


GAME_JSON: dict = {"iterations": [], "evaluations": [], "external": [], "selected": None, "data": {"train": 3}}
HUB = "alignment-handbook/zephyr-7b-sft-full"


@pytest.mark.parametrize(
    ("words", "start", "expected"),
    [
        ([], "", ("HuggingFaceTB/SmolLM2-135M-Instruct", None, "apache-2.0", "finetune")),
        (["model=zephyr", "data=ultrachat"], "", (HUB, ["HuggingFaceH4/ultrachat_200k"], None, "finetune")),
        (["model=zephyr"], "---\nlicense: mit\n---\n", (HUB, None, "mit", "finetune")),
        (["model.path=HERE"], "---\nbase_model: a/b\nlicense: mit\n---\n", ("a/b", None, "mit", "finetune")),
        (["model.path=HERE"], "---\n: [\n---\nbroken", (None, None, None, None)),
        (["model.path=HERE", "data=local", "data.path=HERE"], "no metadata", (None, None, None, None)),
    ],
)
def test_base_data_and_licence(words, start, expected, tmp_path):
    if start:
        (tmp_path / "README.md").write_text(start)
    config = load(*(word.replace("HERE", str(tmp_path)) for word in words))
    text = card_text("iter0", tmp_path, GAME_JSON, config, Policy("start", tmp_path, "id"))
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license, data.get("base_model_relation")) == expected
    assert ("licence of the starting model could not be determined" in text) == (expected[2] is None)
    assert str(tmp_path) not in text and "Nothing was measured" in text


def test_external_results(tmp_path):
    task = {"task": "truthfulqa_mc2", "value": 0.5}
    external = [{"policy": "iter0", "harness": [task], "mt_bench": {"score": None}}]
    text = card_text("iter0", tmp_path, GAME_JSON | {"external": external}, load(), Policy("start", tmp_path, "id"))
    assert "- truthfulqa\\_mc2: 50.0 %\n- MT-Bench: –\n\nNot measured: safety, social bias" in text


@pytest.mark.parametrize("path", [None, "builtin:tiny", "/a/b", "a/b/c", "tests/games.py", "name"])
def test_no_hub_name(path):
    assert not is_hub_name(path) and is_hub_name("org/Model-7b.v1")
