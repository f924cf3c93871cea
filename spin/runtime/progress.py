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
    """One stage's progress; made by `Tracker.progress`. Without a console it does nothing."""

    def __init__(self, console: Console | None, title: str, total: int, unit: str):
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.done, self.fields = 0, dict[str, float]()
        self._started = self._shown = time.monotonic()
        self._skipped = 0
        self._bar: bars.Progress | None = None

    def advance(self, n: int = 1, **fields: float) -> None:
        """`n` more units are done; `fields` (loss=..., margin=...) are shown with their last values."""
        self.done += n
        if self.console is None:
            return
        self.fields |= fields
        if self._bar:
            self._bar.update(self._task, advance=n, shown=self._fields())
        elif time.monotonic() - self._shown >= LINE_EVERY:
            self._shown = time.monotonic()
            self._print(f"{self._state()}, {format_seconds(self._seconds_left())} left{self._fields()}")

    def skip(self, n: int) -> None:
        """`n` units were done by an earlier try: they count as done, but not for the rate."""
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
                transient=True,  # the line that stays is the one that `__exit__` prints, the same as in a log file
            )
            self._task = bar.add_task(self.title, total=self.total, unit=self.unit, shown="")
            bar.start()
            self._bar = bar
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._bar:
            with suppress(OSError):  # the terminal is gone
                self._bar.stop()
        if self.console is None:
            return
        if kind is not None:
            self._print(f"{self._state()}: stopped")
        else:
            seconds = time.monotonic() - self._started
            rate = f" ({self._rate(seconds)})" if self.done > self._skipped and seconds else ""
            self._print(f"{self.title}: {self.done:,} {self.unit} in {format_seconds(seconds)}{rate}{self._fields()}")

    def _state(self) -> str:
        seconds = time.monotonic() - self._started
        rate = f", {self._rate(seconds)}" if self.done > self._skipped and seconds else ""
        return f"{self.title}: {self.done:,}/{self.total:,} {self.unit}{rate}"

    def _rate(self, seconds: float) -> str:
        return f"{format_rate((self.done - self._skipped) / seconds)} {self.unit}/s"

    def _seconds_left(self) -> float:
        done = self.done - self._skipped
        return (time.monotonic() - self._started) / done * max(self.total - self.done, 0) if done else math.nan

    def _fields(self) -> str:
        return "".join(f", {key} {format_value(value)}" for key, value in self.fields.items())

    def _print(self, text: str) -> None:
        assert self.console is not None
        self.console.print(Text(text), soft_wrap=True)


class _Rate(bars.ProgressColumn):
    """Units per second and time left, over the last half minute: the first, slow step does not weigh on."""

    def render(self, task: bars.Task) -> Text:
        if not task.speed:
            return Text("")
        left = task.time_remaining or 0
        return Text(f"{format_rate(task.speed)} {task.fields['unit']}/s, {format_seconds(left)} left")


class _Fields(bars.ProgressColumn):
    """The free fields, cut where the terminal ends: a bar that wraps to a second line flickers."""

    def render(self, task: bars.Task) -> Text:
        return Text(task.fields["shown"].removeprefix(", "), style="dim", no_wrap=True, overflow="ellipsis")


def format_seconds(s: float) -> str:
    """A duration for a person: `0.4 s`, `47 s`, `3 min 12 s`, `2 h 05 min`; `?` where it is not known."""
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
    return (
        f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2g}"
    )


def format_value(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"
