"""The processes that play one game together: who they are, and the few words that they exchange.

`torchrun` starts them, on one machine or several, and says so in the environment. Every rank goes through the same game;
rank 0 alone keeps the store, writes and speaks.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spin.runtime.errors import UserError
from spin.runtime.signals import pending_signal, raise_if_stopped, raise_signal

# Others wait while rank 0 waits for another run, or measures by itself: as long as it takes. A rank that dies is found at once.
PATIENCE = timedelta(days=30)


class ProcessGroup:
    """One process of `size`, `rank` among all and `local` on its machine, of `here` there. By itself it says nothing and
    agrees with everything."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, here: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.local, self.here = rank, size, local, here
        self._store = store  # what they all see, kept by the process that started them
        self._counters = 0
        self._is_first: bool | None = None

    @property
    def is_main_process(self) -> bool:
        """Rank 0, which writes and speaks."""
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_reduce_max(self, value: float) -> float:
        """The largest of all ranks' values."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def all_reduce_sum(self, value: float) -> float:
        """The sum of all ranks' values."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def _reduced(self, value: float, how: Any) -> float:
        if self.size == 1:
            return value
        box = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(box, op=how)
        return box.item()

    def mean(self, values: Tensor) -> float:
        """The mean over all entries, [n], of all ranks; n may differ between them, and be 0."""
        if self.size == 1:
            return values.double().mean().item()
        box = torch.tensor([values.double().sum().item(), float(len(values))], dtype=torch.float64)
        dist.all_reduce(box)
        return (box[0] / box[1]).item()

    def barrier(self) -> None:
        """Until every rank has come here."""
        self.all_reduce_max(0)  # `barrier` would go over the GPUs, where there are some

    def claim_indices(self) -> Iterator[int]:
        """0, 1, 2, ..., each for one rank only: whoever is free takes the next. All ranks make the same queues, in one order."""
        counter = self.counter()  # now, whoever takes none has it, too
        return (counter.add(1) - 1 for _ in itertools.count())

    def counter(self) -> "Counter":
        """A count that all ranks add to. All ranks make the same counters, in one order."""
        self._counters += 1
        return Counter(self._store, f"count/{self._counters}")

    def raise_if_stopped(self) -> None:
        """Raise `Interrupted` on every rank if any was asked to stop. Every rank has to come here."""
        if self.size == 1:
            raise_if_stopped()
        elif number := int(self.all_reduce_max(pending_signal())):
            raise_signal(number)

    def is_first_to_fail(self) -> bool:
        """False where another rank has failed before: its line says why. Asked at the end, when this rank has failed."""
        if self._is_first is None:
            try:
                self._is_first = self._store is None or self._store.add("failed", 1) == 1
            except RuntimeError:  # whoever keeps the store is gone
                self._is_first = self.is_main_process
        return self._is_first


class Counter:
    """See `Ranks.counter`."""

    def __init__(self, store: dist.Store | None, key: str):
        self._store, self._key, self._value = store, key, 0

    def add(self, count: int) -> int:
        """What all ranks together have counted now, with these `count` more."""
        self._value = self._value + count if self._store is None else self._store.add(self._key, count)
        return self._value


SINGLE_PROCESS = ProcessGroup()
_joined = SINGLE_PROCESS


def current_group() -> ProcessGroup:
    """The ranks that this process has joined."""
    return _joined


def join_group(engine: str, device: str) -> ProcessGroup:
    """Meet the other processes that torchrun started; a process that was started by itself is a game of one rank.

    Raises UserError: several processes for an engine that is one.
    """
    global _joined
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if engine != "deepspeed":
        if size > 1:
            raise UserError(
                f"{size} processes were started, and engine={engine} plays in one: set engine=deepspeed, or start one."
            )
        return SINGLE_PROCESS
    if _joined is SINGLE_PROCESS:
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
        os.environ.setdefault("LOCAL_RANK", str(local))  # without which DeepSpeed does not begin
        store: dist.Store = dist.HashStore()
        if "MASTER_ADDR" in os.environ:
            store, _, _ = next(dist.rendezvous("env://", rank, size))
        store.set_timeout(PATIENCE)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        meeting = dist.PrefixStore("torch", store)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=PATIENCE)
        _joined = ProcessGroup(rank, size, local, here, dist.PrefixStore("spin", store))
        if on_gpu:  # joined before, so that one of them says it, whosever machine it is
            if here > torch.cuda.device_count():
                raise UserError(
                    f"{here} processes were started on a machine with {torch.cuda.device_count()} GPUs: "
                    "give torchrun a smaller --nproc-per-node."
                )
            torch.cuda.set_device(local)
    return _joined


def leave_group() -> None:
    """End what `start` began, at the end of a game that went well."""
    global _joined
    if _joined is not SINGLE_PROCESS:
        with suppress(RuntimeError):
            dist.destroy_process_group()
        _joined = SINGLE_PROCESS
