"""The loss against its formula, and its minimiser against the paper's theorems."""

import math

import pytest
import torch

from spin.method.objectives import LINKS, link_at_zero, spin_loss


def named(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log-probs by response from a table [pairs, 2]."""
    return {"real": table[:, 0], "generated": table[:, 1]}


NAIVE = {
    "logistic": lambda z: math.log(1 + math.exp(-z)),
    "hinge": lambda z: max(0.0, 1 - z),
    "exponential": lambda z: math.exp(-z),
    "correlation": lambda z: 1 - z,
}


@pytest.mark.parametrize("link", LINKS)
def test_loss_is_equation_4_7(link):
    generator = torch.Generator().manual_seed(0)
    policy, opponent = (-30 * torch.rand(20, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    losses, metrics = spin_loss(named(policy), named(opponent), 0.3, link)
    for i in range(20):
        z = 0.3 * (policy[i, 0] - opponent[i, 0]).item() - 0.3 * (policy[i, 1] - opponent[i, 1]).item()
        assert losses[i].item() == pytest.approx(NAIVE[link](z), rel=1e-9)
        assert metrics["rewards/margins"][i].item() == pytest.approx(z)
        assert metrics["rewards/accuracies"][i].item() == (z > 0)


@pytest.mark.parametrize("link", LINKS)
def test_links_are_convex_and_decreasing(link):
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    values = LINKS[link](z)
    assert (values.diff() <= 1e-12).all() and (values.diff().diff() >= -1e-12).all()
    logps = torch.randn(4, 2)
    losses, metrics = spin_loss(named(logps), named(logps), 0.1, link)
    assert torch.allclose(losses, torch.full((4,), link_at_zero(link)))
    assert (metrics["rewards/margins"] == 0).all() and (metrics["rewards/accuracies"] == 0.5).all()
    assert link_at_zero("logistic") == pytest.approx(math.log(2))


def test_large_margins_stay_finite():
    policy = torch.tensor([[-1e4, -1.0], [-1.0, -1e4]], requires_grad=True)
    losses, _ = spin_loss(named(policy), named(torch.full((2, 2), -50.0)), 5.0, "logistic")
    losses.sum().backward()
    assert losses.isfinite().all() and policy.grad.isfinite().all()


def best_response(data: torch.Tensor, opponent: torch.Tensor, beta: float) -> torch.Tensor:
    """The exact game over two outcomes, one SPIN iteration trained to convergence from the opponent."""
    logits = opponent.log().clone().requires_grad_(True)
    outcomes = [(y, generated) for y in range(2) for generated in range(2)]
    weights = torch.stack([data[y] * opponent[generated] for y, generated in outcomes])
    optimizer = torch.optim.LBFGS(
        [logits], lr=1, max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(-1)
        rows = torch.stack([torch.stack([policy[y], policy[generated]]) for y, generated in outcomes])
        reference = torch.stack([torch.stack([opponent[y], opponent[generated]]) for y, generated in outcomes]).log()
        loss = (weights * spin_loss(named(rows), named(reference), beta, "logistic")[0]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_optimum_is_theorem_5_4(beta):
    data = torch.tensor([0.8, 0.2], dtype=torch.float64)
    opponent = torch.tensor([0.35, 0.65], dtype=torch.float64)
    expected = opponent * (data / opponent) ** (1 / beta)
    expected /= expected.sum()
    assert torch.allclose(best_response(data, opponent, beta), expected, atol=1e-6)


@pytest.mark.parametrize("beta", [0.75, 2.5])
def test_iterations_converge_to_the_data(beta):
    data = torch.tensor([0.8, 0.2], dtype=torch.float64)
    assert torch.allclose(best_response(data, data, beta), data, atol=1e-6)
    policy = torch.tensor([0.35, 0.65], dtype=torch.float64)
    for _ in range(40):
        policy = best_response(data, policy, beta)
    assert torch.allclose(policy, data, atol=1e-4)
