"""The SPIN objective and its links. Torch only: nothing else of spin is imported here."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Link = Callable[[Tensor], Tensor]

# The convex decreasing functions l of the paper, section 4.1. l(0) is what the first step of an iteration must give.
LINKS: dict[str, Link] = {
    "logistic": lambda z: F.softplus(-z),
    "hinge": lambda z: F.relu(1 - z),
    "exponential": lambda z: torch.exp(-z),
    "correlation": lambda z: 1 - z,
}


def link_at_zero(link: str) -> float:
    """The loss of a policy that equals its opponent: ln 2 for logistic, 1 for the others."""
    return LINKS[link](torch.zeros((), dtype=torch.float64)).item()


def spin_loss(policy_logps: Tensor, opponent_logps: Tensor, beta: float, link: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, and what people watch while it falls (equation 4.7 of arXiv 2401.01335).

    policy_logps, opponent_logps: [pairs, 2], summed log-probs in nats of the real (column 0) and the generated
    (column 1) response given the prompt; beta is the paper's lambda. Returns the losses [pairs], not reduced, so that
    the caller can weigh every pair the same however the pairs were batched, and metrics, each [pairs], detached.

        loss = l( beta [log p(y|x) - log p_t(y|x)] - beta [log p(y'|x) - log p_t(y'|x)] )
    """
    rewards = beta * (policy_logps - opponent_logps)
    margins = rewards[:, 0] - rewards[:, 1]
    losses = LINKS[link](margins)
    metrics = {
        "loss": losses,
        "rewards/real": rewards[:, 0],
        "rewards/generated": rewards[:, 1],
        "rewards/margins": margins,
        # A tie counts as half, so that a policy equal to its opponent shows 0.5.
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "logps/real": policy_logps[:, 0],
        "logps/generated": policy_logps[:, 1],
    }
    return losses, {name: value.detach() for name, value in metrics.items()}
