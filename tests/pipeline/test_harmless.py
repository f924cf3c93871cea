"""Tests that settings which are in no stage's key change no bit of a game."""

import json

import pytest

from spin.config.load import NO_RESULT

PLAIN = ["iter=0", "generation.num_answers=2"]
HARMLESS = {
    "name": ["name=other"],
    "checkpoints": ["checkpoint.steps=1", "checkpoint.minutes=0"],
    "shards": ["checkpoint.shard_size=5000"],  # like the default, more than there are answers
    "recomputed activations": ["engine.gradient_checkpointing=true"],
    "logging": ["tracking.wandb=offline", "tracking.policies=all"],
    "samples": ["evaluation.samples=1"],
}


def bits(place, run: str) -> dict:
    """Return the checksums of the game's files by stage, without metrics.jsonl, which contains times."""
    used = json.loads((place.folder / run / "stages.json").read_text())["stages"]
    assert len(used) == 7
    facts = {
        stage: json.loads((place.folder / run / "store" / stage / "manifest.json").read_text())["files"]
        for stage in used
    }
    return {
        stage: {name: file for name, file in files.items() if name != "metrics.jsonl"} for stage, files in facts.items()
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory, games):
    from tests.games import Place

    place = Place(tmp_path_factory.mktemp("harmless"), games)
    place.play(*PLAIN, f"store.path={place.folder}/plain/store", run="plain")
    return place


@pytest.mark.parametrize("name", HARMLESS)
def test_changes_no_bit(plain, name):
    assert all(NO_RESULT.fullmatch(word.split("=")[0]) or name in ("shards", "samples") for word in HARMLESS[name])
    run = name.replace(" ", "-")
    plain.play(*PLAIN, *HARMLESS[name], f"store.path={plain.folder}/{run}/store", run=run)
    assert bits(plain, run) == bits(plain, "plain")


@pytest.mark.parametrize("word", ["checkpoint.shard_size=4", "generation.batch_size=3"])
def test_changes_keys(plain, word):
    """Settings that change the rounding of answers change the keys: no answers of the first game are reused."""
    done = plain.play(*PLAIN, word, f"store.path={plain.folder}/plain/store", run=word)
    assert "generate: reused" not in done.stdout and "SFT: reused" in done.stdout
