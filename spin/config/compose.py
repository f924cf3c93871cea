"""From settings given in Python to a checked configuration, as Hydra composes it on the command line."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from spin.config.hydra import compose, hydra_error_line
from spin.config.load import load_config
from spin.config.schema import CONF, Config
from spin.runtime.errors import UserError

PATHS = {"model": ["model.path"], "data": ["data=local", "data.path"]}  # what a path given as model= or data= sets
PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[A-Za-z_/.][A-Za-z0-9_/.-]*", re.IGNORECASE)  # needs no quotes


def to_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of the command line: {"loss": "hinge"}, {"loss": {"beta": 0.1}} or {"loss.beta": 0.1}.

    A model or data set that conf/ does not name is a path or a hub name.
    """
    words: list[str] = []
    for key, value in settings.items():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, Mapping) else {key: value}
        if key in PATHS and key in parts and not (CONF / key / f"{value}.yaml").is_file():
            *choices, path = PATHS[key]
            words, parts = [*words, *choices], {path: str(value)}
        words += [f"{name}={to_text(part)}" for name, part in parts.items()]
    return words


def to_text(value: Any) -> str:
    """A value in Hydra's grammar: 0.1, null, [1,2], {a:1}, word, 'quoted text'."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{to_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(to_text, value))}]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value).replace("e-0", "e-")
    return str(value) if PLAIN.fullmatch(str(value)) else QuotedString(str(value), Quote.single).with_quotes()


def compose_run(words: list[str]) -> tuple[Config, Path, str]:
    """The checked configuration of `python run.py *words`, its folder, and all settings as YAML. Raises UserError."""
    try:
        composed = compose(*words, return_hydra_config=True)
        folder = Path(composed.hydra.run.dir)
        with open_dict(composed):
            del composed["hydra"]
        config = load_config(composed)
        return config, folder, OmegaConf.to_yaml(OmegaConf.create(config.shown))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(hydra_error_line(error)) from error
