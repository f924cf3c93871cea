"""The report of a running game, rewritten before each stage is built and when the game stops."""

import contextlib
import functools
import html
import time
from collections.abc import Iterator, Sequence

from spin.pipeline.record import IterationRecord
from spin.pipeline.stage import Player, Stage
from spin.pipeline.summary import sample_sets, summarize
from spin.reporting.report import write_report
from spin.runtime.errors import user_message
from spin.runtime.files import write_text
from spin.runtime.signals import Interrupted

STATUS = "Running."  # a placeholder in the page


@contextlib.contextmanager
def live_report(
    player: Player, records: Sequence[IterationRecord], stages: Sequence[Stage], command: str
) -> Iterator[None]:
    """Keep report.html up to date while the block plays stages. `finish` writes the final report."""
    report = player.run.folder / "report.html"

    @functools.lru_cache(maxsize=1)
    def draw(count: int) -> str:  # slow, and between two results only the status changes
        game, sets = summarize(player, records[:count], None, command), sample_sets(player, records[:count])
        write_report(player.run.folder, game, sets, STATUS)
        return report.read_text(encoding="utf-8")

    def write(title: str, running: bool = False) -> None:
        count = sum(all(stage in player.results for stage in record.stages) for record in records)
        missing = [f"{stage.name} of {stage.subject}" for stage in stages if stage not in player.results]
        later = ", ".join(missing[running:]) or "nothing"
        remaining = "Remaining after this stage" if running else "Remaining"
        status = f"{title}, {time.strftime('%Y-%m-%d %H:%M:%S')}. {remaining}: {later}."
        with contextlib.suppress(OSError):  # if the disk is full, the stage reports it
            write_text(report, draw(count).replace(STATUS, html.escape(status), 1))

    player.on_build = lambda title: write(f"Running: {title}", running=True)
    try:
        yield
    except BaseException as error:
        if player.run.ranks.is_main_process:
            signal = error.signal.name if isinstance(error, Interrupted) else None
            with contextlib.suppress(Exception):
                reason = signal or user_message(error) or type(error).__name__
                write(f"Stopped: {reason}; run the same command to continue")
        raise
