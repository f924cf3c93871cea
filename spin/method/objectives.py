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


def spin_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float,
    link: str,
    lengths: Tensor | None = None,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, and what people watch while it falls (equation 4.7 of arXiv 2401.01335).

    policy_logps, reference_logps: [pairs, 2], summed log-probs in nats of the real (column 0) and the generated
    (column 1) response given the prompt; the reference is the opponent p_t, or what `mixture` makes of it and the start.
    beta is the paper's lambda. Returns the losses [pairs], not reduced, so that the caller can weigh every prompt the
    same however the pairs were batched, and metrics, each [pairs], detached.

        loss = l( beta [log p(y|x) - log p_t(y|x)] - beta [log p(y'|x) - log p_t(y'|x)] )

    Two variants need `lengths`, [pairs, 2], the responses' tokens (with the end token where there is one):

    - length_normalised: each bracket is divided by its response's length, so that a margin is one of means a token and
      a long answer counts no more than a short one (SimPO, arXiv 2405.14734, section 2.2, which has no reference; with
      one, as here: the length-normalised DPO of Tulu 3, arXiv 2411.15124, section 5.1). As margins are smaller by
      the length of an answer, beta has to be larger (SimPO: 2 to 10, Tulu 3: 5).
    - sft_weight w: w times the negative log-likelihood of the real response a token, -log p(y|x) / |y|, is added: an
      anchor against log p(y|x) falling while the margin grows (Iterative RPO, arXiv 2404.19733, equation 1, which
      normalises by length, too). A token's mean, not the sum, so that w needs no change with the length of answers.
    """
    gains = policy_logps - reference_logps
    if length_normalised:
        assert lengths is not None
        gains = gains / lengths
    rewards = beta * gains
    margins = rewards[:, 0] - rewards[:, 1]
    losses = LINKS[link](margins)
    metrics = {
        "rewards/real": rewards[:, 0],
        "rewards/generated": rewards[:, 1],
        "rewards/margins": margins,
        # A tie counts as half, so that a policy equal to its opponent shows 0.5.
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "logps/real": policy_logps[:, 0],
        "logps/generated": policy_logps[:, 1],
    }
    if sft_weight:
        assert lengths is not None
        metrics |= {"loss/spin": losses, "loss/sft": -policy_logps[:, 0] / lengths[:, 0]}
        losses = losses + sft_weight * metrics["loss/sft"]
    return losses, {name: value.detach() for name, value in {"loss": losses, **metrics}.items()}


def mix_references(opponent_logps: Tensor, start_logps: Tensor, alpha: float) -> Tensor:
    """log-probs of the geometric mixture of opponent and start, p_t^alpha p_0^(1 - alpha), not normalised.

    This is what keeping near both, alpha KL(p || p_t) + (1 - alpha) KL(p || p_0), comes to (alpha-SPIN, arXiv 2404.04291):
    alpha = 1 is SPIN, 0 keeps the start as reference. The mixture is one of whole responses, and its normaliser Z(x) is
    left out, as it would take a sum over all of them. It cancels in the margin, so the loss is exact; what is lost is the
    common level of `rewards/real` and `rewards/generated`, and with `length_normalised` (two lengths divide it) the
    cancelling. Shapes as in `spin_loss`.
    """
    return alpha * opponent_logps + (1 - alpha) * start_logps
