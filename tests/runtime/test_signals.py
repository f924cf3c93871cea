"""Stop signals at moments when Python cannot raise an exception."""

import subprocess
import sys

FINALISER = """
import signal, time
from spin.runtime.signals import Interrupted, install_handlers

class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

install_handlers()
Freed()
try:
    time.sleep(20)
except Interrupted as stop:
    print(stop.signal.name)
"""

FORK = """
import os, signal
from contextlib import closing
from spin.runtime.bounded import Bounded
from spin.runtime.signals import Interrupted, install_handlers

install_handlers()
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGTERM))
child = Bounded(str)
with closing(child):
    try:
        child.map([1])
    except Interrupted as stop:
        print(stop.signal.name)
"""

ERRORS = """
import atexit, errno, signal
from spin.runtime.signals import Interrupted, install_handlers

class Freed:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        raise self.error

install_handlers()
Freed(OSError("error closing file"))
Freed(OSError(errno.ESTALE, "Stale file handle"))
Freed(ValueError("a fault"))

@atexit.register
def teardown():
    raise ConnectionResetError("Connection lost")

if STOPPED:
    try:
        signal.raise_signal(signal.SIGTERM)
    except Interrupted:
        pass
"""


def run(code: str) -> tuple[str, str]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return result.stdout, result.stderr


def test_signal_in_finaliser():
    assert run(FINALISER) == ("SIGTERM\n", "")


def test_signal_while_forking():
    assert run(FORK) == ("SIGTERM\n", "")


def test_errors_in_finalisers():
    """Disk errors in finalisers, and lost connections after a signal, are not printed; other errors are."""
    _, stopped = run(ERRORS.replace("STOPPED", "True"))
    _, ended = run(ERRORS.replace("STOPPED", "False"))
    assert "ValueError: a fault" in stopped and "Connection lost" not in stopped and "OSError" not in stopped
    assert "ValueError: a fault" in ended and "Connection lost" in ended and "OSError" not in ended
