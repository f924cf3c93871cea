"""Tests of the checks before a game, and of the messages of a run on its data."""

import json
import shutil
from pathlib import Path

import pytest

from spin.models import tiny
from spin.models.load import load_tokenizer
from spin.pipeline.context import prepare_run
from spin.pipeline.generate import distinguishing_tokens
from spin.runtime.errors import UserError
from spin.runtime.tracking import Tracker
from tests.config.test_schema import load


def prepare(folder: Path, *words: str):
    places = [f"model.path={folder}", f"cache.path={folder}/cache", f"store.path={folder}/store"]
    tracker = Tracker(folder, name="", config={}, rank=0)
    return prepare_run(load("experiment=smoke", "tracking.wandb=disabled", *places, *words), folder, tracker)


def write_mismatched(folder: Path, tokens: list[str], **changes: str) -> Path:
    """Write the tiny model with `tokens` beyond its embedding and with `changes` to its tokenizer's attributes."""
    tiny.make_tiny_model(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_beyond_the_embedding(tmp_path):
    folder = write_mismatched(
        tmp_path / "model", ["<|im_end|>"], chat_template=tiny.CHAT_TEMPLATE.replace(tiny.END, "<|im_end|>")
    )
    with pytest.raises(
        UserError, match=r"no embedding for, such as 258 \(<\|im_end\|>\): the model knows 258"
    ) as error:
        prepare(folder, "data.template=chat")
    assert "\n" not in str(error.value)
    prepare(folder)  # the text template has none of them


def test_template_end_stops_generation(tmp_path, capsys):
    """Generation stops at the template's end, too, if tokenizer and generation config name others (ChatML, base model)."""
    folder = write_mismatched(tmp_path / "model", [], eos_token=tiny.START)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    end = load_tokenizer(folder).convert_tokens_to_ids(tiny.END)
    run = prepare(folder, "data.template=chat")
    assert run.stop_ids == {0, end} and all(example.real_ids[-1] == end for example in run.data.all)
    assert "ends answers with <|end|>, so that generation stops there, too" in capsys.readouterr().out
    assert prepare(folder).stop_ids == {0}
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("human", "generated", "expected"),
    [
        (list(range(30)), [99] * 30, [99]),  # every answer of the model starts with a thought
        ([99] * 30, [*range(29), 99], [99]),
        ([98, 99] * 15, [97, 96] * 15, [98, 99]),
        (list(range(30)), list(range(30)), []),
        (list(range(30)), list(range(100, 130)), []),  # all differ, as first words can
        ([99] * 20 + [1] * 10, [1] * 30, []),
        ([99] * 5, [1] * 5, []),  # too few answers
    ],
)
def test_distinguishing_tokens(human, generated, expected):
    assert distinguishing_tokens(human, generated) == expected
