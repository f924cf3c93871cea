"""Tests of the routers' load-balancing loss against that of transformers on one sequence at a time."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from spin.engines.logps import Forward, sequence_logps
from spin.engines.routers import balance_losses, find_routers, record_router_logits
from tests.conftest import CONFIGS, random_items, small_model

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_next"]


def losses_of(model, items, forward: Forward) -> torch.Tensor:
    """Return the loss of each response, in the items' order."""
    by_response: list = [None] * (2 * len(items))
    for batch in forward.batches(items):
        with record_router_logits(model) as logits:
            sequence_logps(model, batch, forward)
        losses = balance_losses(model, logits, batch, forward.layout)
        for k, loss in enumerate(losses):
            by_response[2 * batch.items[k // 2] + k % 2] = loss
    return torch.stack(by_response)


def expected_losses(model, items) -> torch.Tensor:
    """Return transformers' loss of each sequence, unpacked: the mean of the losses of its layers."""
    losses = []
    for item in items:
        for response in item.responses:
            ids = torch.tensor([[*item.prompt_ids, *response]])
            logits = model(ids, output_router_logits=True, use_cache=False).router_logits
            layers = [load_balancing_loss_func((layer,), layer.shape[-1], 2) for layer in logits]
            losses.append(torch.stack(layers).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("name", EXPERTS)
def test_losses_match_transformers(name):
    """Losses match transformers' in one packed row, in several, and in padded rows."""
    model, items = small_model(name), random_items(6)
    expected = expected_losses(model, items)
    layouts = ["padded"] if name in ("gpt_oss", "qwen3_next") else ["packed", "padded"]
    for layout in layouts:
        for budget in (60, 999):
            losses = losses_of(model, items, Forward(layout, "chunked", budget, 7))
            assert torch.allclose(losses, expected, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_match_transformers(layout):
    model, items = small_model("mixtral"), random_items(4)
    weights = torch.randn(8, generator=torch.Generator().manual_seed(0))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(losses):
        return torch.autograd.grad((losses * weights).sum(), parameters, allow_unused=True)

    expected = gradients(expected_losses(model, items))
    actual = gradients(losses_of(model, items, Forward(layout, "chunked", 90, 7)))
    for name, actual_grad, expected_grad in zip(names, actual, expected, strict=True):
        assert (actual_grad is None) == (expected_grad is None), name
        assert actual_grad is None or torch.allclose(actual_grad, expected_grad, atol=1e-5), name
    assert sum(grad is not None for grad in actual) > 5


def test_even_routing_costs_top_k():
    """With equal logits every expert has probability 1/4, and each token counts twice."""
    model, items = small_model("mixtral"), random_items(3)
    (batch,) = Forward("packed", "chunked", 999, 7).batches(items)
    losses = balance_losses(model, [torch.zeros(batch.tokens, 4)] * 2, batch, "packed")
    assert torch.allclose(losses, torch.full((6,), 2.0))


def test_layers_do_not_compensate():
    """Two experts get all tokens in one layer, the other two in the other: uneven in each layer, but even over both."""
    model, items = small_model("mixtral"), random_items(3)
    (batch,) = Forward("packed", "chunked", 999, 7).batches(items)
    first = torch.tensor([9.0, 9.0, 0.0, 0.0]).expand(batch.tokens, 4)
    losses = balance_losses(model, [first, first.flip(1)], batch, "packed")
    assert torch.allclose(losses, torch.full((6,), 4.0), atol=1e-2)
    assert load_balancing_loss_func((first, first.flip(1)), 4, 2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_found(name):
    assert len(find_routers(small_model(name))) == (2 if name in EXPERTS else 0)


def test_hooks_are_removed():
    model = small_model("mixtral")
    with record_router_logits(model) as logits:
        model(torch.tensor([[2, 3]]))
    model(torch.tensor([[2, 3]]))
    assert len(logits) == 2
