"""The SPIN objective and its variants, as pure functions of named log-probs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    "start", the policy that self-play started from. `settings` decide the content of what is trained. `initial_loss` is
    the loss while the policy still equals the opponent; None if it depends on the log-probs.
    """

    loss: Callable[[Logps, Mapping[str, Logps], Logps], tuple[Tensor, Metrics]]
    references: tuple[str, ...]
    initial_loss: float | None
    settings: dict[str, Any] = field(default_factory=dict)


def make_objective(config: LossConfig, iteration: int) -> Objective:
    """The objective that `config` describes, with the beta of `iteration`."""
    beta = value_at_iteration(config.beta, iteration)
    anchored = config.reference != "opponent" and iteration > 0  # at iteration 0 the start is the opponent
    alpha = config.alpha if config.reference == "mixture" else 0.0

    def loss(policy: Logps, references: Mapping[str, Logps], lengths: Logps) -> tuple[Tensor, Metrics]:
        reference = opponent = references["opponent"]
        if anchored:
            reference = mix_references(opponent, references["start"], alpha)
        losses, metrics = spin_loss(
            policy, reference, beta, config.link, lengths, config.length_normalised, config.sft_weight
        )
        if anchored or config.length_normalised:  # rewards then do not show how log p has changed
            metrics |= {f"gains/{name}": (policy[name] - opponent[name]).detach() for name in RESPONSES}
        return losses, metrics

    settings: dict[str, Any] = {"link": config.link, "beta": beta}
    if config.sft_weight:
        settings["sft_weight"] = config.sft_weight
    if config.length_normalised:
        settings["length_normalised"] = True
    if anchored:
        settings["alpha"] = alpha
    references = ("opponent", "start") if anchored else ("opponent",)
    has_initial = config.sft_weight == 0 and not anchored
    return Objective(loss, references, link_at_zero(config.link) if has_initial else None, settings)


def link_at_zero(link: str) -> float:
    """l(0), the loss of a policy that equals its opponent: ln 2 for logistic, 1 for the others."""
    return LINKS[link](torch.zeros((), dtype=torch.float64)).item()


def spin_loss(
    policy: Logps,
    reference: Logps,
    beta: float,
    link: str,
    lengths: Logps | None = None,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Return the SPIN loss of each pair, [pairs], and detached metrics (equation 4.7 of arXiv 2401.01335).

        loss = l( beta [log p(y|x) - log p_t(y|x)] - beta [log p(y'|x) - log p_t(y'|x)] )

    y is the real and y' the generated response, p the policy, p_t the reference (the opponent), beta the paper's lambda.

    Two variants need `lengths`, in tokens, end token included:

    - length_normalised divides each bracket by the length of its response (SimPO, arXiv 2405.14734, section 2.2; with a
      reference: Tulu 3, arXiv 2411.15124, section 5.1). Margins shrink by that length, so beta has to grow (2 to 10).
    - sft_weight w adds -w log p(y|x) / |y|, which keeps log p(y|x) from falling while the margin grows (Iterative RPO,
      arXiv 2404.19733, equation 1).
    """
    gains = {name: policy[name] - reference[name] for name in RESPONSES}
    if length_normalised:
        assert lengths is not None
        gains = {name: gains[name] / lengths[name] for name in RESPONSES}
    rewards = {name: beta * gains[name] for name in RESPONSES}
    margins = rewards["real"] - rewards["generated"]
    losses = LINKS[link](margins)
    metrics = {
        "rewards/real": rewards["real"],
        "rewards/generated": rewards["generated"],
        "rewards/margins": margins,
        # A tie counts as half: a policy equal to its opponent shows 0.5.
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "logps/real": policy["real"],
        "logps/generated": policy["generated"],
    }
    if sft_weight:
        assert lengths is not None
        metrics |= {"loss/spin": losses, "loss/sft": -policy["real"] / lengths["real"]}
        losses = losses + sft_weight * metrics["loss/sft"]
    return losses, {name: value.detach() for name, value in {"loss": losses, **metrics}.items()}


def mix_references(opponent: Logps, start: Logps, alpha: float) -> Logps:
    """Log-probs of the unnormalised geometric mixture p_t^alpha p_0^(1 - alpha) of opponent and start.

    Regularising towards both, alpha KL(p || p_t) + (1 - alpha) KL(p || p_0), leads to this reference (alpha-SPIN, arXiv
    2404.04291): alpha = 1 is SPIN, alpha = 0 keeps the start as reference. The normaliser Z(x) cancels in the margin, so
    the loss is exact; `rewards/real` and `rewards/generated` miss a common offset. With `length_normalised` it does not
    cancel.
    """
    return {name: alpha * opponent[name] + (1 - alpha) * start[name] for name in RESPONSES}
