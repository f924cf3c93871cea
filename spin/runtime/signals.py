"""SIGTERM, SIGUSR1, SIGUSR2 (a cluster's notices), SIGHUP (a lost terminal) and Ctrl-C, turned into one exception at a
safe moment."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)  # what SLURM is told to send a while before the time is over

_depth = 0
_waiting: signal.Signals | None = None
_raised: signal.Signals | None = None
_theirs: dict[int, Callable] = {}


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop; `signal` says by what. No `except Exception` of a library swallows it."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.signal = number

    def __reduce__(self):  # on its way out of a process that plays a point of a sweep
        return type(self), (self.signal,)


def install_handlers() -> None:
    """From now on these signals raise `Interrupted` in the main thread, once; a second Ctrl-C ends the process at once.

    Signals that the process was started to ignore (nohup, a shell's background jobs) stay ignored.
    """
    global _depth, _waiting, _raised
    _depth, _waiting, _raised = 0, None, None
    if threading.current_thread() is threading.main_thread():  # Python sets handlers from nowhere else
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number in SCHEDULERS and callable(before) and before is not _handle:
                _theirs[number] = before
            if before != signal.SIG_IGN:
                signal.signal(number, _handle)


def call_previous_handler(number: signal.Signals) -> None:
    """Now that all is kept, call what handled this signal before `install`: submitit's, which puts the job back into the
    queue and ends the process, or says that the job has run out of time once too often."""
    if number in _theirs:
        _theirs[number](number, None)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes inside raises at the end: what must happen whole or not at all stands in here."""
    global _depth, _waiting
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0 and _waiting is not None:
            number, _waiting = _waiting, None
            _raise(number)


def raise_if_stopped() -> None:
    """Raise once more where the process was asked to stop and a library has swallowed what was raised."""
    if _raised is not None:
        raise Interrupted(_raised)


def pending_signal() -> int:
    """The signal that waits for the end of `deferred` to be raised, 0 if none does."""
    return int(_waiting or 0)


def raise_signal(number: int) -> None:
    """Raise now what `number` would raise, within `deferred` too: where several processes stop together."""
    global _waiting
    _waiting = None
    _raise(signal.Signals(number))


def _handle(number: int, frame: object) -> None:
    global _waiting
    came = signal.Signals(number)
    if _raised is not None or _waiting is not None:
        if came == signal.SIGINT:  # a person who means now; what is on the disk is whole at any moment
            # Not `print`, which may be at work; the second part shows a cursor that a progress bar may have hidden.
            os.write(2, b"ended at once.\n" + (b"\x1b[?25h" if os.isatty(2) else b""))
            os._exit(128 + number)
        return  # schedulers like to say it twice
    if _depth:
        _waiting = came
        return
    _raise(came)


def _raise(number: signal.Signals) -> None:
    global _raised
    _raised = number
    raise Interrupted(number)
