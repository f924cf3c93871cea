"""The training loop of the main player."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spin.engines.base import Engine
from spin.engines.logps import Forward
from spin.engines.packing import Batch, Continuations
from spin.engines.routers import balance_losses, record_router_logits
from spin.method.objectives import Metrics, Objective
from spin.method.pairs import (
    RESPONSES,
    Ids,
    Logps,
    Pair,
    group_by_prompt,
    split_responses,
    to_continuations,
)
from spin.runtime.checkpoints import Checkpoints, TrainState
from spin.runtime.errors import UserError
from spin.runtime.random import seed_of
from spin.runtime.signals import deferred
from spin.runtime.tables import Rows

# batch_loss(batch, logps, indices, step) returns the loss and metrics of each item of a micro-batch, each [items].
# `logps` are the log-probs of its responses, `indices` the indices of its items, and `step` counts from 0.
BatchLoss = Callable[[Batch, Tensor, list[int], int], tuple[Tensor, Metrics]]

MAX_SKIPPED_IN_A_ROW = 5
NO_CHECKPOINTS = Checkpoints()
# Largest accepted difference between a response's log-probs in two batches, in nats per square root of its token count,
# as rounding errors add up like a random walk. Several times the difference observed with real models.
FIRST_STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def fit(
    engine: Engine,
    items: Sequence[Continuations],
    batch_loss: BatchLoss,
    forward: Forward,
    *,
    lr: float,
    epochs: float,
    batch_size: int,
    warmup_ratio: float,
    seed: int,
    pairs_per_item: Sequence[int] | None = None,
    router_aux_weight: float = 0.0,
    log: Callable[[dict], None],
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> TrainState:
    """Minimise the mean of `batch_loss` over batches of `batch_size` items. Returns the final state.

    `epochs` may be fractional. The learning rate rises linearly over the first `warmup_ratio` of the steps, then falls
    linearly to 0. `log` is called with one row per step, restored steps first. `router_aux_weight` is the weight of the
    routers' load-balancing loss, averaged over each item's responses. On a stop signal the last complete step is saved.

    A step whose loss or gradients are not finite is skipped. Raises UserError after several in a row.
    """
    steps = plan_steps(len(items), epochs, batch_size, seed)
    state = checkpoints.restore(engine)
    for row in state.rows:
        log(row)
    with checkpoints.write_on_interrupt(engine, state, len(steps)):
        while state.step < len(steps):
            engine.ranks.raise_if_stopped()
            started, chosen = time.perf_counter(), steps[state.step]
            row = _accumulate_gradients(engine, items, batch_loss, forward, chosen, state.step, router_aux_weight)
            rate = lr * learning_rate_factor(state.step, len(steps), warmup_ratio)
            with deferred():  # a signal must not interrupt between the update and its record
                norm = engine.step(rate if math.isfinite(row["loss"]) else None)
                seconds = time.perf_counter() - started
                row |= {"grad_norm": norm, "learning_rate": rate, "tokens_per_second": row.pop("tokens") / seconds}
                pairs = sum(pairs_per_item[i] for i in chosen) if pairs_per_item else len(chosen)
                row |= {"prompts": len(chosen), "pairs": pairs, "pairs_per_second": pairs / seconds}
                state.add({"step": state.step, "steps": len(steps), **row}, seconds)
                log(state.rows[-1])
                _check_finite(state, len(steps))
                if checkpoints.due(state):
                    checkpoints.write(engine, state)
    return state


def _accumulate_gradients(
    engine: Engine,
    items: Sequence[Continuations],
    batch_loss: BatchLoss,
    forward: Forward,
    chosen: list[int],
    step: int,
    router_aux_weight: float,
) -> dict[str, float]:
    """Accumulate the gradients of a step. Returns the means of its metrics and its `tokens`, both over all ranks."""
    metrics: dict[str, list[Tensor]] = {}
    tokens = 0.0
    for batch, weight in engine.micro_batches([items[i] for i in chosen], forward):
        indices = [chosen[i] for i in batch.items]
        with record_router_logits(engine.model if router_aux_weight else None) as routed:
            logps = engine.logps(batch, forward)
        losses, values = batch_loss(batch, logps, indices, step)
        if router_aux_weight:
            counts = [len(items[i].responses) for i in indices]
            balance = mean_per_item(balance_losses(engine.model, routed, batch, forward.layout), counts)
            losses = losses + router_aux_weight * balance
            values = values | {"loss": losses.detach(), "loss/router": balance.detach()}
        engine.backward(losses.sum() / len(chosen) * weight)
        tokens += batch.tokens if weight else 0
        for name, value in values.items():
            metrics.setdefault(name, []).append(value if weight else value[:0])
    means = {name: engine.ranks.mean(torch.cat(values).cpu()) for name, values in metrics.items()}
    return means | {"tokens": engine.ranks.all_reduce_sum(tokens)}


def plan_steps(count: int, epochs: float, batch_size: int, seed: int) -> list[list[int]]:
    """Return the item indices of each step. Each epoch is a new permutation; batches may span two epochs."""
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order += torch.randperm(count, generator=generator).tolist()
    order = order[: max(1, round(count * epochs))]
    size = min(batch_size, count)  # only the last batch may be smaller
    return [order[start : start + size] for start in range(0, len(order), size)]


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the learning rate's factor: linear warm-up, then linear decay that reaches 0 one step after the last."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def _check_finite(state: TrainState, steps: int) -> None:
    if state.skipped_in_a_row >= min(MAX_SKIPPED_IN_A_ROW, -(-steps // 2)):
        raise UserError(
            f"loss or gradients were not finite in {state.skipped_in_a_row} steps in a row, up to step {state.step} of "
            f"{steps}: lower the learning rate (optimizer.lr, schedule.sft_lr), or set engine.precision=fp32."
        )


def train_spin(
    engine: Engine,
    pairs: Sequence[Pair],
    references: Mapping[str, Logps],
    objective: Objective,
    forward: Forward,
    *,
    first: Mapping[tuple[str, int], Ids] | None = None,
    **settings,
) -> TrainState:
    """Train the policy to distinguish human answers from its opponent's (section 4.1 of the paper).

    `references` holds the pairs' log-probs under each model that the objective names, `first` iteration 0's answers by
    example id and answer index; `settings` are those of `fit`. Pairs that share a prompt are one item, with the same
    total weight as a single pair. Raises UserError if the policy does not equal its opponent at the first step.
    """
    groups = group_by_prompt(pairs)
    items = to_continuations(pairs, first)
    table = Rows.of(Pair, pairs)
    lengths = {name: torch.from_numpy(table.lengths(f"{name}_ids")) for name in RESPONSES}

    def batch_loss(batch: Batch, logps: Tensor, indices: list[int], step: int) -> tuple[Tensor, Metrics]:
        rows = [row for index in indices for row in groups[index]]
        counts = [len(groups[index]) for index in indices]

        def select(values: Logps) -> Logps:
            return {name: value[rows].to(logps.device) for name, value in values.items()}

        policy = split_responses(logps, counts, objective.responses)
        reference_logps = {model: select(values) for model, values in references.items()}
        losses, metrics = objective.loss(policy, reference_logps, select(lengths))
        if step == 0:
            tolerance = FIRST_STEP_TOLERANCE[engine.dtype] * math.sqrt(len(batch.target) / batch.responses)
            check_first_step(policy, reference_logps["opponent"], losses, objective.initial_loss, tolerance)
        return mean_per_item(losses, counts), {name: mean_per_item(values, counts) for name, values in metrics.items()}

    settings |= {"pairs_per_item": list(map(len, groups)), "router_aux_weight": objective.router_aux_weight}
    return fit(engine, items, batch_loss, forward, **settings)


def mean_per_item(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Average `values`, [pairs], over each item: [items]. `counts`, [items], are the items' numbers of pairs."""
    sizes = torch.tensor(counts, device=values.device)
    item = torch.arange(len(counts), device=values.device).repeat_interleave(sizes)
    return values.new_zeros(len(counts)).index_add(0, item, values / sizes[item])


def check_first_step(
    policy: Logps, opponent: Logps, losses: Tensor, initial_loss: float | None, tolerance: float
) -> None:
    """Raise UserError if log-probs differ from the opponent's by more than `tolerance` nats on average."""
    gap = torch.stack([(policy[name].detach() - opponent[name]).abs() for name in RESPONSES], dim=1).mean().item()
    if not gap <= tolerance:
        expected = "" if initial_loss is None else f" instead of {initial_loss:.5f}"
        raise UserError(
            f"the policy does not equal its opponent at the first step: log-probs differ by {gap:.3g} nats per response "
            f"(loss {losses.mean().item():.5f}{expected}): the stored scores were made with other weights. Remove this "
            "iteration's folder under store.path/score and run again."
        )


def train_sft(engine: Engine, items: Sequence[Continuations], forward: Forward, **settings) -> TrainState:
    """Fine-tune on the human answers by minimising their mean negative log-likelihood per token."""

    def batch_loss(batch: Batch, logps: Tensor, indices: list[int], step: int) -> tuple[Tensor, Metrics]:
        lengths = torch.tensor([len(items[i].responses[0]) for i in indices], device=logps.device)
        losses = -logps / lengths
        return losses, {"loss": losses.detach(), "logps/real": logps.detach()}

    return fit(engine, items, batch_loss, forward, **settings)
