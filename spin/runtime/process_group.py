"""The process group of a run: ranks and collective operations.

`torchrun` starts the processes, on one machine or several, and describes them in environment variables. All ranks execute
the same game; only the main process commits stages and prints.
"""

import atexit
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from spin.runtime.errors import UserError
from spin.runtime.signals import pending_signal, raise_if_stopped, raise_signal

# Ranks may wait long for the main process, which waits for another run or evaluates. A dead rank is detected immediately.
TIMEOUT = timedelta(days=30)


class ProcessGroup:
    """A group of `size` processes. This one has rank `rank`, and `local` among the `here` processes of its machine."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, here: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.local, self.here = rank, size, local, here
        self._store = store or dist.HashStore()  # key-value store shared by all ranks
        self._counters = 0
        self._is_first: bool | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """Return the main process's `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
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
        """Return the mean over the entries, [n], of all ranks; n may differ between ranks and be 0."""
        total, count = self._all_reduce([values.double().sum().item(), len(values)], dist.ReduceOp.SUM)
        return total / count

    def _all_reduce(self, values: list[float], operation: Any) -> list[float]:
        if self.size == 1:
            return values
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, op=operation)
        return box.tolist()

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.all_reduce_max(0)  # `dist.barrier` would go through the GPUs

    def claim_indices(self) -> Iterator[int]:
        """Yield 0, 1, 2, ..., each on the rank that requests it first. All ranks must call this in the same order."""
        add = self.counter()  # immediately, also on a rank that requests no index
        return (add(1) - 1 for _ in itertools.count())

    def counter(self) -> Callable[[int], int]:
        """Return a function that adds to a shared count and returns it. All ranks must call this in the same order."""
        self._counters += 1
        return partial(self._store.add, f"count/{self._counters}")

    def raise_if_stopped(self) -> None:
        """Raise `Interrupted` on every rank if one has received a stop signal. All ranks must call this."""
        if self.size == 1:
            raise_if_stopped()
        elif number := int(self.all_reduce_max(pending_signal())):
            raise_signal(number)

    def raise_together(self, error: UserError | None) -> None:
        """Raise on every rank the `error` of the lowest rank that has one. All ranks must call this."""
        for rank_error in self.gather(error):
            if rank_error:
                raise rank_error

    def is_first_to_fail(self) -> bool:
        """Return whether this rank failed first; it then prints the reason."""
        if self._is_first is None:
            try:
                self._is_first = self._store.add("failed", 1) == 1
            except RuntimeError:  # the process that hosts the store has ended
                self._is_first = self.is_main_process
        return self._is_first


SINGLE_PROCESS = ProcessGroup()
_current = SINGLE_PROCESS


def current_group() -> ProcessGroup:
    """Return the process group that this process has joined."""
    return _current


def join_group(engine: str, device: str) -> ProcessGroup:
    """Join the process group that torchrun started; without torchrun, a group of one process.

    Raises UserError: several processes for a single-process engine, or more processes than GPUs.
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
        if on_gpu:  # after joining, so that only one rank prints the error
            if here > (gpus := torch.cuda.device_count()):
                raise UserError(f"{here} processes on a machine with {gpus} GPUs: lower torchrun's --nproc-per-node.")
            torch.cuda.set_device(local)
    return _current


def leave_group() -> None:
    """Leave the process group at the end of a successful run."""
    global _current
    if _current is not SINGLE_PROCESS:
        with suppress(RuntimeError):
            dist.destroy_process_group()
        _current = SINGLE_PROCESS


def exit_process(status: int = 0) -> NoReturn:
    """End this process after `atexit`'s functions, without the interpreter's shutdown.

    A thread of a process group to which a library still holds a reference aborts the shutdown ("terminate called without
    an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
