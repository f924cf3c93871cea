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


def run(code: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


def test_signal_in_finaliser():
    assert run(FINALISER) == ("SIGTERM\n", "")


def test_signal_while_forking():
    assert run(FORK) == ("SIGTERM\n", "")
