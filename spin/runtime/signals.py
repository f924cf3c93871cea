"""Convert SIGTERM, SIGUSR1, SIGUSR2 (cluster notices), SIGHUP and Ctrl-C to one exception, raised at a safe moment."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spin.runtime.errors import user_message

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)  # SLURM sends them shortly before the time limit

_depth = 0
_waiting = 0
_raised = 0
_previous: dict[signal.Signals, Callable] = {}


class Interrupted(KeyboardInterrupt):
    """The process received the stop signal `signal`. `except Exception` in a library does not catch it."""

    def __init__(self, number: signal.Signals):
        super().__init__(number)
        self.signal = number


def install_handlers() -> None:
    """Make the first of these signals raise `Interrupted` in the main thread; a second Ctrl-C ends the process.

    Signals that are ignored at start (nohup, background jobs of a shell) stay ignored.
    """
    global _depth, _waiting, _raised
    _depth = _waiting = _raised = 0
    sys.unraisablehook = _on_unraisable
    if threading.current_thread() is threading.main_thread():  # required by Python
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number in SCHEDULERS and callable(before) and before is not _handle:
                _previous[number] = before
            if before != signal.SIG_IGN:
                signal.signal(number, _handle)


def call_previous_handler(number: signal.Signals) -> None:
    """Call the handler that `install_handlers` replaced, after all work is stored: submitit's requeues the job and exits.

    SLURM sends SIGTERM both before a preemption and on cancellation; a preempted job is requeued.
    """
    handler = _previous.get(number)
    if number == signal.SIGTERM and _previous and is_preempted():
        number, handler = next(iter(_previous.items()))
    if handler:
        handler(number, None)


def is_preempted() -> bool:
    """Return whether this is a SLURM job that is being preempted."""
    command = ["scontrol", "show", "job", "--oneliner", os.environ.get("SLURM_JOB_ID", "none")]
    try:
        job = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):  # not on a cluster
        return False
    return bool(re.search(r"JobState=(PREEMPTED|RUNNING .*PreemptTime=\d)", job))


@contextmanager
def deferred() -> Iterator[None]:
    """Delay signals that arrive inside the block until its end."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0 and _waiting:
            raise_signal(_waiting)


def raise_if_stopped() -> None:
    """Raise `Interrupted` again if a library has swallowed it."""
    if _raised:
        raise_signal(_raised)


def pending_signal() -> int:
    """Return the signal that is delayed by `deferred`, 0 if there is none."""
    return _waiting


def received_signal() -> int:
    """Return the stop signal that this process has received, 0 if none."""
    return _raised or _waiting


def raise_signal(number: int) -> None:
    """Raise `Interrupted` now, even within `deferred`, so that ranks can stop together."""
    global _waiting, _raised
    _waiting, _raised = 0, number
    raise Interrupted(signal.Signals(number))


def _handle(number: int, frame: object) -> None:
    global _waiting
    if _raised or _waiting:
        if number == signal.SIGINT:  # stored work is complete at any moment
            # `print` is not reentrant. The escape sequence shows the cursor that a progress bar may have hidden.
            os.write(2, b"terminated immediately.\n" + (b"\x1b[?25h" if os.isatty(2) else b""))
            os._exit(128 + number)
    elif _depth:  # only the first counts, because schedulers repeat their notice
        _waiting = number
    else:
        raise_signal(number)


def _on_unraisable(unraisable: Any) -> None:
    """Handle an exception that Python drops, from a finaliser, an exit callback or a fork hook.

    `Interrupted` is raised again soon. Other exceptions are printed, unless the machine failed or the process is stopping:
    the run prints a line about these.
    """
    global _raised
    if isinstance(unraisable.exc_value, Interrupted):
        _raised = 0
        threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.signal)).start()
    elif not _raised and user_message(unraisable.exc_value) is None:
        sys.__unraisablehook__(unraisable)
