"""Play the game: `python run.py model=zephyr iter=2 loss.beta=0.1`. Hydra entry: compose, validate, play."""

import contextlib
import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin import config as schema
from spin import interrupt
from spin.errors import explain

# What the user set HYDRA_FULL_ERROR to, before we set it for our own purpose.
SHOW_TRACEBACK = "SPIN_TRACEBACK"


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    interrupt.install()  # once more, for launchers that call this in a process of their own
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    try:
        config = schema.load(composed)  # before the heavy imports: a typo is answered at once
        if config.plan:
            with interrupt.deferred():
                from spin.game import show_plan

            show_plan(config, folder)
            return
        with interrupt.deferred():  # some libraries swallow what is raised while they are imported
            from spin import sweep
            from spin.game import play

        command = shlex.join(["python", "run.py", *settings.overrides.task])
        start = partial(play, config, folder, command, OmegaConf.to_yaml(composed, resolve=True))
        if settings.mode == RunMode.MULTIRUN:
            sweep.attempt(config, folder, partial(start, group=Path(settings.sweep.dir).name))
        else:
            start()
    except interrupt.Interrupted as stop:
        interrupt.hand_on(stop.signal)
        raise
    except Exception as error:  # here, for Hydra would print lines of its own before it raises
        line = explain(error)
        if line is None or os.environ.get(SHOW_TRACEBACK) == "1":
            raise
        sys.exit(f"error: {line}")


if __name__ == "__main__":
    # Hydra would print its own errors over several lines, and a traceback for ours: have it raise, and print one line.
    os.environ[SHOW_TRACEBACK] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    interrupt.install()
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # argparse wants it first
    try:
        main()
    except Exception as error:
        is_hydras = isinstance(error, (HydraException, OmegaConfBaseException))
        line = schema.one_line(error) if is_hydras else explain(error)
        if line is None or os.environ[SHOW_TRACEBACK] == "1":
            raise
        sys.exit(f"error: {line}")
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"stopped by {number.name}: what is done is kept, run the same command to go on.", file=sys.stderr)
        sys.exit(128 + number)
