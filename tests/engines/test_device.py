"""Tests of what a GPU computes differently from a CPU, on a GPU if there is one, and of compiled layers on any device."""

import copy
from dataclasses import replace

import pytest
import torch

from spin.config.schema import EngineConfig, GenerationConfig, OptimizerConfig
from spin.data.examples import Example
from spin.engines.logps import choose_forward, compute_logps
from spin.engines.single import SingleEngine
from spin.generation.answers import AnswerRequest
from spin.generation.sampling import generate_answers
from spin.models.load import load_model, load_tokenizer
from tests.conftest import random_items, small_model
from tests.engines.test_logps import naive_logps
from tests.method.test_training import PACKED, pairs_of, policy_of, score, train

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_logps(name):
    """Log-probs, packed if `choose_forward` selects it, match those of a float64 loop on the CPU."""
    model = small_model(name)
    items = random_items(8, longest=80)
    expected = naive_logps(copy.deepcopy(model), items)
    model.to(DEVICE)
    forward, _ = choose_forward(model, items, "auto", 512, 32, longest=200)
    assert torch.allclose(compute_logps(model, items, forward), expected, atol=2e-3, rtol=0)


def train_on(device, folder, **engine):
    """Return a SingleEngine after three updates on `device`, and their metrics."""
    settings, optimizer = EngineConfig.from_defaults(**engine), OptimizerConfig.from_defaults()
    trained, rows = SingleEngine(policy_of(folder), torch.float32, device, settings, optimizer), []
    pairs = pairs_of(12)
    train(trained, pairs, references=score(folder, pairs), log=rows.append, batch_size=4, lr=1e-4)
    return trained, rows


def test_training_matches_cpu(tiny_folder):
    trained, rows = train_on(DEVICE, tiny_folder)
    _, expected = train_on(CPU, tiny_folder)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-2)
    assert all(torch.isfinite(master).all() for master in trained.masters.values())


@pytest.mark.slow  # compiles for a minute
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training(tiny_folder, checkpointing):
    """Compiled training equals eager training up to rounding, and batches of other lengths need no recompilation."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, rows = train_on(DEVICE, tiny_folder, compile=True, gradient_checkpointing=checkpointing)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert frames > 0
    _, expected = train_on(DEVICE, tiny_folder)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-2)
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames
    batches = list(replace(PACKED, tokens_per_batch=100).batches(random_items(30, longest=12)))
    for batch in batches:
        compiled.backward(compiled.logps(batch, PACKED).sum())
    assert len({batch.tokens for batch in batches}) >= 4
    # A size of 1, or one that equals the number of heads, is compiled separately; other lengths are not.
    assert torch._dynamo.utils.counters["frames"]["ok"] <= frames + 4


def test_greedy_answers_match_cpu(tiny_folder):
    tokenizer, greedy = load_tokenizer(tiny_folder), GenerationConfig.from_defaults(temperature=0.0, batch_size=4)
    examples = [Example(f"p{i}", "", item.prompt_ids, "", ()) for i, item in enumerate(random_items(9, seed=3))]
    request = AnswerRequest(tokenizer, examples, greedy, 12, [], 0)
    on_device, on_cpu = (
        generate_answers(load_model(tiny_folder, torch.float32, device), request) for device in (DEVICE, CPU)
    )
    assert [answer.ids for answer in on_device] == [answer.ids for answer in on_cpu]
