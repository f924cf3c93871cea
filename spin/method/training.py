"""The main player's training loop."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from spin.engines.base import Engine
from spin.engines.logps import Forward
from spin.engines.packing import Batch, Continuations
from spin.method.objectives import link_at_zero, spin_loss
from spin.method.pairs import Pair, by_prompt, items_of, to_pairs
from spin.runtime.checkpoints import Checkpoints, TrainState
from spin.runtime.errors import UserError
from spin.runtime.random import seed_of
from spin.runtime.signals import Interrupted, deferred

# An objective turns a batch's log-probs into a loss and metrics of each of its items, both [items].
# It is told which items they are, and which step it is.
Objective = Callable[[Batch, Tensor, list[int], int], tuple[Tensor, dict[str, Tensor]]]

SKIPS_IN_A_ROW = 5  # steps without an update after which there is no hope
NO_CHECKPOINTS = Checkpoints()


def fit(
    engine: Engine,
    items: Sequence[Continuations],
    objective: Objective,
    forward: Forward,
    *,
    lr: float,
    epochs: float,
    batch_size: int,
    warmup_ratio: float,
    seed: int,
    log: Callable[[dict], None],
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> TrainState:
    """Minimise the mean of `objective` over batches of `batch_size` items; every item of a batch weighs the same.

    `epochs` passes (a fraction is part of a pass) in an order drawn from `seed`, learning rate rising linearly over the
    first `warmup_ratio` of the steps and falling linearly to 0 after. `log` gets one row a step, those of steps that
    `checkpoints` brings back first. Uses no global random state, so that `state` and the engine's tensors are all that
    a resume needs. When the process is asked to stop, the last whole step is kept first.

    A step whose loss or gradients are not finite is skipped: no update, counted in `skipped`. Raises UserError after
    several in a row (five, or half of all where there are fewer than ten).
    """
    order = _order(len(items), epochs, seed)
    size = min(batch_size, len(items))  # batches run on across passes: only the last can be smaller
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    state = checkpoints.restore(engine)
    for row in state.rows:
        log(row)
    try:
        while state.step < len(steps):
            engine.ranks.raise_if_stopped()
            started, chosen = time.perf_counter(), steps[state.step]
            metrics: dict[str, list[Tensor]] = {}
            tokens = 0.0
            for batch, weight in engine.micro_batches([items[i] for i in chosen], forward):
                logps = engine.logps(batch, forward)
                losses, values = objective(batch, logps, [chosen[i] for i in batch.items], state.step)
                engine.backward(losses.sum() / len(chosen) * weight)
                tokens += batch.tokens if weight else 0
                for name, value in values.items():
                    metrics.setdefault(name, []).append(value if weight else value[:0])
            row = {name: engine.mean(values) for name, values in metrics.items()}
            tokens = engine.ranks.all_reduce_sum(tokens)
            rate = lr * learning_rate_factor(state.step, len(steps), warmup_ratio)
            with deferred():  # the weights and what is known of them change together
                norm = engine.step(rate) if math.isfinite(row["loss"]) else engine.skip_step()
                seconds = time.perf_counter() - started
                row |= {"grad_norm": norm, "learning_rate": rate}
                row |= {"tokens_per_second": tokens / seconds, "pairs_per_second": len(chosen) / seconds}
                state.add({"step": state.step, "steps": len(steps), "pairs": len(chosen), **row}, seconds)
                log(state.rows[-1])
                _check_finite(state, len(steps))
                if checkpoints.due(state):
                    checkpoints.write(engine, state)
    except Interrupted:
        with deferred():
            if checkpoints.write(engine, state):
                checkpoints.say(f"training is kept up to step {state.step} of {len(steps)}")
        raise
    return state


def _check_finite(state: TrainState, steps: int) -> None:
    if state.skipped_in_a_row >= min(SKIPS_IN_A_ROW, -(-steps // 2)):
        raise UserError(
            f"loss or gradients were not finite in {state.skipped_in_a_row} steps up to step {state.step} of {steps}, "
            "without a break: lower the learning rate (optimizer.lr, schedule.sft_lr), or try engine.precision=fp32."
        )


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up, then linear decay that would reach 0 one step after the last; `step` counts from 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def _order(count: int, epochs: float, seed: int) -> list[int]:
    """Indices for all epochs, each epoch a permutation of its own."""
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order += torch.randperm(count, generator=generator).tolist()
    return order[: max(1, round(count * epochs))]


# How far the log-probs of two batchings of one response may be apart, in nats, for each root of its tokens: rounding
# errors add up like a random walk. Several times what the embedded model shows.
FIRST_STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def train_spin(
    engine: Engine,
    pairs: Sequence[Pair],
    forward: Forward,
    *,
    beta: float,
    link: str,
    log: Callable[[dict], None],
    reference_logps: Tensor | None = None,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
    **settings,
) -> TrainState:
    """Train the policy against the scored `pairs` (section 4.1 of the paper); `settings` as for `fit`.

    Pairs that share a prompt and an iteration are one item, and weigh as much together as the one pair of another prompt.
    `reference_logps`, [pairs, 2], stand in for the opponent's in the loss; the other variants are those of `spin_loss`.

    The first step is checked: nothing is trained yet, so policy and opponent must agree. Raises UserError if not.
    """
    groups = by_prompt(pairs)
    opponent = torch.tensor([[p.opponent_logp_real, p.opponent_logp_generated] for p in pairs])
    reference = opponent if reference_logps is None else reference_logps
    lengths = torch.tensor([[len(p.real_ids), len(p.generated_ids)] for p in pairs])

    def objective(batch: Batch, logps: Tensor, indices: list[int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = [pair for item in indices for pair in groups[item]]
        counts = torch.tensor([len(groups[item]) for item in indices])
        policy_logps = to_pairs(logps, (counts + 1).tolist())
        opponent_logps, reference_logps, tokens = (x[chosen].to(logps.device) for x in (opponent, reference, lengths))
        if step == 0:
            tolerance = FIRST_STEP_TOLERANCE[engine.dtype] * math.sqrt(len(batch.target) / batch.responses)
            check_first_step(policy_logps.detach(), opponent_logps, beta, link, tolerance)
        losses, metrics = spin_loss(
            policy_logps,
            reference_logps,
            beta,
            link,
            tokens,
            length_normalised=length_normalised,
            sft_weight=sft_weight,
        )
        if reference is not opponent or length_normalised:  # then rewards do not show how log p has changed
            gains = (policy_logps - opponent_logps).detach()
            metrics |= {"gains/real": gains[:, 0], "gains/generated": gains[:, 1]}
        mean = partial(_mean_of_item, counts=counts.to(logps.device))
        return mean(losses), {name: mean(values) for name, values in metrics.items()}

    return fit(engine, items_of(pairs), objective, forward, log=log, **settings)


def _mean_of_item(values: Tensor, counts: Tensor) -> Tensor:
    """Means over the pairs of each item: values [pairs], an item's one after another; counts [items]."""
    item = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
    return values.new_zeros(len(counts)).index_add(0, item, values / counts[item])


def check_first_step(policy_logps: Tensor, opponent_logps: Tensor, beta: float, link: str, tolerance: float) -> None:
    """Before any update margin = 0 and loss = l(0), both against the opponent, whatever the reference.

    Raises UserError if the mean |log-ratio| exceeds `tolerance` (nats).
    """
    worst = (policy_logps - opponent_logps).abs().mean().item()
    if not worst <= tolerance:
        loss = spin_loss(policy_logps, opponent_logps, beta, link)[0].mean().item()
        raise UserError(
            f"the policy does not equal its opponent at the first step: log-probs differ by {worst:.3g} nats a response "
            f"(loss {loss:.5f}, where l(0) = {link_at_zero(link):.5f}): the stored scores were made by other weights. "
            "Remove this iteration's folder under store.path/score and run again."
        )


def train_sft(
    engine: Engine, items: Sequence[Continuations], forward: Forward, *, log: Callable[[dict], None], **settings
) -> TrainState:
    """Fine-tune on the human answers: the mean over examples of their negative log-likelihood a token."""

    def objective(batch: Batch, logps: Tensor, indices: list[int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        lengths = torch.tensor([len(items[i].responses[0]) for i in indices], device=logps.device)
        losses = -logps / lengths
        return losses, {"loss": losses.detach(), "logps/real": logps.detach()}

    return fit(engine, items, objective, forward, log=log, **settings)
