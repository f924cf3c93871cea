"""The loss compared with its formula, and its minimiser with the paper's theorems."""

import math
from collections.abc import Callable

import pytest
import torch

from spin.config.schema import LossConfig
from spin.method.objectives import LINKS, link_at_zero, make_objective, space_loss, spin_loss


def named(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return log-probs by response from a table [pairs, 2]."""
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
    assert torch.allclose(losses, torch.full((4,), NAIVE[link](0.0)))
    assert link_at_zero(link) == pytest.approx(NAIVE[link](0.0))
    assert (metrics["rewards/margins"] == 0).all() and (metrics["rewards/accuracies"] == 0.5).all()


def test_large_margins_stay_finite():
    policy = torch.tensor([[-1e4, -1.0], [-1.0, -1e4]], requires_grad=True)
    losses, _ = spin_loss(named(policy), named(torch.full((2, 2), -50.0)), 5.0, "logistic")
    losses.sum().backward()
    assert losses.isfinite().all() and policy.grad.isfinite().all()


def best_response(data: torch.Tensor, opponent: torch.Tensor, loss_of: Callable) -> torch.Tensor:
    """Return the policy that minimises `loss_of(policy, opponent)` in one exact iteration over two outcomes."""
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
        loss = (weights * loss_of(named(rows), named(reference))[0]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def spin(beta: float) -> Callable:
    return lambda policy, opponent: spin_loss(policy, opponent, beta, "logistic")


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_optimum_is_theorem_5_4(beta):
    data = torch.tensor([0.8, 0.2], dtype=torch.float64)
    opponent = torch.tensor([0.35, 0.65], dtype=torch.float64)
    expected = opponent * (data / opponent) ** (1 / beta)
    expected /= expected.sum()
    assert torch.allclose(best_response(data, opponent, spin(beta)), expected, atol=1e-6)


@pytest.mark.parametrize("beta", [0.75, 2.5])
def test_iterations_converge_to_the_data(beta):
    data = torch.tensor([0.8, 0.2], dtype=torch.float64)
    assert torch.allclose(best_response(data, data, spin(beta)), data, atol=1e-6)
    policy = torch.tensor([0.35, 0.65], dtype=torch.float64)
    for _ in range(40):
        policy = best_response(data, policy, spin(beta))
    assert torch.allclose(policy, data, atol=1e-4)


# --- newer objectives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [1.0, 4.0])
def test_space_equals_formula(mu):
    generator = torch.Generator().manual_seed(0)
    policy, opponent = (-30 * torch.rand(20, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    losses, metrics = space_loss(named(policy), named(opponent), mu)
    for i in range(20):
        real, generated = (policy[i] - opponent[i]).tolist()
        is_human = 1 / (1 + mu * math.exp(-real))  # s_mu(r(y))
        is_noise = 1 / (1 + math.exp(generated) / mu)  # s_{1/mu}(-r(y'))
        assert losses[i].item() == pytest.approx(-math.log(is_human) - mu * math.log(is_noise), rel=1e-9)
        assert metrics["rewards/real"][i].item() == pytest.approx(real)
    first_losses, _ = space_loss(named(opponent), named(opponent), mu)
    initial_loss = make_objective(LossConfig.from_defaults(objective="space", beta=None, mu=mu), 0).initial_loss
    assert torch.allclose(first_losses, torch.full_like(first_losses, initial_loss))
    assert initial_loss == pytest.approx(math.log(1 + mu) + mu * math.log(1 + 1 / mu))


@pytest.mark.parametrize("mu", [1.0, 3.0])
def test_space_is_optimal_after_one_iteration(mu):
    data = torch.tensor([0.8, 0.2], dtype=torch.float64)
    opponent = torch.tensor([0.35, 0.65], dtype=torch.float64)

    def loss_of(policy, reference):
        return space_loss(policy, reference, mu)

    assert torch.allclose(best_response(data, opponent, loss_of), data, atol=1e-6)
    assert torch.allclose(best_response(data, data, loss_of), data, atol=1e-6)


def test_first_gradient_of_space_equals_spin():
    """The gradients agree at mu = beta = 1; in general both answers have weight mu / (1 + mu), in SPIN beta / 2."""
    logps = torch.randn(4, 2, dtype=torch.float64)
    grads = []
    for loss_of in (lambda p, o: space_loss(p, o, 1.0), spin(1.0)):
        policy = logps.clone().requires_grad_(True)
        loss_of(named(policy), named(logps))[0].sum().backward()
        grads.append(policy.grad)
    assert torch.allclose(grads[0], grads[1])


def terms_of(iteration: int, **settings) -> tuple:
    """Return an objective, and random log-probs and lengths for it."""
    generator = torch.Generator().manual_seed(3)
    table = -30 * torch.rand(16, 3, generator=generator, dtype=torch.float64)
    policy = {**named(table), "first": table[:, 2]}
    opponent = named(-30 * torch.rand(16, 2, generator=generator, dtype=torch.float64))
    lengths = named(torch.randint(1, 40, (16, 2), generator=generator))
    return make_objective(LossConfig.from_defaults(**settings), iteration), policy, opponent, lengths


def test_tspin_equals_formula():
    settings = {"reference": "none", "beta": 0.7, "history_weight": 0.3}
    for iteration, weight in ((0, 0.0), (1, 0.3)):
        objective, policy, opponent, lengths = terms_of(iteration, **settings)
        losses, metrics = objective.loss(policy, {"opponent": opponent}, lengths)
        for i, (real, generated, first) in enumerate(zip(*(x.tolist() for x in policy.values()), strict=True)):
            z, z_history = 0.7 * (real - generated), 0.7 * (generated - first)
            expected = math.log(1 + math.exp(-z)) + weight * math.log(1 + math.exp(-z_history))
            assert losses[i].item() == pytest.approx(expected, rel=1e-9)
            assert metrics["gains/real"][i].item() == pytest.approx(real - opponent["real"][i].item())
        assert objective.initial_loss is None and objective.references == ("opponent",)
        assert objective.responses == ("real", "generated", *["first"] * (iteration > 0))


@pytest.mark.parametrize("base", [{"objective": "space", "beta": None}, {"beta": 0.4}])
def test_floor_applies_below_the_opponent(base):
    plain, policy, opponent, lengths = terms_of(0, **base)
    floored = terms_of(0, real_floor=0.6, **base)[0]
    expected = [
        loss + 0.6 * max(0.0, opponent_logp - logp)
        for loss, logp, opponent_logp in zip(
            plain.loss(policy, {"opponent": opponent}, lengths)[0].tolist(),
            policy["real"].tolist(),
            opponent["real"].tolist(),
            strict=True,
        )
    ]
    losses, metrics = floored.loss(policy, {"opponent": opponent}, lengths)
    assert losses.tolist() == pytest.approx(expected, rel=1e-9) and (metrics["loss/floor"] == 0).any()
    assert floored.initial_loss == plain.initial_loss


def test_settings_in_stage_inputs():
    """The settings of plain SPIN do not change between versions, so that earlier stages are found."""

    def settings(iteration=1, num_answers=1, **changes):
        return make_objective(LossConfig.from_defaults(**changes), iteration, num_answers).settings

    assert settings() == {"link": "logistic", "beta": 0.1}
    assert settings(reference="none") == {"link": "logistic", "beta": 0.1, "reference": "none"}
    assert settings(objective="space", beta=None, num_answers=3) == {"objective": "space", "mu": 3.0}
    assert settings(objective="space", beta=None, num_answers=3, mu=2.0) == {"objective": "space", "mu": 2.0}
    assert settings(router_aux_weight=0.1) == {"link": "logistic", "beta": 0.1, "router_aux_weight": 0.1}
    assert settings(real_floor=0.5) == {"link": "logistic", "beta": 0.1, "real_floor": 0.5}
    assert settings(history_weight=0.1)["history_weight"] == 0.1
    assert "history_weight" not in settings(history_weight=0.1, iteration=0)
