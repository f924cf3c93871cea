"""What is printed and written: without secrets, and whatever the standard streams are."""

import io
import json
import os
import re
import sys
from collections.abc import Callable

SECRET = re.compile("key|token|secret|passw|credential", re.IGNORECASE)  # in a variable's name
_hidden: dict[str, str] = {}  # a value, and what is shown in its place


def note_secrets(settings: str) -> None:
    """From now on `hide` the values of variables that are named like secrets, and of those that the `settings` (YAML, not
    resolved) take from the environment, other than paths and numbers."""
    for name in {*re.findall(r"oc\.env:\s*(\w+)", settings), *filter(SECRET.search, os.environ)}:
        value = os.environ.get(name, "")
        is_path = os.path.exists(value) or (not SECRET.search(name) and re.match(r"[~/.]", value))
        if len(value) >= 8 and not is_path and not re.fullmatch(r"[\d.e+-]+", value):
            _hidden[value] = _hidden[json.dumps(value)[1:-1]] = f"${{oc.env:{name}}}"


def hide(text: str) -> str:
    """`text` with the names of variables in place of secrets."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return text


class Printer(io.TextIOWrapper):
    """A standard stream that hides secrets, prints "?" for characters that its encoding lacks, and is silent where the
    terminal or the pipe's reader (`| head`) is gone."""

    replaced: io.TextIOBase

    def write(self, text: str) -> int:
        self._attempt(super().write, hide(text))
        self.flush()
        return len(text)

    def flush(self) -> None:
        self._attempt(super().flush)

    def _attempt(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def open_streams() -> None:
    """Make stdout and stderr `Printer`s, and open closed standard streams on the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file that is opened would get its number
            sys.__dict__[name] = sys.__dict__[f"__{name}__"] = open(os.devnull, mode)  # noqa: SIM115
        stream = getattr(sys, name)
        if mode == "w" and not isinstance(stream, Printer) and hasattr(stream, "buffer"):  # not a notebook's
            printer = Printer(stream.buffer, stream.encoding, "replace")
            printer.replaced = stream  # which would close the buffer when nothing refers to it
            setattr(sys, name, printer)
