"""Publish the selected policy and its card on the Hugging Face hub after the game (`publish.hub`)."""

import json
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from spin.config.schema import Config
from spin.models.policy import TRAINED_ON, Policy
from spin.reporting.model_card import CARD, is_hub_name
from spin.runtime.errors import UserError, explaining


def check_hub(config: Config, start: Policy) -> None:
    """Raise UserError if the game's result could not be published. Called before anything is played."""
    name = f"publish.hub={config.publish.hub}"
    if config.publish.hub is None:
        return
    with explaining(name, "give it as me/my-model"):
        validate_repo_id(config.publish.hub)
    is_adapter = (config.model.adapter == "lora" or start.base is not None) and not config.model.merge
    if is_adapter and not is_hub_name(config.model.path):
        raise UserError(f"{name}: others cannot load an adapter whose base is not on a hub: set model.merge=true.")
    if get_token() is None:
        raise UserError(f"{name}: there is no token for the Hugging Face hub: run `hf auth login`, or set HF_TOKEN.")
    with explaining(
        f"{name}: the hub refuses the token, or can't be reached", "check it, the network and HF_HUB_OFFLINE"
    ):
        HfApi().whoami()


def publish(folder: Path, game: dict, config: Config, say: Callable[[str], None]) -> None:
    """Upload the selected policy of the run in `folder`, or else the last one, or its merged model if there is one.

    The upload has the files that the game wrote, except the hashes of training prompts, and the card. `game` is the
    content of game.json. Raises UserError if the upload fails; the next run repeats it.
    """
    selected, name = game["selected"], config.publish.hub
    place = "best" if selected else f"iter{len(game['iterations']) - 1}" if game["iterations"] else "sft"
    model = folder / place / ("merged" if config.model.merge else "policy")
    linked = model.parent / f".{model.name}.linked"
    if name is None or not linked.is_file():
        return say(f"publish.hub={name}: nothing is published, the game ends with the model that it started from.")
    with explaining(f"publish.hub={name}: the game is finished, but not published", "run the same command again"):
        api = HfApi(library_name="spin")
        url = api.create_repo(name, private=config.publish.private, exist_ok=True)
        files = [*(file for file in json.loads(linked.read_bytes()) if file != TRAINED_ON), CARD]
        message = f"{config.name}, {selected['policy'] if selected else place}"
        api.upload_folder(repo_id=url.repo_id, folder_path=model, allow_patterns=files, commit_message=message)
    say(f"published: {url}")
