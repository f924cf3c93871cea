"""Tests of `publish.hub`, with a stand-in for the hub: the selected policy and its card are sent only if it is set."""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from huggingface_hub import ModelCard, get_token
from transformers import AutoModelForCausalLM

from spin.models.policy import content_id
from spin.reporting.publish import publish
from spin.runtime.errors import UserError
from tests.config.test_schema import load
from tests.games import ROOT, Place
from tests.hub_server import TOKEN, Hub

GAME = ["iter=0", "data.validation=8", "schedule.sft_epochs=1"]


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("publish"), games)
    place.play(*GAME)
    return place


def play(place: Place, hub: Hub, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    """Play in a separate process, because the hub's library reads its settings at import."""
    names = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [sys.executable, "run.py", *place.words(*GAME, *words)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True, timeout=280)


def test_best_policy_is_published(place, hub, tmp_path):
    policy = place.folder / "run" / "best" / "policy"
    (policy / "diary.txt").write_text("a file of the user")
    assert not hub.created and not hub.files
    hub.refuse_commits = True
    done = play(place, hub, "publish.hub=me/mine", "tracking.project=x")
    hub.refuse_commits = False
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # after the progress of the upload
    assert last.startswith("error: publish.hub=me/mine: the game is finished, but not published (Server error")

    done = play(place, hub, "publish.hub=me/mine")
    assert done.returncode == 0, done.stderr
    assert "nothing was computed again" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"published: {hub.url}/me/mine"
    assert hub.created[-1]["name"] == "mine" and hub.created[-1]["visibility"] == "private"
    selected = json.loads((place.folder / "run" / "best" / "selection.json").read_text())["policy"]
    assert hub.commits == [f"smoke, {selected}"]
    uploaded = {path.name: path.read_bytes() for path in policy.iterdir()}
    del uploaded["diary.txt"], uploaded["trained_on.json"]
    assert hub.files == uploaded
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) and content_id(tmp_path) == content_id(policy)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "text-generation"


def test_sft_policy_without_iterations(tmp_path, monkeypatch):
    (tmp_path / "sft" / "policy").mkdir(parents=True)
    (tmp_path / "sft" / ".policy.linked").write_text("[]")
    uploads, api = [], Mock()
    api.upload_folder = lambda **arguments: uploads.append(arguments["folder_path"])
    monkeypatch.setattr("spin.reporting.publish.HfApi", lambda **options: api)
    publish(tmp_path, {"selected": None, "iterations": []}, load("publish.hub=me/x", "schedule.iterations=0"), print)
    assert uploads == [tmp_path / "sft" / "policy"]


@pytest.mark.slow
def test_public_and_merged(place, hub):
    words = ["model.adapter=lora", "model.merge=true", "publish.hub=team/merged", "publish.private=false"]
    done = play(place, hub, *words, "hydra.run.dir=" + str(place.folder / "merged"))
    assert done.returncode == 0, done.stderr
    created = hub.created[-1]
    assert (created["name"], created["organization"], created["visibility"]) == ("merged", "team", "public")
    assert b"merged" not in hub.files["config.json"] and "adapter_config.json" not in hub.files


@pytest.mark.skipif(get_token() is not None, reason="this user is logged in")
def test_no_token(place, tmp_path):
    done = place.play("publish.hub=me/x", f"store.path={tmp_path}/store", run="none", status=1)
    assert done.stderr == (
        "error: publish.hub=me/x: there is no token for the Hugging Face hub: run `hf auth login`, or set HF_TOKEN.\n"
    )
    assert not list(tmp_path.glob("store/*/*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["publish.hub=me/x"], "hf_wrong", "publish.hub=me/x: the hub refuses the token, or can't be reached"),
        (["publish.hub=a/b/c"], TOKEN, "publish.hub=a/b/c (Repo id must be"),
        (["publish.hub=me/x", "model.adapter=lora"], TOKEN, "is not on a hub: set model.merge=true"),
    ],
)
def test_errors_before_the_game(place, hub, words, token, message, tmp_path):
    created_before = len(hub.created)
    done = play(place, hub, *words, f"store.path={tmp_path}/store", f"hydra.run.dir={tmp_path}/run", token=token)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stdout
    assert not list(tmp_path.glob("store/*/*/manifest.json")) and len(hub.created) == created_before


def test_only_with_one_game(place):
    done = place.play("-m", "iter=0,1", "publish.hub=me/x", f"hydra.sweep.dir={place.folder}/sweep", status=1)
    assert "publish.hub goes with one game: play the best point alone" in done.stderr
    with pytest.raises(UserError, match=r"publish\.hub=me/x: has no effect with stage=evaluate"):
        load("stage=evaluate", "publish.hub=me/x")
