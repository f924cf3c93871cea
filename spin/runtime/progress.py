"""Progress bars, and durations as text."""

import math
import time
from contextlib import suppress

from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

LINE_EVERY = 10.0  # seconds between two progress lines where there is no terminal to draw a bar on


class Progress:
    """The progress of one stage, from `Tracker.progress`. Without a console nothing is shown."""

    def __init__(self, console: Console | None, title: str, total: int, unit: str):
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.done, self.fields = 0, dict[str, float]()
        self._started = self._shown = time.monotonic()
        self._skipped = 0
        self._bar: bars.Progress | None = None

    def advance(self, n: int = 1, **fields: float) -> None:
        """Count `n` more units; show the last values of `fields` (loss=..., margin=...)."""
        self.done += n
        self.fields |= fields
        if self._bar:
            self._bar.update(self._task, advance=n, shown=self._fields())
        elif time.monotonic() - self._shown >= LINE_EVERY:
            self._shown = time.monotonic()
            self._print(f"{self._state()}, {format_seconds(self._seconds_left())} left{self._fields()}")

    def skip(self, n: int) -> None:
        """Count `n` units that an earlier run has done: they do not count for the rate."""
        self.done += n
        self._skipped += n
        if self._bar:
            self._bar.update(self._task, completed=self.done)

    def __enter__(self) -> "Progress":
        self._started = self._shown = time.monotonic()
        if self.console is not None and self.console.is_interactive:
            fixed = Column(no_wrap=True)
            bar = bars.Progress(
                bars.TextColumn("{task.description}", markup=False, table_column=fixed),
                bars.BarColumn(bar_width=10, table_column=fixed),
                bars.TextColumn("{task.completed:,}/{task.total:,}", table_column=fixed),
                _Rate(table_column=fixed),
                _Fields(),
                console=self.console,
                transient=True,  # `__exit__` prints the line that stays, as in a log file
            )
            self._task = bar.add_task(self.title, total=self.total, unit=self.unit, shown="")
            bar.start()
            self._bar = bar
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._bar:
            with suppress(OSError):  # the terminal is gone
                self._bar.stop()
        if kind is not None:
            self._print(f"{self._state()}: stopped")
        else:
            took, rate = format_seconds(time.monotonic() - self._started), self._rate()
            self._print(f"{self.title}: {self.done:,} {self.unit} in {took}{rate and f' ({rate})'}{self._fields()}")

    def _state(self) -> str:
        rate = self._rate()
        return f"{self.title}: {self.done:,}/{self.total:,} {self.unit}{rate and f', {rate}'}"

    def _rate(self) -> str:
        done, seconds = self.done - self._skipped, time.monotonic() - self._started
        return f"{format_rate(done / seconds)} {self.unit}/s" if done and seconds else ""

    def _seconds_left(self) -> float:
        done = self.done - self._skipped
        return (time.monotonic() - self._started) / done * max(self.total - self.done, 0) if done else math.nan

    def _fields(self) -> str:
        return "".join(f", {key} {format_value(value)}" for key, value in self.fields.items())

    def _print(self, text: str) -> None:
        if self.console is not None:
            self.console.print(Text(text), soft_wrap=True)


class _Rate(bars.ProgressColumn):
    """Units per second and time left, over the last half minute: a slow first step does not count for long."""

    def render(self, task: bars.Task) -> Text:
        if not task.speed:
            return Text("")
        left = task.time_remaining or 0
        return Text(f"{format_rate(task.speed)} {task.fields['unit']}/s, {format_seconds(left)} left")


class _Fields(bars.ProgressColumn):
    """The fields, cut at the terminal's width: a bar that wraps flickers."""

    def render(self, task: bars.Task) -> Text:
        return Text(task.fields["shown"].removeprefix(", "), style="dim", no_wrap=True, overflow="ellipsis")


def format_seconds(s: float) -> str:
    """Format a duration: `0.4 s`, `47 s`, `3 min 12 s`, `2 h 05 min`; `?` if it is not finite."""
    if not math.isfinite(s):
        return "?"
    if s < 9.95:
        return f"{s:.1f}".removesuffix(".0") + " s"
    seconds = round(s)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(s / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_rate(per_second: float) -> str:
    if per_second >= 1:
        return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"
    return f"{per_second:.2g}"


def format_value(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"
