"""Resolvers that conf/ uses, and Hydra's errors in one line."""

import dataclasses
import hashlib
import re
from difflib import get_close_matches
from pathlib import Path

from omegaconf import OmegaConf

from spin.config.schema import Config

# --- what conf/ computes with: registered here, for points of a sweep that are composed in processes of their own --------


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


def measured(stage: str, model: str | None, against: str | None) -> str:
    """What to append to the run folder's name for `stage=evaluate`: different for different policies."""
    if stage != "evaluate":
        return ""
    paths = [str(Path(path).expanduser().absolute()) if path else "" for path in (model, against)]
    return f"-evaluation-{hashlib.sha256(repr(paths).encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("measured", measured, replace=True)


# --- what Hydra refuses -----------------------------------------------------------------------------------------------


LAUNCHERS = {
    "joblib": "hydra-joblib-launcher==1.2.0",
    "submitit_local": "hydra-submitit-launcher==1.2.0",
    "submitit_slurm": "hydra-submitit-launcher==1.2.0",
}


def hydra_error_line(error: Exception) -> str:
    """Hydra's errors, in one line: what is wrong and what to do."""
    cause: BaseException | None = error
    while cause is not None and not str(cause):  # Hydra wraps some errors in an empty one
        cause = cause.__cause__
    text = str(cause or error)
    if (found := re.search(r"Could not (?:find|load) 'hydra/launcher/(\w+)'", text)) and found[1] in LAUNCHERS:
        return (
            f"hydra/launcher={found[1]} is a plugin of Hydra's that is not installed: pip install {LAUNCHERS[found[1]]}"
        )
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

    defaults = dataclasses.asdict(Config())
    return [*keys(defaults), *defaults]
