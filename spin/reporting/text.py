"""Functions to show texts of users and models literally and safely in Markdown and on a terminal."""

import textwrap


def escape(text: str) -> str:
    """Return `text` escaped, so that Markdown shows it literally, also in a table cell."""
    escaped = "".join(f"\\{char}" if char in "\\`*_{}[]<>#|!~$&" else char for char in printable(text))
    return " ".join(escaped.split())


def inline_code(text: str) -> str:
    """Return `text` as inline code, or escaped if it has a backtick or a bar, which would end a table cell."""
    return escape(text) if "`" in text or "|" in text else f"`{' '.join(printable(text).split())}`"


def code_block(text: str, language: str = "text") -> str:
    """Return `text` as a code block with long lines wrapped. The fence is longer than any run of backticks in it."""
    wrapper = textwrap.TextWrapper(100, replace_whitespace=False, break_on_hyphens=False)
    lines = []
    for line in printable(text).split("\n"):
        lines += [line] if language == "sh" else wrapper.wrap(line) or [""]
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n" + "\n".join(lines) + f"\n{fence}"


def printable(text: str) -> str:
    """Return `text` without control characters, with which a model's answer could control a terminal."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def shorten(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def plain_number(value: float) -> str:
    """Format a number as in settings: 3e-5, 0.1, 512."""
    return f"{value:g}".replace("e-0", "e-")
