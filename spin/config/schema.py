"""Types and ranges of the configuration. Defaults and explanations are only in `conf/`."""

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from spin.runtime.errors import UserError, brief

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".parquet")  # of the data files that are read record by record
# spin/conf/ in an installed package, conf/ beside spin/ in a checkout.
CONF = next(path for path in (folder / "conf" for folder in Path(__file__).parents[1:3]) if path.is_dir())

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
StrictPositive = Annotated[float, Field(gt=0, strict=True)]
Names = Annotated[list[str], BeforeValidator(lambda names: names if isinstance(names, list) else [names])]  # or one
PerIteration = StrictPositive | list[StrictPositive]  # one number, or a list with one entry per iteration


class Section(BaseModel):
    """An immutable part of the configuration. `model_copy(update=...)` returns a changed copy."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, str_min_length=1, allow_inf_nan=False
    )

    @classmethod
    def from_defaults(cls, **changes: Any) -> Self:
        """Return the group's defaults (conf/<group>/base.yaml) with `changes`. Raises UserError for bad values."""
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
    lora_targets: Annotated[str | list[str], Field(min_length=1)]
    merge: bool
    quantization: Literal["none", "nf4"]


class DataConfig(Section):
    name: str
    path: str | None
    revision: str | None
    config: str | None
    splits: Names | None
    package: str | None
    package_sha256: str | None
    file: str | None
    format: Literal["auto", "messages", "prompt", "alpaca", "sharegpt", "preference", "chitchat"]
    generated: Literal["model", "file"]
    turns: Literal["first", "all"]
    template: str
    template_options: dict[str, Any]
    filter: Literal["none", "prose"]
    size: Count | None
    held_out: CountOrZero
    validation: CountOrZero
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
    objective: Literal["spin", "space"]
    link: Literal["logistic", "hinge", "exponential", "correlation"]
    beta: PerIteration | None
    mu: Positive | None
    reference: Literal["opponent", "start", "mixture", "none"]
    alpha: Annotated[float, Field(ge=0, le=1)]
    length_normalised: bool
    sft_weight: PositiveOrZero
    real_floor: PositiveOrZero
    history_weight: PositiveOrZero
    router_aux_weight: PositiveOrZero


class ScheduleConfig(Section):
    iterations: CountOrZero
    epochs: PerIteration
    batch_size: Count
    warmup_ratio: Decay
    replay: Literal["none", "previous", "all"]
    sft_epochs: PositiveOrZero
    sft_lr: Positive
    stop: Literal["none", "no_gain"]
    patience: Count


class GenerationConfig(Section):
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
    compile: bool
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    offload_optimizer: bool


class EvaluationConfig(Section):
    name: str
    enabled: bool
    samples: Count
    bootstrap: Count
    embedder: str | None
    select: str | None
    against: str | None
    harness: Names | None
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
    policies: Literal["none", "best", "all"]


class PublishConfig(Section):
    hub: str | None
    private: bool


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
    publish: PublishConfig
    _shown: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def shown(self) -> dict[str, Any]:
        """All settings as they are shown in files, with unresolved references to environment variables."""
        return self._shown or self.model_dump()

    @property
    def yaml(self) -> str:
        """The content of config.yaml."""
        return OmegaConf.to_yaml(OmegaConf.create(self.shown))

    @property
    def iterations(self) -> int:
        """The number of iterations: `iter=2` plays iterations 0, 1 and 2."""
        return self.schedule.iterations if self.iter is None else self.iter + 1

    @property
    def answers_per_prompt(self) -> int:
        """The number of model answers scored per prompt in training: the opponent's, and iteration 0's if used."""
        return self.generation.num_answers * (2 if self.loss.history_weight else 1)

    @property
    def max_new_tokens(self) -> int:
        """The maximum length of model answers: by default that of human ones, so that it does not distinguish them."""
        return self.generation.max_new_tokens or self.data.max_response_length or 256


def value_at_iteration(value: Any, iteration: int) -> float:
    """Return the value of a per-iteration setting at `iteration` (0-based)."""
    return float(value[iteration] if isinstance(value, list) else value)


@cache
def base_values() -> dict[str, dict]:
    """Return the defaults of every group, from conf/<group>/base.yaml."""
    groups = {path.parent.name: OmegaConf.load(path) for path in CONF.glob("*/base.yaml")}
    return OmegaConf.to_container(OmegaConf.create(groups), resolve=True)  # type: ignore[return-value]


def settings() -> list[str]:
    """Return all command-line keys, such as `loss.beta`, and the names of the groups."""
    keys = list(Config.model_fields)
    for name, field in Config.model_fields.items():
        keys += [f"{name}.{key}" for key in getattr(field.annotation, "model_fields", ())]
    return keys


def did_you_mean(word: str, known: list[str]) -> str:
    matches = get_close_matches(word, known, n=1)
    return f" Did you mean {matches[0]}?" if matches else " `python run.py --help` lists the settings."


T = TypeVar("T", bound=Section)


def validate(section: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Return `section` with `values`. Raises UserError with a line such as "loss.beta=-1: must be greater than 0."."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problem = max(error.errors(), key=lambda problem: len(problem["loc"]))  # a list entry's error, not the list's
        path = [prefix] * bool(prefix) + [str(part) for part in problem["loc"]]
        key = ".".join(path[:2])
        if problem["type"] == "extra_forbidden":
            raise UserError(f"{key}: there is no such setting.{did_you_mean(key, settings())}") from error
        if problem["type"] == "missing":
            advice = f"a file of your own in conf/{path[0]}/ begins with `defaults: [base, _self_]`"
            raise UserError(f"{key}: has no value; {advice}.") from error
        rule = problem["msg"].replace("Input should be", "must be").partition(", unable to")[0]
        if problem["type"] == "string_too_short":
            rule = "must not be empty (a shell variable may be unset)"
        raise UserError(setting_line(key, problem["input"], rule)) from error


def setting_line(key: str, value: object, rule: str) -> str:
    return f"{key}={'null' if value is None else brief(value)}: {rule}."
