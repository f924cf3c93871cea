"""The SPIN objective and its variants, as pure functions of named log-probs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spin.config.schema import LossConfig, value_at_iteration
from spin.method.pairs import RESPONSES, Logps

Metrics = dict[str, Tensor]

# The convex decreasing link functions l of section 4.1 of the paper.
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: F.softplus(-z),
    "hinge": lambda z: F.relu(1 - z),
    "exponential": lambda z: torch.exp(-z),
    "correlation": lambda z: 1 - z,
}


@dataclass(frozen=True)
class Objective:
    """What an iteration minimises, and what has to be computed for it.

    loss(policy, references, lengths) returns the loss of each pair, [pairs], and detached metrics, each [pairs]. `policy`
    has log-probs by response, `references` by model and response, `lengths` tokens by response. Losses are not reduced:
    the training loop gives every prompt the same weight.

    `references` names the models that score the responses: "opponent" (always: the first step is compared with it), and
    "start", the policy that self-play started from. `responses` names what the policy scores: the pair, and "first",
    iteration 0's answer to the same prompt, if needed. `settings` decide the content of what is trained. `initial_loss`
    is the loss while the policy still equals the opponent; None if it depends on the log-probs. `router_aux_weight` is the
    weight of the routers' load-balancing loss, which the training loop adds: it is no function of log-probs.
    """

    loss: Callable[[Logps, Mapping[str, Logps], Logps], tuple[Tensor, Metrics]]
    references: tuple[str, ...]
    initial_loss: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    responses: tuple[str, ...] = RESPONSES
    router_aux_weight: float = 0.0


def make_objective(config: LossConfig, iteration: int, num_answers: int = 1) -> Objective:
    """The objective that `config` describes at `iteration`, with `num_answers` opponent's answers to a prompt."""
    make = {"spin": make_spin, "space": make_space}[config.objective]
    objective = add_terms(make(config, iteration, num_answers), config, iteration)
    if not (weight := config.router_aux_weight):
        return objective
    return replace(objective, router_aux_weight=weight, settings=objective.settings | {"router_aux_weight": weight})


def make_spin(config: LossConfig, iteration: int, num_answers: int) -> Objective:
    """SPIN (`spin_loss`) with the reference that `config` names, and the beta of `iteration`."""
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
        losses, metrics = spin_loss(policy, reference, beta, config.link, lengths, config.length_normalised)
        if reference is not opponent or config.length_normalised:  # rewards then do not show how log p has changed
            metrics |= {f"gains/{name}": (policy[name] - opponent[name]).detach() for name in RESPONSES}
        return losses, metrics

    settings: dict[str, Any] = {"link": config.link, "beta": beta}
    if config.length_normalised:
        settings["length_normalised"] = True
    if anchored:
        settings["alpha"] = alpha
    if not has_reference:
        settings["reference"] = "none"
    models = ("opponent", "start") if anchored else ("opponent",)
    initial_loss = link_at_zero(config.link) if has_reference and not anchored else None
    return Objective(loss, models, initial_loss, settings)


def make_space(config: LossConfig, iteration: int, num_answers: int) -> Objective:
    """SPACE (`space_loss`) with mu, by default the number of opponent's answers to a prompt: the ratio of noise to data."""
    mu = float(num_answers) if config.mu is None else config.mu

    def loss(policy: Logps, references: Mapping[str, Logps], lengths: Logps) -> tuple[Tensor, Metrics]:
        return space_loss(policy, references["opponent"], mu)

    return Objective(loss, ("opponent",), space_at_zero(mu), {"objective": "space", "mu": mu})


def add_terms(objective: Objective, config: LossConfig, iteration: int) -> Objective:
    """`objective` plus the terms of `config` whose weight is not 0, any of which may be added to any objective.

    - sft_weight w adds -w log p(y|x) / |y|, which keeps log p(y|x) from falling while the margin grows (Iterative RPO,
      arXiv 2404.19733, equation 1).
    - real_floor w adds w max(0, log p_t(y|x) - log p(y|x)): it costs only while the policy gives the human answer less
      than its opponent does. The penalty of DPOP (arXiv 2402.13228, equation 3), there inside the link; outside of it the
      gradient does not vanish where the margin is large.
    - history_weight b adds, from iteration 1 on, b l(beta [log p(y'|x) - log p(y0|x)]), where y0 is iteration 0's answer:
      the policy should not fall behind the game's start (the second term of T-SPIN, arXiv 2601.08198).
    """
    history = config.history_weight if iteration > 0 else 0.0
    weights = {"sft": config.sft_weight, "floor": config.real_floor, "history": history}
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        return objective
    beta = 1.0 if config.beta is None else value_at_iteration(config.beta, iteration)

    def loss(policy: Logps, references: Mapping[str, Logps], lengths: Logps) -> tuple[Tensor, Metrics]:
        losses, metrics = objective.loss(policy, references, lengths)
        terms = {}
        if "sft" in weights:
            terms["sft"] = -policy["real"] / lengths["real"]
        if "floor" in weights:
            terms["floor"] = F.relu(references["opponent"]["real"] - policy["real"])
        if "history" in weights:
            terms["history"] = LINKS[config.link](beta * (policy["generated"] - policy["first"]))
        metrics[f"loss/{config.objective}"] = metrics["loss"]
        for name, term in terms.items():
            losses = losses + weights[name] * term
            metrics[f"loss/{name}"] = term.detach()
        return losses, metrics | {"loss": losses.detach()}

    names = {"sft": "sft_weight", "floor": "real_floor", "history": "history_weight"}
    return replace(
        objective,
        loss=loss,
        settings=objective.settings | {names[name]: weight for name, weight in weights.items()},
        initial_loss=objective.initial_loss if weights.keys() <= {"floor"} else None,
        responses=(*RESPONSES, "first") if "history" in weights else RESPONSES,
    )


def link_at_zero(link: str) -> float:
    """l(0), the loss of a policy that equals its opponent: ln 2 for logistic, 1 for the others."""
    return LINKS[link](torch.zeros((), dtype=torch.float64)).item()


def space_at_zero(mu: float) -> float:
    """The SPACE loss of a policy that equals its opponent: 2 ln 2 for mu = 1."""
    return math.log(1 + mu) + mu * math.log(1 + 1 / mu)


def spin_loss(
    policy: Logps,
    reference: Logps | None,
    beta: float,
    link: str,
    lengths: Logps | None = None,
    length_normalised: bool = False,
) -> tuple[Tensor, Metrics]:
    """Return the SPIN loss of each pair, [pairs], and detached metrics (equation 4.7 of arXiv 2401.01335).

        loss = l( beta [log p(y|x) - log p_t(y|x)] - beta [log p(y'|x) - log p_t(y'|x)] )

    y is the real and y' the generated response, p the policy, p_t the reference (the opponent), beta the paper's lambda.
    Without a reference both log p_t are left out (the first term of T-SPIN, arXiv 2601.08198).

    length_normalised divides each bracket by the `lengths` of its response, in tokens with the end token (SimPO, arXiv
    2405.14734, section 2.2; with a reference: Tulu 3, arXiv 2411.15124, section 5.1). Margins shrink by that length, so
    beta has to grow (2 to 10).
    """
    gains = {name: policy[name] if reference is None else policy[name] - reference[name] for name in RESPONSES}
    if length_normalised:
        assert lengths is not None
        gains = {name: gains[name] / lengths[name] for name in RESPONSES}
    rewards = {name: beta * gains[name] for name in RESPONSES}
    losses = LINKS[link](rewards["real"] - rewards["generated"])
    return losses, describe(losses, rewards, policy)


def space_loss(policy: Logps, opponent: Logps, mu: float) -> tuple[Tensor, Metrics]:
    """Return the SPACE loss of each pair, [pairs], and detached metrics (arXiv 2512.07175).

        loss = -log s_mu(r(y)) - mu log s_{1/mu}(-r(y')),   s_mu(z) = 1 / (1 + mu e^-z),   r(u) = log p(u|x) - log p_t(u|x)

    Noise-contrastive estimation with the opponent's answers y' as noise: 1 - s_mu(z) = s_{1/mu}(-z) is the probability
    that an answer is noise where there are mu times as many noise as human answers. Its mean over pairs is lowest at the
    distribution of the human answers, after one iteration and for every mu. A scale on r would change that, so there is
    no beta. Derived from the definition of noise-contrastive estimation; the paper was read in secondary sources.
    """
    rewards = {name: policy[name] - opponent[name] for name in RESPONSES}
    losses = F.softplus(math.log(mu) - rewards["real"]) + mu * F.softplus(rewards["generated"] - math.log(mu))
    return losses, describe(losses, rewards, policy)


def describe(losses: Tensor, rewards: Logps, policy: Logps) -> Metrics:
    """The detached metrics that all objectives have."""
    margins = rewards["real"] - rewards["generated"]
    metrics = {
        "loss": losses,
        "rewards/real": rewards["real"],
        "rewards/generated": rewards["generated"],
        "rewards/margins": margins,
        # A tie counts as half: a policy equal to its opponent shows 0.5.
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "logps/real": policy["real"],
        "logps/generated": policy["generated"],
    }
    return {name: value.detach() for name, value in metrics.items()}


def mix_references(opponent: Logps, start: Logps, alpha: float) -> Logps:
    """Log-probs of the unnormalised geometric mixture p_t^alpha p_0^(1 - alpha) of opponent and start.

    Regularising towards both, alpha KL(p || p_t) + (1 - alpha) KL(p || p_0), leads to this reference (alpha-SPIN, arXiv
    2404.04291): alpha = 1 is SPIN, alpha = 0 keeps the start as reference. The normaliser Z(x) cancels in the margin, so
    the loss is exact; `rewards/real` and `rewards/generated` miss a common offset. With `length_normalised` it does not
    cancel.
    """
    return {name: alpha * opponent[name] + (1 - alpha) * start[name] for name in RESPONSES}
