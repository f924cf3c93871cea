"""From what Hydra composed to a checked `Config`: renamed keys, and rules between settings."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin.config.schema import Config, Section, base_values, setting_line, validate
from spin.runtime.errors import UserError

RENAMED = {"generation.answers": "generation.num_answers"}  # old key -> new key; both are accepted


def load_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Raises UserError: an unknown key, a value of the wrong type or out of range, or values that do not go together.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    _rename(values)  # type: ignore[arg-type]
    config = validate(Config, values)  # type: ignore[arg-type]
    for holds, key, rule in _rules(config):
        if not holds:
            raise UserError(setting_line(key, value_of(config, key), rule))
    return config


def _rename(values: dict[str, Any]) -> None:
    """Give old keys of a user's YAML file their new names."""
    for old, new in RENAMED.items():
        group, key = old.split(".")
        section = values.get(group)
        if isinstance(section, dict) and key in section:
            section[new.split(".")[1]] = section.pop(key)
            note_renamed(old)


@cache  # once a process
def note_renamed(old: str) -> None:
    print(f"note: {old} is now called {RENAMED[old]}; the old name still works.", flush=True)


def value_of(config: Section, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


# --- rules between settings -------------------------------------------------------------------------------------------

Rule = tuple[bool, str, str]  # whether it holds, the key to blame, what is allowed

# Settings that only some choices read: elsewhere a value that is not the default is a mistake.
READ_BY = {
    "optimizer.alpha": ("rmsprop", "rmsprop8bit"),
    "optimizer.betas": ("adamw", "adamw8bit"),
    "engine.zero_stage": ("deepspeed",),
    "engine.offload_optimizer": ("deepspeed",),
}


def _rules(config: Config) -> Iterator[Rule]:
    data, generation, evaluation = config.data, config.generation, config.evaluation
    yield from _model_rules(config)
    named = data.path is not None or data.package is not None
    yield named, "data.path", "must name the data: a file, a folder or a Hugging Face name"
    yield (
        data.max_length > data.max_prompt_length,
        "data.max_length",
        f"must exceed data.max_prompt_length={data.max_prompt_length}, or the longest prompts leave no room for an answer",
    )
    yield (
        data.max_response_length is None or data.max_response_length >= data.min_response_length,
        "data.max_response_length",
        f"must be data.min_response_length={data.min_response_length} or more",
    )
    yield (
        generation.num_answers == 1 or generation.temperature > 0,
        "generation.num_answers",
        "all answers to a prompt are the same at generation.temperature=0: set a temperature above 0, or num_answers=1",
    )
    yield from _engine_rules(config)
    can_measure = evaluation.enabled and data.held_out > 0
    yield config.stage == "game" or can_measure, "stage", "needs evaluation.enabled=true and data.held_out of 1 or more"
    yield evaluation.against is None or config.stage == "evaluate", "evaluation.against", "goes with stage=evaluate"
    for key in ("loss.beta", "optimizer.lr", "schedule.epochs"):
        value = value_of(config, key)
        yield (
            not isinstance(value, list) or len(value) >= config.iterations,
            key,
            f"must have {config.iterations} entries or more, one an iteration, or be one number",
        )
    for key, names in READ_BY.items():
        group, name = key.split(".")
        chosen = getattr(config, group)
        is_default = getattr(chosen, name) == base_values()[group][name]
        yield is_default or chosen.name in names, key, f"has no effect with {group}={chosen.name}"


def _model_rules(config: Config) -> Iterator[Rule]:
    model = config.model
    named = model.path is not None or model.package is not None
    yield named, "model.path", "must name a model: a local folder or a Hugging Face name"
    yield model.path is not None or model.file is not None, "model.file", "must name the weights in model.package"
    yield model.adapter == "lora" or not model.merge, "model.merge", "goes with model.adapter=lora"
    yield (
        model.adapter == "lora" or model.quantization == "none" or config.stage == "evaluate",
        "model.quantization",
        "quantised weights can't be trained, only an adapter beside them: set model.adapter=lora",
    )


def _engine_rules(config: Config) -> Iterator[Rule]:
    engine, optimizer = config.engine, config.optimizer
    if engine.name == "deepspeed":
        staged = engine.zero_stage > 0 or not engine.offload_optimizer
        yield staged, "engine.offload_optimizer", "needs engine.zero_stage of 1 or more"
        whole = config.model.quantization == "none"
        yield whole, "model.quantization", "engine=deepspeed can't shard a quantised base: set engine=single, or none"
        plain = "engine=deepspeed shards fp32 states only: set optimizer=rmsprop or adamw, and optimizer.states=fp32"
        yield not optimizer.name.endswith("8bit"), "optimizer.name", plain
        yield optimizer.states == "fp32", "optimizer.states", plain
