"""A Hydra sweeper for games, which checks every point first, plays the missing ones, and writes a leaderboard.

Hydra loads sweepers only from the package `hydra_plugins`. A callback would not suffice, because it cannot skip points
that do not compose or that are done.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from spin.config.hydra import hydra_error_line, quote, rename
from spin.config.load import load_config
from spin.config.schema import Config
from spin.runtime.errors import UserError, brief, user_message

log = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Job:
    """A point to be played: its overrides, and its configuration or the reason why it has none."""

    overrides: tuple[str, ...]
    swept: dict[str, str]
    folder: Path | None = None
    config: Config | None = None
    problem: str | None = None


def error_line(error: Exception) -> str:
    """Return a launcher's error as one line, with only the last line of a job's output, if the error contains it."""
    lines = [line for line in str(error).splitlines() if line.strip(" -")]
    text = " ".join(lines if len(lines) < 4 else [lines[0], "...", lines[-1]])
    return user_message(error) or brief(f"{type(error).__name__}: {text}", 600)


@contextlib.contextmanager
def waiting_for_all(launcher: object) -> Iterator[list[Exception]]:
    """Yield a list that collects the errors of jobs launched in the block; a launch there waits for all jobs.

    Outside the block, submitit's launchers raise the error of the first job that dies, while others still run or are
    queued.
    """
    errors: list[Exception] = []
    if "submitit" not in type(launcher).__module__:
        yield errors
        return
    import submitit

    wait = submitit.Job.results

    def results(job: Any) -> list:
        try:
            return wait(job)
        except Exception as error:
            errors.append(error)
            return [None]

    submitit.Job.results = results  # type: ignore
    try:
        yield errors
    finally:
        submitit.Job.results = wait  # type: ignore


class SpinSweeper(BasicSweeper):
    """A sweeper that plays the product of all comma-separated values. Failing points are reported, and others continue.

    Points that are done are not launched again. The process ends with status 1 if a point has no result.
    """

    def sweep(self, arguments: list[str]) -> None:
        assert self.config is not None and self.hydra_context is not None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # if a point failed, one process would continue without the others
            raise UserError("a sweep is started as one process: start torchrun for each of its points.")
        folder = Path(self.config.hydra.sweep.dir)
        # Fix one folder for all points, because its name contains `name`, which may differ between points.
        with open_dict(self.config):
            quoted = str(folder).replace("'", "\\'")
            self.config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
        jobs = self._jobs(arguments)
        if all(job.problem for job in jobs):
            raise UserError(jobs[0].problem or "")

        from spin.pipeline import points as sweep_points
        from spin.reporting.sweep_rows import RECORD, Point

        ready = [job for job in jobs if job.config and job.folder]
        for job in jobs:
            if job.problem:
                at = ", ".join(f"{key}={value}" for key, value in job.swept.items())
                print(f"the point {at} can't be played: {job.problem}", flush=True)
        if any(job.config.plan for job in ready if job.config):
            if unplanned := self._launch(ready):
                sys.exit(f"error: {len(unplanned)} of {len(jobs)} points can't be planned.")
            return
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        missing = [
            job for job in ready if job.config and job.folder and not sweep_points.is_done(job.folder, job.config)
        ]
        counts = f"{len(ready) - len(missing)} done before, {len(missing)} to play"
        if len(ready) < len(jobs):
            counts += f", {len(jobs) - len(ready)} that can't be played"
        print(f"{len(jobs)} points in {folder}: {counts}", flush=True)
        for job in missing:
            assert job.folder
            (job.folder / RECORD).unlink(missing_ok=True)  # from the last attempt
        died = self._launch(missing)
        points = [Point(job.swept, job.folder, job.problem or died.get(job.overrides)) for job in jobs]
        failed = self._report(folder, points, ready, bool(missing))
        if failed:
            sys.exit(f"error: {failed} of {len(jobs)} points have no result; {folder / 'sweep.md'} says why.")

    def _report(self, folder: Path, points: list, ready: Sequence[Job], is_new: bool) -> int:
        from spin.reporting import leaderboard
        from spin.runtime.tracking import Tracker

        config = ready[0].config
        assert config
        settings = config.tracking.model_dump(exclude={"policies"})
        tracker = Tracker(folder, name=f"{folder.name} leaderboard", config={}, **settings, group=folder.name)
        try:
            return leaderboard.write_leaderboard(folder, points, tracker, is_new)
        finally:
            tracker.close()

    def _jobs(self, arguments: list[str]) -> list[Job]:
        """Return all points, composed and checked, without importing large libraries."""
        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([quote(rename(word), True) for word in (*self._parse_config(), *arguments)])
        (points,) = self.split_arguments(overrides, None)
        values = [dict(word.split("=", 1) for word in point) for point in points]
        swept = [key for key in values[0] if len({point[key] for point in values}) > 1]
        jobs = {}
        for words, point in zip(points, values, strict=True):
            job = Job(tuple(words), {key.lstrip("+"): re.sub(r"\\(.)", r"\1", point[key]) for key in swept})
            jobs[job.overrides] = self._composed(job)
        return list(jobs.values())

    def _composed(self, job: Job) -> Job:
        assert self.config is not None and self.hydra_context is not None
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(job.overrides))
            folder = (Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir).absolute()
            config = load_config(composed)
            if config.publish.hub is not None:
                raise UserError("publish.hub goes with one game: play the best point alone, which reuses its stages.")
            return replace(job, folder=folder, config=config)
        except (HydraException, OmegaConfBaseException) as error:
            return replace(job, problem=hydra_error_line(error))
        except UserError as error:
            return replace(job, problem=str(error))

    def _launch(self, jobs: Sequence[Job]) -> dict[tuple[str, ...], str]:
        """Launch the jobs until each has a record of its end. Return the reasons for those that died without a record,
        or that can't be planned.

        A launcher may give up when the first process dies, although others are running. Jobs that were playing then are
        launched again one by one (each waits for its lock and continues from finished work), the others together.
        Points that a signal stopped are not launched again. Raises UserError if nothing can be launched.
        """
        from spin.reporting.sweep_rows import read_record

        def status(job: Job) -> str | None:
            return read_record(job.folder).get("status") if job.folder else None

        assert self.launcher is not None
        died: dict[tuple[str, ...], str] = {}
        size = self.max_batch_size or len(jobs) or 1
        waiting = [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]
        number = 0
        # Processes on a cluster start in this working directory, but do not have this program on their module path.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        while waiting:
            batch = waiting.pop(0)
            with waiting_for_all(self.launcher) as errors:
                try:
                    ended = self.launcher.launch([list(job.overrides) for job in batch], initial_job_idx=number)
                    reasons = [None if result is None else result.return_value for result in ended]
                except Exception as error:
                    errors.append(error)
            if not errors:
                died |= {job.overrides: why for job, why in zip(batch, reasons, strict=True) if why is not None}
                number += len(batch)
                continue
            reason = error_line(errors[0])
            if number == 0 and not any(map(status, batch)):
                raise UserError(f"no point can be launched: {reason}") from errors[0]
            number += len(batch)
            unfinished = [job for job in batch if status(job) not in ("done", "failed", "stopped")]
            if len(batch) == 1:
                died |= {job.overrides: reason for job in unfinished}
                continue
            if unfinished:
                log.warning("a point's process died, going on without it: %s", reason)
            waiting += [[job] for job in unfinished if status(job) == "playing"]
            fresh = [job for job in unfinished if status(job) is None]
            waiting += [fresh] if 0 < len(fresh) < len(batch) else [[job] for job in fresh]
        return died
