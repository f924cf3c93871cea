"""Render chat templates, which are untrusted programs, in a child process with limits on time, memory and output.

transformers runs them in Jinja's sandbox. The child also ensures that they end and always give the same text: the date
is fixed, and random numbers and object addresses raise an error.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Any, NoReturn

from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_NAMESPACE
from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils

from spin.runtime.bounded import Bounded

Program = tuple[str, Sequence[dict[str, Any]], dict[str, Any]]  # source, messages, variables
TODAY = datetime(2026, 1, 1)
LONGEST = 2**16  # characters of output, in addition to eight times the input


def render_programs(programs: Sequence[Program]) -> list[tuple[bool, str]]:
    """Return for each program (True, text) or (False, error). Raises `Exceeded`."""
    return _child.map(programs)


def _render(program: Program) -> str:
    """Render a program in the child process, where libraries can be patched."""
    chat_template_utils.datetime = SimpleNamespace(now=lambda: TODAY)  # type: ignore[assignment, misc]
    DEFAULT_FILTERS["random"] = DEFAULT_NAMESPACE["lipsum"] = _refuse_random
    (source, messages, variables), given = program, repr(program[1:])
    # As in `apply_chat_template`, which would need the tokenizer.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    text = chat_template_utils.render_jinja_template([messages], chat_template=source, **variables)[0][0]
    if len(text) > LONGEST + 8 * len(given):
        raise TemplateError(f"it makes {len(text):,} characters of a short conversation")
    if any(address not in given for address in re.findall(r" at (0x[0-9a-f]+)", text)):
        raise TemplateError("it prints the address of an object, which is another one in each run")
    return text


def _refuse_random(*_: Any, **__: Any) -> NoReturn:
    raise TemplateError("it uses random numbers, so that no run could be repeated")


_child = Bounded(_render, seconds=5, each=0.02, memory=2**29)
