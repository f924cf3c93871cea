"""The resolvers that conf/ uses, composition from Python, and Hydra's errors in one line."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from spin.config.load import RENAMED, load_config, note_renamed
from spin.config.schema import CONF, Config, did_you_mean, settings

DATA_FILES = (".jsonl", ".json", ".parquet")
# Settings that change no result, and those that a run's folder is named after already: they are not part of its name.
NO_RESULT = re.compile(
    r"name|iter|plan|stage|store\.path|cache\.path|(tracking|checkpoint|publish|hydra)\b.*|engine\.(device|gradient_checkpointing"
    r"|zero_stage|offload_optimizer)|generation\.(python|tensor_parallel|data_parallel|gpu_memory)|evaluation\.judge_timeout"
)
NAMED = ("experiment", "model", "data", "model.path", "data.path")


def slug(text: str) -> str:
    """`text` as a folder's name: short, and different for different texts."""
    safe = re.sub(r"[^\w.,=+-]+", "_", text)
    if safe == text and len(safe) <= 120:
        return safe
    return f"{safe[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def basename(path: str | None, default: str) -> str:
    """The name of a user's own model or data set: the last part of its path, or `default` without one."""
    if not path:
        return default
    file = Path(path)
    return re.sub(r"[^\w.-]+", "_", file.stem if file.suffix in DATA_FILES else file.name)


def run_folder(name: str, stage: str, overrides: Sequence[str]) -> str:
    """The folder of a run in outputs/: `name`, and the typed settings that change its result, in a stable order.

    It can be typed as it is in `model.path=outputs/<folder>/iter1/policy`: Hydra would want "," and "=" quoted.
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


def rename(word: str) -> str:
    """The override `word` under its key's new name, with a printed note for an old one.

    `data.template_options` gets Hydra's "++": its keys are the template's own, so that none of them is known here.
    """
    if word.startswith("data.template_options"):
        return f"++{word}"
    for old, new in RENAMED.items():
        if re.match(rf"[+~]*{re.escape(old)}(=|$)", word):
            note_renamed(old, new)
            return word.replace(old, new, 1)
    return word


def compose(*overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """What `python run.py *overrides` composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", [rename(word) for word in overrides], return_hydra_config)


def load(*overrides: str) -> Config:
    """The checked configuration of `python run.py *overrides`."""
    return load_config(compose(*overrides))


# --- errors -----------------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "joblib": "hydra-joblib-launcher==1.2.0",
    "submitit_local": "hydra-submitit-launcher==1.2.0",
    "submitit_slurm": "hydra-submitit-launcher==1.2.0",
}


def hydra_error_line(error: Exception) -> str:
    """Hydra's error in one line: what is wrong and what to do."""
    cause: BaseException | None = error
    while cause is not None and not str(cause):  # Hydra wraps some errors in an empty one
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
    hint = " Quote a value with special characters: 'data.template=\"### {prompt}\"'." if "{" in text else ""
    return " ".join(text.split()) + hint
