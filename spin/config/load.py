"""Conversion of the configuration that Hydra composed to a checked `Config`."""

import json
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from spin.config.schema import Config, base_values, setting_line, validate
from spin.runtime.errors import UserError, explaining
from spin.runtime.output import note_secrets

# Settings that have an effect only with certain values of another setting; otherwise only their default is accepted.
USED_WITH = {
    "model.merge": ("model.adapter", "lora"),
    "model.lora_rank": ("model.adapter", "lora"),
    "model.lora_alpha": ("model.adapter", "lora"),
    "model.lora_targets": ("model.adapter", "lora"),
    "data.template_options": ("data.template", "chat"),
    "optimizer.alpha": ("optimizer.name", "rmsprop", "rmsprop8bit"),
    "optimizer.betas": ("optimizer.name", "adamw", "adamw8bit"),
    "loss.mu": ("loss.objective", "space"),
    "loss.link": ("loss.objective", "spin"),
    "loss.reference": ("loss.objective", "spin"),
    "loss.alpha": ("loss.reference", "mixture"),
    "loss.length_normalised": ("loss.objective", "spin"),
    "engine.compile": ("engine.name", "single"),
    "engine.zero_stage": ("engine.name", "deepspeed"),
    "engine.offload_optimizer": ("engine.name", "deepspeed"),
    "evaluation.select": ("stage", "game"),
    "evaluation.against": ("stage", "evaluate"),
    "publish.hub": ("stage", "game"),
}
# Settings that do not affect the results of a game, except how many iterations are played.
NO_RESULT = re.compile(
    r"name|(model|data)\.name|model\.merge|plan|stage"
    r"|iter|schedule\.(iterations|stop|patience)"
    r"|(store|cache)\.path|checkpoint\.(minutes|steps)"
    r"|(tracking|publish|hydra)\b.*"
    r"|engine\.(device|gradient_checkpointing|zero_stage|offload_optimizer)|evaluation\.judge_timeout"
    r"|generation\.(python|tensor_parallel|data_parallel|gpu_memory)"
)
RESERVED = {"add_generation_prompt", "messages", "tools"}  # variables of a chat template that are not options
RENAMED = {"generation.answers": "generation.num_answers"}  # old key -> new key; both are accepted


def note_renamed(old: str, new: str) -> None:
    print(f"note: {old} is now called {new}; the old name still works.", flush=True)


def load_config(composed: DictConfig) -> Config:
    """Convert the configuration that Hydra composed, without Hydra's own settings, to a checked `Config`.

    Raises UserError: an unknown key, a value of the wrong type or out of range, or inconsistent values.
    """
    composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    with explaining("the configuration cannot be resolved", catch=OmegaConfBaseException):
        values: Any = OmegaConf.to_container(composed, resolve=True)
    note_secrets(OmegaConf.to_yaml(composed))
    for old, new in RENAMED.items():  # in a user's YAML files; `spin.config.hydra.rename` handles overrides
        group, key = old.split(".")
        if key in values.get(group, {}):
            note_renamed(old, new)
            values[group][new.split(".")[1]] = values[group].pop(key)
    config = validate(Config, values)
    config._shown = _unresolved(composed)
    for holds, key, rule in (*_data_rules(config), *_training_rules(config)):
        if not holds:
            raise UserError(setting_line(key, attrgetter(key)(config), rule))
    return config


def _unresolved(composed: DictConfig) -> Any:
    """Return the settings with everything resolved except values from environment variables."""

    def text_of(name: str, *default: Any) -> str:
        return f"${{oc.env:{','.join([name, *map(json.dumps, default)])}}}"

    OmegaConf.register_new_resolver("oc.env", text_of, replace=True)
    try:
        return OmegaConf.to_container(composed, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def changed_settings(path: Path, config: Config) -> list[str]:
    """Return the settings in the config.yaml at `path` that differ from `config` and affect a game's results, as
    "loss.beta=0.1, not 0.2"; an empty list if the file is missing or damaged."""
    try:
        old, new = (_flat(settings) for settings in (yaml.safe_load(path.read_bytes()), config.shown))
    except (OSError, yaml.YAMLError, ValueError, AttributeError):
        return []
    keys = [key for key in old if key in new and old[key] != new[key]]
    return [f"{key}={old[key]}, not {new[key]}" for key in keys if key == "stage" or not NO_RESULT.fullmatch(key)]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings by their command-line keys, such as `loss.beta`."""
    groups = [(name, group if isinstance(group, dict) else {"": group}) for name, group in settings.items()]
    return {f"{name}.{key}".rstrip("."): value for name, group in groups for key, value in group.items()}


# --- rules between settings -------------------------------------------------------------------------------------------

Rule = tuple[bool, str, str]  # whether it holds, the key to report, and what is allowed


def _data_rules(config: Config) -> Iterator[Rule]:
    """Yield the rules on the model, the data, generation and evaluation."""
    model, data, generation, evaluation = config.model, config.data, config.generation, config.evaluation
    named = model.path is not None or model.package is not None
    yield named, "model.path", "must name a model: a local folder or a Hugging Face name"
    yield model.path is not None or model.file is not None, "model.file", "must name the weights in model.package"
    trainable = model.adapter == "lora" or model.quantization == "none" or config.stage == "evaluate"
    yield trainable, "model.quantization", "quantised weights can't be trained: set model.adapter=lora"
    has_prompt = data.template in ("chat", "paper") or "{prompt}" in data.template
    yield has_prompt, "data.template", "must be chat, paper, or a text with {prompt} in it"
    free = not RESERVED & data.template_options.keys()
    yield free, "data.template_options", f"must not set {', '.join(sorted(RESERVED))}, which the data decides"
    named = data.path is not None or data.package is not None
    yield named, "data.path", "must name the data: a file, a folder or a Hugging Face name"
    yield data.max_length > data.max_prompt_length, "data.max_length", "must exceed data.max_prompt_length"
    ordered = data.max_response_length is None or data.max_response_length >= data.min_response_length
    yield ordered, "data.max_response_length", "must be data.min_response_length or more"
    varied = generation.num_answers == 1 or generation.temperature > 0
    yield varied, "generation.num_answers", "all answers to a prompt are the same at generation.temperature=0"
    single = generation.num_answers == 1 or data.generated == "model"
    yield single, "generation.num_answers", "data.generated=file has one answer to a prompt"
    can_measure = evaluation.enabled and data.held_out > 0
    yield config.stage == "game" or can_measure, "stage", "needs evaluation.enabled=true and data.held_out of 1 or more"
    validates = evaluation.enabled and (data.validation > 0 or evaluation.select is not None)
    needs = "needs data.validation of 1 or more, to see whether an iteration gains"
    yield config.schedule.stop == "none" or validates, "schedule.stop", needs


def _training_rules(config: Config) -> Iterator[Rule]:
    """Yield the rules on the loss, the schedule, the optimiser and the engine, and those of `USED_WITH`."""
    engine, optimizer, loss, is_space = config.engine, config.optimizer, config.loss, config.loss.objective == "space"
    yield is_space or loss.beta is not None, "loss.beta", "must be a number"
    yield not is_space or loss.beta is None, "loss.beta", "loss.objective=space has no beta: set loss.beta=null"
    for key in ("loss.beta", "optimizer.lr", "schedule.epochs"):
        value = attrgetter(key)(config)
        suffices = not isinstance(value, list) or len(value) >= config.iterations
        yield suffices, key, f"must have {config.iterations} entries or more, one per iteration, or be one number"
    for key, (chooser, *choices) in USED_WITH.items():
        group, name = key.split(".")
        chosen = attrgetter(chooser)(config)
        is_default = attrgetter(key)(config) == base_values().get(group, {}).get(name)
        chooser = chooser.removesuffix(".name")
        rule = f"has no effect with {chooser}={chosen}; it goes with {chooser}={' or '.join(choices)}"
        yield is_default or chosen in choices, key, rule
    if engine.name == "deepspeed":
        shards = engine.zero_stage > 0 or not engine.offload_optimizer
        yield shards, "engine.offload_optimizer", "needs engine.zero_stage of 1 or more"
        full = config.model.quantization == "none"
        yield full, "model.quantization", "engine=deepspeed can't shard a quantised base: set engine=single, or none"
        states = "engine=deepspeed shards fp32 states only: set optimizer=rmsprop or adamw, and optimizer.states=fp32"
        yield not optimizer.name.endswith("8bit"), "optimizer.name", states
        yield optimizer.states == "fp32", "optimizer.states", states
