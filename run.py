"""Play the game: `python run.py model=zephyr iter=2 loss.beta=0.1`. Hydra entry: compose, validate, play."""

import contextlib
import dataclasses
import hashlib
import os
import re
import shlex
import signal
import sys
from difflib import get_close_matches
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
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
    try:
        config = schema.load(composed)  # before the heavy imports: a typo is answered at once
        folder = Path(HydraConfig.get().runtime.output_dir)
        if config.plan:
            with interrupt.deferred():
                from spin.game import show_plan

            show_plan(config, folder)
            return
        with interrupt.deferred():  # some libraries swallow what is raised while they are imported
            from spin.game import play

        command = shlex.join(["python", "run.py", *HydraConfig.get().overrides.task])
        play(config, folder, command, OmegaConf.to_yaml(composed, resolve=True))
    except Exception as error:  # here, for Hydra would print lines of its own before it raises
        line = explain(error)
        if line is None or os.environ[SHOW_TRACEBACK] == "1":
            raise
        sys.exit(f"error: {line}")


def slug(text: str) -> str:
    """`text` as the name of one folder: short, and different for different texts."""
    safe = re.sub(r"[^\w.,=+-]+", "_", text)
    return (
        safe if safe == text and len(safe) <= 120 else f"{safe[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def basename(path: str | None, default: str) -> str:
    """What to call a model or data set of the user's own: the last part of its path, or `default` without one."""
    return (
        re.sub(r"[^\w.-]+", "_", Path(path).stem if Path(path).suffix in DATA_FILES else Path(path).name)
        if path
        else default
    )


DATA_FILES = (".jsonl", ".json", ".parquet")
OmegaConf.register_new_resolver("slug", slug, replace=True)
OmegaConf.register_new_resolver("basename", basename, replace=True)
OmegaConf.register_new_resolver("measured", lambda stage: "-evaluation" if stage == "evaluate" else "", replace=True)


def one_line(error: Exception) -> str:
    """Hydra's errors, in one line: what is wrong and what to do."""
    cause: BaseException | None = error
    while cause is not None and not str(cause):  # Hydra wraps some errors in an empty one
        cause = cause.__cause__
    text = str(cause or error)
    if found := re.search(r"Could not override '(?P<key>[^']+)'", text):
        key, settings = found["key"], _settings()
        if key in settings:  # rmsprop has no betas
            group = key.split(".")[0]
            return f"{key}: the chosen {group} has no such setting; see conf/{group}/ for those that have."
        return f"{key}: there is no such setting.{_did_you_mean(key, settings)}"
    if found := re.search(
        r"Could not find '(?P<group>.+)/(?P<choice>[^/']+)'\s+Available options in '[^']+':(?P<options>(?:\n\t\S+)+)",
        text,
        re.S,
    ):
        options = found["options"].split()
        hint = _did_you_mean(found["choice"], options)
        return f"{found['group']}={found['choice']}: there is no such choice. There are: {', '.join(options)}.{hint}"
    hint = " Quote a value that has special signs in it: 'data.template=\"### {prompt}\"'." if "{" in text else ""
    return " ".join(text.split()) + hint


def _did_you_mean(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]}?" if near else " `python run.py --help` lists the settings."


def _settings() -> list[str]:
    def keys(node, prefix=""):
        for key, value in node.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

    defaults = dataclasses.asdict(schema.Config())
    return [*keys(defaults), *defaults]


if __name__ == "__main__":
    # Hydra would print its own errors over several lines, and a traceback for ours: have it raise, and print one line.
    os.environ[SHOW_TRACEBACK] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    interrupt.install()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ[SHOW_TRACEBACK] == "1":
            raise
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"stopped by {number.name}: what is done is kept, run the same command to go on.", file=sys.stderr)
        sys.exit(128 + number)
