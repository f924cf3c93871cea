"""Play the game: `python run.py model=zephyr iter=2 loss.beta=0.1`. Hydra entry: compose, validate, play."""

import contextlib
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin.config import schema
from spin.config.hydra import hydra_error_line
from spin.runtime import signals as interrupt
from spin.runtime.errors import user_message

# What the user set HYDRA_FULL_ERROR to, before we set it for our own purpose.
SHOW_TRACEBACK = "SPIN_TRACEBACK"
RANK = int(os.environ.get("RANK", 0))  # of the processes that torchrun started
PATIENCE = 30  # seconds that the others give the first of them to say what is wrong


def has_joined() -> bool:
    """Whether this process has met the others of its game."""
    ranks = sys.modules.get("spin.ranks")  # imported with the heavy parts
    return ranks is not None and ranks.joined().size > 1


def is_first_to_fail() -> bool:
    """One process of a game says what went wrong: the first to fail, or the first by rank where they have not met yet."""
    return sys.modules["spin.ranks"].joined().is_first_to_fail() if has_joined() else RANK == 0


def await_the_first() -> None:
    """Most likely the first process is about to fail in the same way, and torchrun would end it once we are gone, before
    it has said why. Ends this process as soon as torchrun asks for it; returns where the first has not failed."""
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        end(1)


def end(status: int, line: str | None = None) -> NoReturn:
    """End this process with one line, or silently; at once where it has joined others, which may be gone."""
    if line is not None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(line, file=sys.stderr, flush=True)
    if has_joined():
        os._exit(status)
    sys.exit(status)


def fail(error: Exception, line: str | None) -> NoReturn:
    """End with status 1 and one line for what a user can put right, `line`; raise `error` where there is none."""
    if not is_first_to_fail():
        if has_joined():
            end(1)
        await_the_first()
    if line is None or os.environ.get(SHOW_TRACEBACK) == "1":
        raise error
    end(1, f"error: {line}")


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    interrupt.install_handlers()  # once more, for launchers that call this in a process of their own
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    try:
        config = schema.load_config(composed)  # before the heavy imports: a typo is answered at once
        if config.plan:
            with interrupt.deferred():
                from spin.game import show_plan

            show_plan(config, folder)
            return
        with interrupt.deferred():  # some libraries swallow what is raised while they are imported
            from spin.game import play
            from spin.pipeline import points as sweep

        command = shlex.join(["python", "run.py", *settings.overrides.task])
        start = partial(play, config, folder, command, OmegaConf.to_yaml(composed, resolve=True))
        if settings.mode == RunMode.MULTIRUN:
            sweep.play_point(config, folder, partial(start, group=Path(settings.sweep.dir).name))
        else:
            start()
    except interrupt.Interrupted as stop:
        interrupt.call_previous_handler(stop.signal)
        raise
    except Exception as error:  # here, for Hydra would print lines of its own before it raises
        fail(error, user_message(error))


if __name__ == "__main__":
    # Hydra would print its own errors over several lines, and a traceback for ours: have it raise, and print one line.
    os.environ[SHOW_TRACEBACK] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    interrupt.install_handlers()
    if RANK > 0:  # one process speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # argparse wants it first
    try:
        main()
    except Exception as error:
        is_hydras = isinstance(error, (HydraException, OmegaConfBaseException))
        fail(error, hydra_error_line(error) if is_hydras else user_message(error))
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)
        line = f"stopped by {number.name}: what is done is kept, run the same command to go on."
        end(128 + number, line if is_first_to_fail() else None)
