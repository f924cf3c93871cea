"""The SPIN objective and its variants, as pure functions of log-probs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spin.config.schema import LossConfig, value_at_iteration
from spin.method.pairs import RESPONSES, Logps

Metrics = dict[str, Tensor]

# The convex, decreasing link functions l of section 4.1 of the paper.
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: F.softplus(-z),
    "hinge": lambda z: F.relu(1 - z),
    "exponential": lambda z: torch.exp(-z),
    "correlation": lambda z: 1 - z,
}


@dataclass(frozen=True)
class Objective:
    """The loss that an iteration minimises, and the inputs that it requires.

    loss(policy, references, lengths) returns the loss of each pair, [pairs], and detached metrics, each [pairs].
    `policy` has log-probs by response, `references` by model and response, `lengths` token counts by response. Losses
    are not reduced, because the training loop gives every prompt the same weight.

    `references` names the models that score the responses: "opponent" (always, for comparison at the first step), and
    "start", the policy that self-play started from. `responses` names the responses that the policy scores: the pair,
    and if needed "first", iteration 0's answer to the same prompt. `initial_loss` is the loss while the policy still
    equals the opponent, or None if it depends on the log-probs. `settings` are those that affect the trained policy.
    The training loop adds the routers' load-balancing loss with weight `router_aux_weight`.
    """

    loss: Callable[[Logps, Mapping[str, Logps], Logps], tuple[Tensor, Metrics]]
    references: tuple[str, ...]
    initial_loss: float | None
    settings: dict[str, Any]
    responses: tuple[str, ...] = RESPONSES
    router_aux_weight: float = 0.0


def make_objective(config: LossConfig, iteration: int, num_answers: int = 1) -> Objective:
    """Return the objective that `config` describes, with `num_answers` generated answers per prompt."""
    make = {"spin": make_spin, "space": make_space}[config.objective]
    return add_terms(make(config, iteration, num_answers), config, iteration)


def make_spin(config: LossConfig, iteration: int, num_answers: int) -> Objective:
    """Return the SPIN objective (`spin_loss`) with the reference that `config` names and the beta of `iteration`."""
    assert config.beta is not None
    beta = value_at_iteration(config.beta, iteration)
    has_reference = config.reference != "none"
    anchored = config.reference in ("start", "mixture") and iteration > 0  # at iteration 0 the start is the opponent
    alpha = config.alpha if config.reference == "mixture" else 0.0

    def loss(policy: Logps, references: Mapping[str, Logps], lengths: Logps) -> tuple[Tensor, Metrics]:
        opponent = references["opponent"]
        reference: Logps | None = opponent if has_reference else None
        if anchored:
            reference = mix_references(opponent, references["start"], alpha)
        divisors = lengths if config.length_normalised else None
        losses, metrics = spin_loss(policy, reference, beta, config.link, divisors)
        if reference is not opponent or divisors:  # rewards then do not show the change in log p
            metrics |= {f"gains/{name}": (policy[name] - opponent[name]).detach() for name in RESPONSES}
        return losses, metrics

    settings: dict[str, Any] = {"link": config.link, "beta": beta}
    if config.length_normalised:
        settings["length_normalised"] = True
    if anchored:
        settings["alpha"] = alpha
    if not has_reference:
        settings["reference"] = "none"
    if anchored:
        return Objective(loss, ("opponent", "start"), None, settings)
    return Objective(loss, ("opponent",), link_at_zero(config.link) if has_reference else None, settings)


def make_space(config: LossConfig, iteration: int, num_answers: int) -> Objective:
    """Return the SPACE objective (`space_loss`). mu, the ratio of noise to data, defaults to `num_answers`."""
    mu = float(num_answers) if config.mu is None else config.mu

    def loss(policy: Logps, references: Mapping[str, Logps], lengths: Logps) -> tuple[Tensor, Metrics]:
        return space_loss(policy, references["opponent"], mu)

    initial_loss = math.log(1 + mu) + mu * math.log(1 + 1 / mu)  # 2 ln 2 for mu = 1
    return Objective(loss, ("opponent",), initial_loss, {"objective": "space", "mu": mu})


def add_terms(objective: Objective, config: LossConfig, iteration: int) -> Objective:
    """Return `objective` plus the terms with a nonzero weight in `config`.

    - sft_weight w adds -w log p(y|x) / |y|, which keeps log p(y|x) from falling while the margin grows (Iterative RPO,
      arXiv 2404.19733, equation 1).
    - real_floor w adds w max(0, log p_t(y|x) - log p(y|x)), which is positive only while the policy gives the human
      answer a lower probability than its opponent does. DPOP (arXiv 2402.13228, equation 3) has this penalty inside the
      link; outside the link its gradient does not vanish at large margins.
    - history_weight b adds, from iteration 1 on, b l(beta [log p(y'|x) - log p(y0|x)]), y0 being iteration 0's answer,
      so that the policy does not fall behind the start of self-play (the second term of T-SPIN, arXiv 2601.08198).
    - router_aux_weight: see `Objective`.
    """
    history = config.history_weight if iteration > 0 else 0.0
    weights = {"sft_weight": config.sft_weight, "real_floor": config.real_floor, "history_weight": history}
    weights["router_aux_weight"] = config.router_aux_weight
    settings = objective.settings | {name: weight for name, weight in weights.items() if weight}
    objective = replace(objective, settings=settings, router_aux_weight=config.router_aux_weight)
    if not (config.sft_weight or config.real_floor or history):
        return objective
    beta = 1.0 if config.beta is None else value_at_iteration(config.beta, iteration)

    def loss(policy: Logps, references: Mapping[str, Logps], lengths: Logps) -> tuple[Tensor, Metrics]:
        losses, metrics = objective.loss(policy, references, lengths)
        terms = {}
        if config.sft_weight:
            terms["sft"] = config.sft_weight, -policy["real"] / lengths["real"]
        if config.real_floor:
            terms["floor"] = config.real_floor, F.relu(references["opponent"]["real"] - policy["real"])
        if history:
            terms["history"] = history, LINKS[config.link](beta * (policy["generated"] - policy["first"]))
        metrics[f"loss/{config.objective}"] = metrics["loss"]
        for name, (weight, term) in terms.items():
            losses = losses + weight * term
            metrics[f"loss/{name}"] = term.detach()
        return losses, metrics | {"loss": losses.detach()}

    return replace(
        objective,
        loss=loss,
        initial_loss=None if config.sft_weight or history else objective.initial_loss,
        responses=(*RESPONSES, "first") if history else RESPONSES,
    )


def link_at_zero(link: str) -> float:
    """Return l(0), the loss of a policy equal to its opponent: ln 2 for logistic, 1 for the others."""
    return LINKS[link](torch.zeros((), dtype=torch.float64)).item()


def spin_loss(
    policy: Logps, reference: Logps | None, beta: float, link: str, lengths: Logps | None = None
) -> tuple[Tensor, Metrics]:
    """Return the SPIN loss of each pair, [pairs], and detached metrics (equation 4.7 of arXiv 2401.01335).

        loss = l( beta [log p(y|x) - log p_t(y|x)] - beta [log p(y'|x) - log p_t(y'|x)] )

    y is the real, y' the generated response, p the policy, p_t the reference (the opponent), beta the paper's lambda.
    Without a reference both log p_t terms are omitted (the first term of T-SPIN, arXiv 2601.08198).

    With `lengths`, in tokens including the end token, each bracket is divided by the length of its response (SimPO,
    arXiv 2405.14734, section 2.2; with a reference: Tulu 3, arXiv 2411.15124, section 5.1). Margins shrink by that
    factor, so beta must be larger (2 to 10).
    """
    gains = {name: policy[name] if reference is None else policy[name] - reference[name] for name in RESPONSES}
    if lengths is not None:
        gains = {name: gains[name] / lengths[name] for name in RESPONSES}
    rewards = {name: beta * gains[name] for name in RESPONSES}
    losses = LINKS[link](rewards["real"] - rewards["generated"])
    return losses, describe(losses, rewards, policy)


def space_loss(policy: Logps, opponent: Logps, mu: float) -> tuple[Tensor, Metrics]:
    """Return the SPACE loss of each pair, [pairs], and detached metrics (arXiv 2512.07175).

        loss = -log s_mu(r(y)) - mu log s_{1/mu}(-r(y')), s_mu(z) = 1 / (1 + mu e^-z), r(u) = log p(u|x) - log p_t(u|x)

    This is noise-contrastive estimation with the opponent's answers y' as noise: 1 - s_mu(z) = s_{1/mu}(-z) is the
    probability that an answer is noise if there are mu times as many noise answers as human answers. For every mu, the
    mean loss is lowest at the distribution of the human answers. Scaling r would change that, so there is no beta. The
    formula follows from the definition of noise-contrastive estimation; the paper was read only in secondary sources.
    """
    rewards = {name: policy[name] - opponent[name] for name in RESPONSES}
    losses = F.softplus(math.log(mu) - rewards["real"]) + mu * F.softplus(rewards["generated"] - math.log(mu))
    return losses, describe(losses, rewards, policy)


def describe(losses: Tensor, rewards: Logps, policy: Logps) -> Metrics:
    """Return the detached metrics that all objectives share."""
    margins = rewards["real"] - rewards["generated"]
    metrics = {
        "loss": losses,
        "rewards/real": rewards["real"],
        "rewards/generated": rewards["generated"],
        "rewards/margins": margins,
        # A tie counts as half, so a policy equal to its opponent has an accuracy of 0.5.
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "logps/real": policy["real"],
        "logps/generated": policy["generated"],
    }
    return {name: value.detach() for name, value in metrics.items()}


def mix_references(opponent: Logps, start: Logps, alpha: float) -> Logps:
    """Return the log-probs of the unnormalised geometric mixture p_t^alpha p_0^(1 - alpha) of opponent and start.

    Regularisation towards both, alpha KL(p || p_t) + (1 - alpha) KL(p || p_0), leads to this reference (alpha-SPIN,
    arXiv 2404.04291). alpha = 1 is SPIN; alpha = 0 keeps the start as reference. The normaliser Z(x) cancels in the
    margin, so the loss is exact, but `rewards/real` and `rewards/generated` lack a common offset. It does not cancel if
    brackets are divided by lengths.
    """
    return {name: alpha * opponent[name] + (1 - alpha) * start[name] for name in RESPONSES}
