"""Hide secrets in printed and written text, and print to any kind of standard stream."""

import io
import json
import os
import re
import sys
from collections.abc import Callable

SECRET = re.compile("key|token|secret|passw|credential", re.IGNORECASE)  # in a variable's name
_hidden: dict[str, str] = {}  # secret value -> replacement


def note_secrets(settings: str) -> None:
    """Register the values that `hide` replaces: environment variables with names like secrets, and those that the
    `settings` (unresolved YAML) read from the environment, except paths and numbers."""
    for name in {*re.findall(r"oc\.env:\s*(\w+)", settings), *filter(SECRET.search, os.environ)}:
        value = os.environ.get(name, "")
        is_path = os.path.exists(value) or (not SECRET.search(name) and re.match(r"[~/.]", value))
        if len(value) >= 8 and not is_path and not re.fullmatch(r"[\d.e+-]+", value):
            _hidden[value] = _hidden[json.dumps(value)[1:-1]] = f"${{oc.env:{name}}}"


def hide(text: str) -> str:
    """Return `text` with secrets replaced by the names of their variables."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return text


class Printer(io.TextIOWrapper):
    """A standard stream that hides secrets, prints "?" for characters missing from its encoding, and ignores a closed
    terminal or pipe (`| head`)."""

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
    """Replace stdout and stderr by `Printer`s, and open closed standard streams on the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next opened file would get its descriptor
            sys.__dict__[name] = sys.__dict__[f"__{name}__"] = open(os.devnull, mode)  # noqa: SIM115
        stream = getattr(sys, name)
        if mode == "w" and not isinstance(stream, Printer) and hasattr(stream, "buffer"):  # not a notebook's
            printer = Printer(stream.buffer, stream.encoding, "replace")
            printer.replaced = stream  # keeps a reference: its finaliser would close the buffer
            setattr(sys, name, printer)
