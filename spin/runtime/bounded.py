"""Run code that depends on untrusted files in a child process with limits on time and memory."""

import json
import os
import re
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

from spin.runtime.errors import OUT_OF_MEMORY, UserError, brief, explaining, user_message
from spin.runtime.signals import SIGNALS, deferred

SECONDS, MEMORY = 10.0, 3 * 2**29  # processor time, and bytes in addition to those of this process
WAIT = 60  # limit on wall-clock time, as a multiple of the processor time
SHORT_OF_MEMORY = 77  # exit status of a child that ran out of memory


class Exceeded(Exception):
    """The child exceeded its limit on time or memory, or crashed."""


class Bounded:
    """A child process that applies `function` to items and returns text. Forked at first use, it ends with this process.

    Its limits are `seconds` of processor time, replenished by `each` seconds per item, and `memory` bytes more than
    this process has. It holds none of this process's files, sockets and locks open.
    """

    def __init__(self, function: Callable[[Any], str], seconds: float = SECONDS, each: float = 0, memory: int = MEMORY):
        self.function, self.seconds, self.each, self.memory = function, seconds, each, memory
        self.owner = self.child = 0
        self.pipe: Connection

    def map(self, items: Sequence[Any]) -> list[tuple[bool, str]]:
        """Return for each item (True, result) or (False, error). Raises Exceeded."""
        if self.owner != os.getpid():
            self._start()
        is_complete = False
        try:
            self.pipe.send(list(items))
            if not self.pipe.poll(WAIT * self.seconds):
                raise Exceeded(f"gives no result in {WAIT * self.seconds:.0f} s")
            replies = json.loads(self.pipe.recv_bytes())
            is_complete = True
            return replies
        except (EOFError, OSError) as error:
            raise Exceeded(self._reason(self.close())) from error
        finally:
            if not is_complete:
                self.close()

    def close(self) -> int:
        """End the child and return its exit status, which is negative for a signal."""
        owner, self.owner = self.owner, 0
        if owner == os.getpid():
            self.pipe.close()
            with suppress(ProcessLookupError, ChildProcessError):  # it has already ended
                os.kill(self.child, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        return 0

    def _reason(self, status: int) -> str:
        if status == SHORT_OF_MEMORY:
            return f"needs more than {self.memory >> 20} MiB of memory"
        if status == -signal.SIGPROF:
            return f"takes more than {self.seconds:g} s"
        return f"crashes ({signal.Signals(-status).name if status < 0 else status})"

    def _start(self) -> None:
        self.pipe, there = Pipe()
        with deferred():  # an exception within a hook of fork could leave logging locked
            self.owner, self.child = os.getpid(), os.fork()
            if self.child == 0:
                self._serve(there)
        there.close()

    def _serve(self, pipe: Connection) -> NoReturn:
        status = 1
        try:
            self._isolate(pipe.fileno())
            while True:
                pipe.send_bytes(json.dumps([self._apply(item) for item in pipe.recv()]).encode())
        except MemoryError:
            status = SHORT_OF_MEMORY
        finally:
            os._exit(status)  # no handler of the parent runs here

    def _isolate(self, kept: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the parent handles them and closes the pipe
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        os.closerange(3, kept)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        with suppress(OSError, ValueError):  # /proc exists on Linux only
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + self.memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        signal.setitimer(signal.ITIMER_PROF, self.seconds)  # its signal also interrupts C code

    def _apply(self, item: Any) -> tuple[bool, str]:
        remaining = signal.getitimer(signal.ITIMER_PROF)[0]
        signal.setitimer(signal.ITIMER_PROF, min(self.seconds, remaining + self.each))
        try:
            return True, self.function(item)
        except BaseException as error:  # a Rust panic is not an Exception
            if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE):
                raise MemoryError from error
            return False, user_message(error) or brief(error, 600)


def try_out(function: Callable[[], object], problem: str, advice: str = "", seconds: float = SECONDS) -> None:
    """Call `function` in a child process. Raises UserError, as `explaining(problem, advice)` does, if it fails."""

    def attempt(_: None) -> str:
        with explaining(problem, advice, BaseException):
            function()
        return ""

    child = Bounded(attempt, seconds)
    with closing(child), explaining(problem, advice, Exceeded):
        [(succeeded, text)] = child.map([None])
    if not succeeded:
        raise UserError(text)
