"""Tests of complete games of one iteration with each architecture: scoring, training, saving, loading, measuring."""

import pytest
import torch
import transformers as tf

from spin.models.load import load_model, saved_buffers
from spin.models.policy import Policy
from spin.models.save import save_model
from tests.conftest import CONFIGS, model_folder

# gpt_oss (attention sinks) and gemma2 (soft cap) need their own attention. The others have a recurrent state.
PADDED = {"gpt_oss", "gemma2", "mamba", "mamba2", "qwen3_next", "falcon_h1", "lfm2"}
QUICK = {"gemma3", "gpt_oss", "mamba2"}
EXPERTS = {"mixtral", "qwen3_moe"}


def play(place, name: str, *words: str) -> list[dict]:
    """Play iteration 0, check the layout, and return the rows of its training."""
    folder = model_folder(name, place.folder / "model")
    done = place.play(f"model.path={folder}", "iter=0", *words)
    assert ("using the padded layout" in done.stdout + done.stderr) == (name in PADDED)
    rows = [row for row in place.metrics() if row.get("stage") == "train" and "rewards/margins" in row]
    assert abs(rows[0]["loss"] - 0.6931) < 0.01 and rows[-1]["loss"] != rows[0]["loss"]
    return rows


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in EXPERTS],
)
def test_game(place, name):
    play(place, name)
    policy = tf.AutoModelForCausalLM.from_pretrained(place.folder / "run" / "iter0" / "policy")
    start = tf.AutoModelForCausalLM.from_pretrained(place.folder / "model").state_dict()
    assert all(not torch.equal(weight, start[key]) for key, weight in policy.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_is_the_same(tmp_path, name):
    """A saved model loads with the same weights, also if they are stored in another layout, as with experts."""
    folder = model_folder(name, tmp_path / "model")
    model = load_model(folder, torch.float32, torch.device("cpu"))
    weights = {**saved_buffers(model), **dict(model.named_parameters())}
    save_model(model, weights, Policy("start", folder, "id"), tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", torch.float32, torch.device("cpu")).state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in model.state_dict().items())
    assert loaded.keys() == model.state_dict().keys()


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("mixtral", "none"),
        ("qwen3_moe", "lora"),
        pytest.param("mixtral", "lora", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "none", marks=pytest.mark.slow),
    ],
)
def test_game_of_experts(place, name, adapter):
    play(place, name, f"model.adapter={adapter}")
    policy = place.folder / "run" / "iter0" / "policy"
    assert (policy / "adapter_model.safetensors").is_file() == (adapter == "lora")


def test_router_loss_in_a_game(place):
    """The router loss is equal in packed and padded rows, and is added to the loss."""
    words = ["loss.router_aux_weight=0.1", "engine.precision=fp32", "evaluation=none"]
    folder = model_folder("mixtral", place.folder / "model")
    first_losses = []
    for layout in ("packed", "padded"):
        run = f"{layout}-run"
        place.play(f"model.path={folder}", "iter=0", f"engine.layout={layout}", *words, run=run)
        rows = [row for row in place.metrics(run) if "loss/router" in row]
        assert all(row["loss/router"] >= 1.9 for row in rows)  # 2 experts per token: 2 if all are used evenly
        first_losses.append(rows[0]["loss/router"])
        assert rows[0]["loss"] == pytest.approx(0.693147 + 0.1 * first_losses[-1], abs=1e-4)
    assert first_losses[0] == pytest.approx(first_losses[1], abs=1e-4)


def test_dense_model_has_no_router_loss(place):
    done = place.play("loss.router_aux_weight=0.1", status=1)
    (line,) = done.stderr.strip().splitlines()
    assert "loss.router_aux_weight=0.1: a llama model has no experts" in line
    assert not place.stages()
