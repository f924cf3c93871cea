"""Texts of users and models in Markdown and on a terminal, shown as they are and without harm."""

import textwrap


def escape(text: str) -> str:
    """`text` as Markdown shows it literally, also inside a table cell."""
    escaped = "".join(f"\\{char}" if char in "\\`*_{}[]<>#|!~$&" else char for char in printable(text))
    return " ".join(escaped.split())


def inline_code(text: str) -> str:
    """`text` as inline code; escaped instead where it has a backtick, or a bar, which would end a table cell."""
    return escape(text) if "`" in text or "|" in text else f"`{' '.join(printable(text).split())}`"


def code_block(text: str, language: str = "text") -> str:
    """`text` as a code block, long lines wrapped; the fence is longer than any run of backticks within."""
    wrapper = textwrap.TextWrapper(100, replace_whitespace=False, break_on_hyphens=False)
    lines = []
    for line in printable(text).split("\n"):
        lines += [line] if language == "sh" else wrapper.wrap(line) or [""]
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n" + "\n".join(lines) + f"\n{fence}"


def printable(text: str) -> str:
    """`text` without control characters: a model's answer must not be able to control a terminal."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def shorten(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def plain_number(value: float) -> str:
    """3e-5, 0.1, 512: as settings are written."""
    return f"{value:g}".replace("e-0", "e-")
