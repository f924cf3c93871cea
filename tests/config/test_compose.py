"""Settings given in Python reach the configuration unchanged, under the names of the command line."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.config.hydra import compose, load_run, to_text, to_words
from spin.config.schema import CONF
from spin.runtime.errors import UserError

TEXTS = [
    "chat", "a b", "it's", 'say "so"', "a\\", "a\\'b", "x=1,y=2", "[1]", "{prompt}: ", "true", "Null", "1e-3", "", "é", "~/x",
    "/tmp/a-b_c.d/e", "a,b", "#", "a:b", "(x)", "-1", "%s", "nan", " blank ",
]  # fmt: skip
VALUES = [*TEXTS, None, True, False, 0, -3, 0.1, 5e-7, 1e20, [1, 0.5], ["a b", "c"], {"k": [True, "x y"]}]


def test_to_text():
    composed = compose(*(f"+v{i}={to_text(value)}" for i, value in enumerate(VALUES)))
    parsed = OmegaConf.to_container(composed)
    assert [parsed[f"v{i}"] for i in range(len(VALUES))] == VALUES
    assert [type(parsed[f"v{i}"]) for i in range(len(VALUES))] == list(map(type, VALUES))


def test_to_words():
    settings = {"model": "zephyr", "loss": {"beta": 0.1}, "optimizer.lr": [5e-7, 1e-7], "iter": 1, "seed": 1}
    assert to_words(settings) == ["model=zephyr", "loss.beta=0.1", "optimizer.lr=[5e-7,1e-7]", "iter=1", "seed=1"]
    assert load_run(to_words(settings))[1] == load_run(["iter=0", *to_words(settings)])[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": Path("/a/b")}, ["model.path=/a/b"]),
        ({"model": "org/name"}, ["model.path=org/name"]),
        ({"data": "my pairs.jsonl"}, ["data=local", "data.path='my pairs.jsonl'"]),
        ({"data": "chitchat"}, ["data=chitchat"]),
        ({"data": {"path": "x.jsonl"}}, ["data.path=x.jsonl"]),
    ],
)
def test_path_as_choice(settings, words):
    assert to_words(settings) == words


def test_load_run():
    config, folder = load_run(["model=tiny", "data=tiny"])
    assert config.model.name == "tiny" and folder == Path("outputs/tiny-tiny")
    assert "hydra" not in config.yaml and "sft_epochs: 3" in config.yaml and (CONF / "config.yaml").is_file()
    with pytest.raises(UserError, match="there is no such setting"):
        load_run(["loss.betta=1"])
