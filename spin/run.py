"""The command line: `python run.py`, `python -m spin` or `spin`. Hydra composes the settings of each game."""

import contextlib
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from spin.config.hydra import hydra_error_line, quote, rename
from spin.config.load import load_config
from spin.config.schema import CONF
from spin.runtime import signals
from spin.runtime.errors import user_message
from spin.runtime.output import open_streams

SHOW_TRACEBACK = "SPIN_TRACEBACK"  # the user's value of HYDRA_FULL_ERROR, which this program overwrites
RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started
WAIT_FOR_RANK_0 = 30  # seconds
NEW_FOLDERS: list[str] = []  # created by this process


def joined_group() -> Any:
    """Return the process group that this process has joined, or None if it has joined none or is alone."""
    module = sys.modules.get("spin.runtime.process_group")  # imported only with the large libraries
    return module.current_group() if module is not None and module.current_group().size > 1 else None


def end(status: int, line: str | None = None) -> NoReturn:
    """Exit after printing `line`, if given, to stderr; in a group without cleanup, because others may be gone."""
    if line is not None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(line, file=sys.stderr, flush=True)
    if joined_group():
        os._exit(status)
    sys.exit(status)


def fail(error: Exception) -> NoReturn:
    """Exit with status 1 and one line for an error that the user can fix; raise any other error."""
    remove_empty_folders()
    group = joined_group()
    if group and not group.is_first_to_fail():
        end(1)
    if not group and RANK > 0:
        # Rank 0 probably fails in the same way. If this process ended first, torchrun would stop rank 0 before it has
        # printed its line. torchrun ends this wait with a signal.
        try:
            time.sleep(WAIT_FOR_RANK_0)
        except KeyboardInterrupt:
            end(1)
    is_hydra_error = isinstance(error, HydraException | OmegaConfBaseException)
    line = hydra_error_line(error) if is_hydra_error else user_message(error)
    if line is None or os.environ.get(SHOW_TRACEBACK) == "1":
        raise error
    end(1, f"error: {line}")


def end_stopped(stop: KeyboardInterrupt) -> NoReturn:
    """Exit with status 128 + the signal's number. Only rank 0 prints a line, because all ranks stop together."""
    number = getattr(stop, "signal", signal.SIGINT)
    line = f"stopped by {number.name}: finished work is kept, run the same command to continue."
    end(128 + number, line if RANK == 0 else None)


def note_new_folder(event: str, arguments: tuple) -> None:
    """Record folders that this process creates (audit hook): Hydra creates the run's folder and its parents."""
    if event == "os.mkdir" and isinstance(arguments[0], (str, Path)) and not os.path.lexists(arguments[0]):
        NEW_FOLDERS.append(os.path.abspath(arguments[0]))


def remove_empty_folders() -> None:
    """Remove the folders that this process has created and that are still empty."""
    while NEW_FOLDERS:
        with contextlib.suppress(OSError):
            os.rmdir(NEW_FOLDERS.pop())


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def play_composed(composed: DictConfig) -> str | None:
    """Play one game, or one point of a sweep, with the settings that Hydra has composed.

    Return the reason if a point can't be planned; then the others are planned, too.
    """
    signals.install_handlers()  # again, because launchers may call this in another process
    open_streams()
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    try:
        config = load_config(composed)  # before the slow imports, so that typos are reported immediately
        with signals.deferred():  # some libraries suppress exceptions during their import
            from spin.game import play, show_plan
            from spin.pipeline import points

        if config.plan:
            show_plan(config, folder)
            remove_empty_folders()
            return None
        programs = {"spin": ["spin"], "__main__.py": ["python", "-m", "spin"]}
        program = programs.get(Path(sys.argv[0]).name, ["python", "run.py"])
        command = shlex.join([*program, *settings.overrides.task])
        start = partial(play, config, folder, command)
        if settings.mode == RunMode.MULTIRUN:
            points.play_point(config, folder, partial(start, group=Path(settings.sweep.dir).name))
        else:
            start()
    except signals.Interrupted as stop:
        signals.call_previous_handler(stop.signal)
        if "SUBMITIT_EXECUTOR" in os.environ:  # no caller would catch the exception
            end_stopped(stop)
        raise
    except Exception as error:  # caught here, because Hydra prints its own lines before raising
        line = user_message(error)
        if not composed.plan or settings.mode != RunMode.MULTIRUN or line is None:
            fail(error)
        print(f"error: {line}", flush=True)
        remove_empty_folders()
        return line
    return None


def main() -> None:
    """Play the game or sweep in `sys.argv`, or run the command `store` on a store; the process ends with the status."""
    open_streams()
    if sys.argv[1:2] == ["store"]:
        from spin.runtime.store_cli import main as run_store_command

        return run_store_command(sys.argv[2:])
    sys.addaudithook(note_new_folder)
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend works only in the notebook
    # Hydra prints its errors over several lines, and ours with a traceback: make it raise, and print one line here.
    os.environ[SHOW_TRACEBACK] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    signals.install_handlers()
    if RANK > 0:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
    is_sweep = not {"-m", "--multirun"}.isdisjoint(sys.argv)
    words = [quote(rename(word), is_sweep) for word in sys.argv[1:]]
    sys.argv[1:] = sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # argparse requires -m first
    try:
        play_composed()
    except Exception as error:
        fail(error)
    except KeyboardInterrupt as stop:
        end_stopped(stop)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from spin.runtime.process_group import exit_process

        exit_process()
