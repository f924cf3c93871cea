"""The resolvers that conf/ uses, composition from Python, and one-line versions of Hydra's errors."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin.config.load import NO_RESULT, RENAMED, load_config, note_renamed
from spin.config.schema import CONF, FILE_TYPES, Config, did_you_mean, settings
from spin.runtime.errors import UserError

NAMED = ("experiment", "model", "data", "model.path", "data.path")  # already part of the name of a run's folder
PATHS = re.compile(r"[+]*([\w.]+\.(path|dir)|evaluation\.(embedder|against|questions|judge))")


def slug(text: str) -> str:
    """Return a folder name for `text`: fewer than 100 characters, and distinct for distinct texts."""
    safe = re.sub(r"[^\w.,=+-]+", "_", text)
    if safe == text and len(safe) < 100:
        return safe
    return f"{safe[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def basename(path: str | None, default: str) -> str:
    """Return the name of a user's model or data set: the last part of its path, or `default` without a path."""
    if not path:
        return default
    file = Path(os.path.abspath(path))  # "." has no name
    return re.sub(r"[^\w.-]+", "_", file.stem if file.suffix.lower() in FILE_TYPES else file.name) or default


def run_folder(name: str, stage: str, overrides: Sequence[str]) -> str:
    """Return the name of a run's folder in outputs/: `name`, and other overrides that affect its result, sorted by key.

    It contains no "=", which Hydra would require to be quoted in `model.path=outputs/<folder>/iter1/policy`.
    """
    words = {}
    for word in overrides:
        key, _, value = word.partition("=")
        key = key.lstrip("+")
        is_named = key in NAMED and re.search(rf"(^|-){re.escape(value)}(-|$)", name)
        if not is_named and not NO_RESULT.fullmatch(key):
            words[key] = word
    measured = "-evaluation" if stage == "evaluate" else ""
    return slug("-".join([name + measured, *(words[key].lstrip("+").replace("=", "-") for key in sorted(words))]))


for resolver in (slug, basename, run_folder):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def quote(word: str, is_sweep: bool = False) -> str:
    """Return the override `word`, with its value in Hydra's quotes if Hydra cannot parse it or would parse a path
    as another value, because users quote for the shell only. In a sweep, commas separate values."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w.@/]+", key) or value[:1] + value[-1:] in ("''", '""'):
        return word
    is_file = PATHS.fullmatch(key) is not None and value != "null" and os.path.exists(os.path.expanduser(value))
    try:
        parsed = OverridesParser.create().parse_override(word)
        if not is_file or parsed.value() == value:
            return word
    except HydraException:
        if value.startswith("[") and not is_file:
            return word  # a list: Hydra reports the error in it
        if is_sweep and not is_file and "," in value:
            return f"{key}=" + ",".join(quote(f"x={part}")[2:] for part in value.split(","))
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def rename(word: str) -> str:
    """Return the override `word` with the new name of its key, and print a note if the name was old.

    `data.template_options` gets Hydra's prefix "++", because its keys depend on the template. ~ is expanded in the paths
    of folders that Hydra makes.
    """
    if folder := re.match(r"([+]*hydra\.(?:run|sweep)\.dir=['\"]?)(~.*)", word):
        return folder[1] + os.path.expanduser(folder[2])
    if word.startswith("data.template_options"):
        return f"++{word}"
    for old, new in RENAMED.items():
        if re.match(rf"[+~]*{re.escape(old)}(=|$)", word):
            note_renamed(old, new)
            return word.replace(old, new, 1)
    return word


def compose(*overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """Return the configuration that `python run.py *overrides` composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", [quote(rename(word)) for word in overrides], return_hydra_config)


def load(*overrides: str) -> Config:
    """Return the checked configuration of `python run.py *overrides`."""
    return load_config(compose(*overrides))


def load_run(overrides: Sequence[str]) -> tuple[Config, Path]:
    """Return the checked configuration of `python run.py *overrides` and the run's folder. Raises UserError."""
    try:
        composed = compose(*overrides, return_hydra_config=True)
        if composed.hydra.mode == RunMode.MULTIRUN:
            raise UserError("spin.play plays one game: use run.py for a sweep.")
        return load_config(composed), Path(composed.hydra.run.dir)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(hydra_error_line(error)) from error


# --- settings given in Python -----------------------------------------------------------------------------------------

PATH_KEYS = {"model": ["model.path"], "data": ["data=local", "data.path"]}  # what a path as model= or data= sets
PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[A-Za-z_/.][A-Za-z0-9_/.-]*", re.IGNORECASE)  # needs no quotes


def to_words(settings: Mapping[str, Any]) -> list[str]:
    """Convert settings to overrides: {"loss": "hinge"}, {"loss": {"beta": 0.1}} or {"loss.beta": 0.1}.

    A model or data set that has no file in conf/ is taken as a path or a hub name.
    """
    words: list[str] = []
    for key, value in settings.items():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, Mapping) else {key: value}
        if key in PATH_KEYS and value is None:
            raise UserError(f"{key}=None: give a choice in conf/{key}/, a path or a hub name, or leave it out.")
        if key in PATH_KEYS and key in parts and not (CONF / key / f"{value}.yaml").is_file():
            *choices, path = PATH_KEYS[key]
            words, parts = [*words, *choices], {path: str(value)}
        words += [f"{name}={to_text(part)}" for name, part in parts.items()]
    return words


def to_text(value: Any) -> str:
    """Format a value in Hydra's grammar: 0.1, null, [1,2], {a:1}, word, 'quoted text'."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{to_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(to_text, value))}]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value).replace("e-0", "e-")  # 5e-7, as users type it: part of the folder's name
    return str(value) if PLAIN.fullmatch(str(value)) else QuotedString(str(value), Quote.single).with_quotes()


# --- errors -----------------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "joblib": "hydra-joblib-launcher==1.2.0",
    "submitit_local": "hydra-submitit-launcher==1.2.0",
    "submitit_slurm": "hydra-submitit-launcher==1.2.0",
}


def hydra_error_line(error: Exception) -> str:
    """Return one line for an error of Hydra that says what is wrong and what to do."""
    cause: BaseException | None = error
    while cause is not None and not str(cause):  # Hydra wraps some errors in one without a message
        cause = cause.__cause__
    text = str(cause or error)
    if (match := re.search(r"Could not (?:find|load) 'hydra/launcher/(\w+)'", text)) and match[1] in LAUNCHERS:
        return f"hydra/launcher={match[1]} needs a plugin that is not installed: pip install {LAUNCHERS[match[1]]}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: there is no such setting.{did_you_mean(match[1], settings())}"
    if match := re.search(r"Could not find '(.+)/([^/']+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text, re.S):
        group, option, options = match[1], match[2], [name for name in match[3].split() if name != "base"]
        hint = did_you_mean(option, options)
        return f"{group}={option}: there is no such choice. There are: {', '.join(options)}.{hint}"
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'\n", text):
        as_list, as_text = (shlex.quote(f"{match[1]}={form.format(match[2])}") for form in ("[{}]", "'{}'"))
        return f"{match[1]}={match[2]}: for a list type {as_list}, for one text {as_text}, and for a sweep add -m."
    return " ".join(text.split())
