"""The types and ranges of a configuration. Defaults and explanations stand in `conf/` only."""

import math
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from spin.runtime.errors import UserError, brief

CONF = Path(__file__).parents[2] / "conf"


def _check_per_iteration(value: Any) -> Any:
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, (int, float)) or isinstance(entry, bool):
            rule = "must be a number, or a list with one number an iteration"
            raise PydanticCustomError("rule", rule, {"value": entry})  # type: ignore[arg-type]
        if not (math.isfinite(entry) and entry > 0):
            raise PydanticCustomError("rule", "must be above 0", {"value": entry})
    return value


def _check_template(template: str) -> str:
    if template not in ("chat", "paper") and "{prompt}" not in template:
        raise PydanticCustomError("rule", "must be chat, paper, or a text with {prompt} in it")
    return template


def _check_layers(targets: Any) -> Any:
    if not targets or not (
        isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(name, str) for name in targets))
    ):
        rule = "must be all-linear, or a list of layers' names such as [q_proj,v_proj]"
        raise PydanticCustomError("rule", rule)  # type: ignore[arg-type]
    return targets


PerIteration = Annotated[Any, AfterValidator(_check_per_iteration)]  # a number, or a list with one entry an iteration
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration. Immutable; `model_copy(update=...)` makes a changed copy."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)

    @classmethod
    def from_defaults(cls, **changes: Any) -> Self:
        """The group's defaults (conf/<group>/base.yaml) with `changes`. Raises UserError for a bad value."""
        group = cls.__name__.removesuffix("Config").lower()
        return validate(cls, {**base_values()[group], **changes}, group)


class ModelConfig(Section):
    name: str
    path: str | None
    revision: str | None
    package: str | None
    package_sha256: str | None
    file: str | None
    file_sha256: str | None
    sft_epochs: PositiveOrZero
    lr: Positive
    adapter: Literal["none", "lora"]
    lora_rank: Count
    lora_alpha: Count
    lora_targets: Annotated[Any, AfterValidator(_check_layers)]
    merge: bool
    quantization: Literal["none", "nf4"]


class DataConfig(Section):
    name: str
    path: str | None
    revision: str | None
    splits: list[str] | None
    package: str | None
    package_sha256: str | None
    file: str | None
    format: Literal["auto", "messages", "prompt", "alpaca", "sharegpt", "chitchat"]
    turns: Literal["first", "all"]
    template: Annotated[str, AfterValidator(_check_template)]
    filter: Literal["none", "prose"]
    size: Count | None
    held_out: CountOrZero
    max_prompt_length: Count
    max_response_length: Count | None
    min_response_length: Count
    max_length: Count
    overlong: Literal["drop", "cut"]
    check: Literal["none", "exact", "number"]


class OptimizerConfig(Section):
    name: Literal["rmsprop", "adamw", "rmsprop8bit", "adamw8bit"]
    lr: PerIteration
    weight_decay: PositiveOrZero
    alpha: Decay
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)]
    eps: Positive
    states: Literal["fp32", "bf16"]
    max_grad_norm: Positive


class LossConfig(Section):
    link: Literal["logistic", "hinge", "exponential", "correlation"]
    beta: PerIteration
    sft_weight: PositiveOrZero
    reference: Literal["opponent", "start", "mixture"]
    alpha: Annotated[float, Field(ge=0, le=1)]
    length_normalised: bool


class ScheduleConfig(Section):
    name: str
    iterations: Count
    epochs: PerIteration
    batch_size: Count
    warmup_ratio: Decay
    replay: Literal["none", "previous", "all"]
    sft_epochs: PositiveOrZero
    sft_lr: Positive


class GenerationConfig(Section):
    name: str
    temperature: PositiveOrZero
    top_p: Share
    max_new_tokens: Count | None
    num_answers: Count
    batch_size: Count
    tokens: Count
    engine: Literal["transformers", "vllm"]
    python: str | None
    tensor_parallel: Count
    data_parallel: Count
    gpu_memory: Share


class EngineConfig(Section):
    name: Literal["single", "deepspeed"]
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    layout: Literal["auto", "packed", "padded"]
    tokens_per_batch: Count
    head_chunk: Count
    gradient_checkpointing: bool
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    offload_optimizer: bool


class EvaluationConfig(Section):
    name: str
    enabled: bool
    samples: Count
    bootstrap: Count
    embedder: str | None
    against: str | None
    harness: list[str] | None
    harness_include: str | None
    harness_limit: Count | None
    harness_batch_size: Count
    questions: str | None
    judge: str | None
    judge_model: str | None
    judge_timeout: Positive


class StoreConfig(Section):
    path: str


class CheckpointConfig(Section):
    minutes: PositiveOrZero
    steps: Count | None
    shard_size: Count


class CacheConfig(Section):
    path: str


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None


class Config(Section):
    name: str
    seed: CountOrZero
    iter: CountOrZero | None
    stage: Literal["game", "evaluate"]
    plan: bool
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    schedule: ScheduleConfig
    generation: GenerationConfig
    engine: EngineConfig
    evaluation: EvaluationConfig
    store: StoreConfig
    checkpoint: CheckpointConfig
    cache: CacheConfig
    tracking: TrackingConfig

    @property
    def iterations(self) -> int:
        """The number of iterations: `iter=2` plays 0, 1 and 2."""
        return self.schedule.iterations if self.iter is None else self.iter + 1

    @property
    def max_new_tokens(self) -> int:
        """The cap on model answers: by default that on human ones, so that length does not tell them apart."""
        return self.generation.max_new_tokens or self.data.max_response_length or 256


def value_at_iteration(value: Any, iteration: int) -> float:
    """The value of a per-iteration setting at `iteration` (0-based)."""
    return float(value[iteration] if isinstance(value, list) else value)


@cache
def base_values() -> dict[str, dict]:
    """The defaults of every group, from conf/<group>/base.yaml."""
    groups = {path.parent.name: OmegaConf.load(path) for path in CONF.glob("*/base.yaml")}
    return OmegaConf.to_container(OmegaConf.create(groups), resolve=True)  # type: ignore[return-value]


def settings() -> list[str]:
    """Every key, as typed on the command line: `loss.beta`, ..., then the groups' names."""
    keys, groups = [], []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
            groups.append(name)
        else:
            keys.append(name)
    return keys + groups


def did_you_mean(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]}?" if near else " `python run.py --help` lists the settings."


# --- a ValidationError in one line ------------------------------------------------------------------------------------

T = TypeVar("T", bound=Section)


def validate(section: type[T], values: dict[str, Any], prefix: str = "") -> T:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_error_line(error.errors()[0], prefix)) from error


def _error_line(error: ErrorDetails, prefix: str) -> str:
    """One of pydantic's errors as "loss.beta=-1: must be above 0."."""
    key = ".".join(filter(None, [prefix, *(part for part in error["loc"] if isinstance(part, str))]))
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}: there is no such setting.{did_you_mean(key, settings())}"
    if kind == "missing":
        group = key.split(".")[0]
        return f"{key}: has no value; a file of your own in conf/{group}/ begins with `defaults: [base, _self_]`."
    rules = {
        "literal_error": "must be one of " + context.get("expected", "").replace("'", "").replace(" or ", ", "),
        "greater_than": "must be above {gt:g}",
        "greater_than_equal": "must be {ge:g} or more",
        "less_than": "must be below {lt:g}",
        "less_than_equal": "must be {le:g} or less",
        "too_short": "must have {min_length} entries or more",
        "too_long": "must have {max_length} entries or fewer",
        "list_type": "must be a list",
        "string_type": "must be a text",
        "finite_number": "must be a finite number",
    }
    rule = rules.get(kind, error["msg"]).format(**context) if kind in rules else error["msg"]
    for start, words in (("int_", "a whole number"), ("float_", "a number"), ("bool_", "true or false")):
        if kind.startswith(start):
            rule = f"must be {words}"
    return setting_line(key, context.get("value", error["input"]), rule)


def setting_line(key: str, value: object, rule: str) -> str:
    return f"{key}={'null' if value is None else brief(value)}: {rule}."
