"""Progress bars, and durations as text."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

LINE_EVERY = 10.0  # seconds between progress lines if there is no terminal for a bar
Item = TypeVar("Item")


def with_progress_lines(items: Iterable[Item], say: Callable[[str], None], text: str) -> Iterator[Item]:
    """Yield the items. Every LINE_EVERY seconds print `text` with the number of items so far."""
    shown = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown >= LINE_EVERY:
            shown = time.monotonic()
            say(text.format(number))


class Progress:
    """The progress of one stage, created by `Tracker.progress`. Without a console nothing is shown.

    `add_for_all`, if set, adds to a count shared by all ranks and returns it, so that the work of all ranks is shown.
    """

    def __init__(self, console: Console | None, title: str, total: int, unit: str):
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.done, self.fields = 0, dict[str, float]()
        self._started = self._shown = time.monotonic()
        self._skipped = self._counted = 0
        self.add_for_all: Callable[[int], int] | None = None
        self._bar: bars.Progress | None = None

    def advance(self, n: int = 1, **fields: float) -> None:
        """Count `n` more units and show the latest values of `fields` (loss=..., margin=...)."""
        self.fields |= fields
        self._show(self._count_of_all_ranks(n) if n else 0)

    def _count_of_all_ranks(self, n: int) -> int:
        """Add `n` to the count of all ranks (a round trip). Return its growth since this rank's last call."""
        if self.add_for_all is None:
            return n
        before, self._counted = self._counted, self.add_for_all(n)
        return self._counted - before

    def skip(self, n: int) -> None:
        """Count `n` units of an earlier run, on every rank. They do not count for the rate."""
        self._skipped += n
        self._show(n)

    def _show(self, n: int) -> None:
        self.done += n
        if self._bar:
            self._bar.update(self._task, completed=self.done, state=self._state())
        elif time.monotonic() - self._shown >= LINE_EVERY:
            self._shown = time.monotonic()
            self._print(self._state())

    def __enter__(self) -> "Progress":
        self._started = self._shown = time.monotonic()
        if self.console is not None and self.console.is_interactive:
            fixed = Column(no_wrap=True)
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}:", markup=False, table_column=fixed),
                bars.BarColumn(bar_width=10, table_column=fixed),
                # Cut at the terminal's width, because a wrapped bar flickers.
                bars.TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self.console,
                transient=True,  # `__exit__` prints the line that stays, as in a log file
            )
            self._task = self._bar.add_task(self.title, total=self.total, state=self._state())
            self._bar.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._bar:
            self._bar.stop()
        if kind is not None:
            self._print(f"{self._state()}: stopped")
        else:
            self._show(self._count_of_all_ranks(0))
            took = format_seconds(time.monotonic() - self._started)
            self._print(f"{self.done:,} {self.unit} in {took}{self._rate()}{self._fields()}")

    def _state(self) -> str:
        done, left = self.done - self._skipped, ""
        if done and self.done < self.total:
            seconds = (time.monotonic() - self._started) / done * (self.total - self.done)
            left = f", {format_seconds(seconds)} left"
        return f"{self.done:,}/{self.total:,} {self.unit}{self._rate()}{left}{self._fields()}"

    def _rate(self) -> str:
        done, seconds = self.done - self._skipped, time.monotonic() - self._started
        return f", {format_number(done / seconds)} {self.unit}/s" if done and seconds else ""

    def _fields(self) -> str:
        return "".join(f", {key} {format_number(value)}" for key, value in self.fields.items())

    def _print(self, text: str) -> None:
        if self.console is not None:
            self.console.print(Text(f"{self.title}: {text}"), soft_wrap=True)


def format_number(value: float) -> str:
    """Format with three significant digits, or as an integer from 100 on: `0.512`, `4.00`, `1,234`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def format_seconds(s: float) -> str:
    """Format a duration: `0.4 s`, `47 s`, `3 min 12 s`, `2 h 05 min`."""
    if s < 9.95:
        return f"{s:.1f}".removesuffix(".0") + " s"
    if s < 59.5:
        return f"{s:.0f} s"
    if s < 3599.5:
        return f"{round(s) // 60} min {round(s) % 60:02d} s"
    minutes = round(s / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
