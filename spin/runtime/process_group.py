"""The processes of one run: their ranks, and what they exchange.

`torchrun` starts them, on one machine or several, and describes them in the environment. All ranks execute the same game;
the main process alone writes to the store and prints.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spin.runtime.errors import UserError
from spin.runtime.signals import pending_signal, raise_if_stopped, raise_signal

# Ranks wait for the main process while it waits for another run or evaluates. A rank that dies is noticed at once.
TIMEOUT = timedelta(days=30)


class ProcessGroup:
    """This process among `size` others: `rank` of all, `local` of the `here` on its machine. Alone, it exchanges nothing."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, here: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.local, self.here = rank, size, local, here
        self._store = store or dist.HashStore()  # of keys and values, shared by all ranks
        self._counters = 0
        self._is_first: bool | None = None

    @property
    def is_main_process(self) -> bool:
        """Rank 0, which writes and prints."""
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """Return the main process's `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of every rank, by rank, on all of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce_max(self, value: float) -> float:
        """Return the maximum over all ranks."""
        return self._all_reduce([value], dist.ReduceOp.MAX)[0]

    def all_reduce_sum(self, value: float) -> float:
        """Return the sum over all ranks."""
        return self._all_reduce([value], dist.ReduceOp.SUM)[0]

    def mean(self, values: Tensor) -> float:
        """Return the mean over all entries, [n], of all ranks; n may differ between them, and be 0."""
        total, count = self._all_reduce([values.double().sum().item(), len(values)], dist.ReduceOp.SUM)
        return total / count

    def _all_reduce(self, values: list[float], operation: Any) -> list[float]:
        if self.size == 1:
            return values
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, op=operation)
        return box.tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce_max(0)  # `dist.barrier` would go through the GPUs

    def claim_indices(self) -> Iterator[int]:
        """Yield 0, 1, 2, ..., each on the one rank that asks first. All ranks must call this in the same order."""
        add = self.counter()  # now: also on a rank that takes none
        return (add(1) - 1 for _ in itertools.count())

    def counter(self) -> Callable[[int], int]:
        """Return a function that adds to a count and returns its sum over all ranks. All must call this in the same order."""
        self._counters += 1
        return partial(self._store.add, f"count/{self._counters}")

    def raise_if_stopped(self) -> None:
        """Raise `Interrupted` on every rank if any received a stop signal. All ranks must call this."""
        if self.size == 1:
            raise_if_stopped()
        elif number := int(self.all_reduce_max(pending_signal())):
            raise_signal(number)

    def raise_together(self, error: UserError | None) -> None:
        """Raise on every rank the `error` of the first that has one. All ranks must call this."""
        for found in self.gather(error):
            if found:
                raise found

    def is_first_to_fail(self) -> bool:
        """Return whether this rank, which has failed, was the first to: it prints the reason."""
        if self._is_first is None:
            try:
                self._is_first = self._store.add("failed", 1) == 1
            except RuntimeError:  # the process that keeps the store has ended
                self._is_first = self.is_main_process
        return self._is_first


SINGLE_PROCESS = ProcessGroup()
_current = SINGLE_PROCESS


def current_group() -> ProcessGroup:
    """Return the group that this process has joined."""
    return _current


def join_group(engine: str, device: str) -> ProcessGroup:
    """Join the processes that torchrun started; without torchrun, a group of one.

    Raises UserError: several processes for an engine of one process, or more processes than GPUs.
    """
    global _current
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if engine != "deepspeed":
        if size > 1:
            raise UserError(
                f"{size} processes were started, and engine={engine} plays in one: set engine=deepspeed, or start one."
            )
        return SINGLE_PROCESS
    if _current is SINGLE_PROCESS:
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
        os.environ.setdefault("LOCAL_RANK", str(local))  # DeepSpeed needs it
        store: dist.Store = dist.HashStore()
        if "MASTER_ADDR" in os.environ:
            store, _, _ = next(dist.rendezvous("env://", rank, size))
        store.set_timeout(TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        torch_store = dist.PrefixStore("torch", store)
        dist.init_process_group(backend, store=torch_store, rank=rank, world_size=size, timeout=TIMEOUT)
        _current = ProcessGroup(rank, size, local, here, dist.PrefixStore("spin", store))
        if on_gpu:  # after joining, so that one rank prints the error, on whatever machine
            if here > (gpus := torch.cuda.device_count()):
                raise UserError(f"{here} processes on a machine with {gpus} GPUs: lower torchrun's --nproc-per-node.")
            torch.cuda.set_device(local)
    return _current


def leave_group() -> None:
    """Leave the group at the end of a successful run."""
    global _current
    if _current is not SINGLE_PROCESS:
        with suppress(RuntimeError):
            dist.destroy_process_group()
        _current = SINGLE_PROCESS
