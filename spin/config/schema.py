"""The boundary: what Hydra composed becomes checked, plain dataclasses. Behind it no config object travels.

Every key is explained where its value stands, in `conf/`.
"""

import math
import typing
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin.runtime.errors import UserError

# A number for all iterations, or a list with one entry an iteration. OmegaConf has no type for that: `check` does.
PerIteration = Any


class Section:  # TEMPORARY
    def model_dump(self):
        from dataclasses import asdict

        return asdict(self)

    def model_copy(self, update):
        from dataclasses import replace

        return replace(self, **update)


@dataclass
class ModelConfig(Section):
    name: str = "model"
    path: str | None = None
    revision: str | None = None
    package: str | None = None
    package_sha256: str | None = None
    file: str | None = None
    file_sha256: str | None = None
    sft_epochs: float = 1.0
    lr: float = 5e-7
    adapter: str = "none"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_targets: Any = "all-linear"
    merge: bool = False
    quantization: str = "none"


@dataclass
class DataConfig(Section):
    name: str = "data"
    path: str | None = None
    revision: str | None = None
    splits: list[str] | None = None
    package: str | None = None
    package_sha256: str | None = None
    file: str | None = None
    format: str = "auto"
    turns: str = "first"
    template: str = "chat"
    filter: str = "none"
    size: int | None = None
    held_out: int = 0
    max_prompt_length: int = 512
    max_response_length: int | None = None
    min_response_length: int = 1
    max_length: int = 1024
    overlong: str = "drop"
    check: str = "none"


@dataclass
class OptimizerConfig(Section):
    name: str = "rmsprop"
    lr: PerIteration = 5e-7
    weight_decay: float = 0.0
    alpha: float = 0.99
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    states: str = "fp32"
    max_grad_norm: float = 1.0


@dataclass
class LossConfig(Section):
    link: str = "logistic"
    beta: PerIteration = 0.1
    sft_weight: float = 0.0
    reference: str = "opponent"
    alpha: float = 0.5
    length_normalised: bool = False


@dataclass
class ScheduleConfig(Section):
    name: str = "constant"
    iterations: int = 1
    epochs: PerIteration = 1
    batch_size: int = 64
    warmup_ratio: float = 0.1
    replay: str = "previous"
    sft_epochs: float = 0.0
    sft_lr: float = 1e-5


@dataclass
class GenerationConfig(Section):
    name: str = "sample"
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    num_answers: int = 1
    batch_size: int = 64
    tokens: int = 65536
    engine: str = "transformers"
    python: str | None = None
    tensor_parallel: int = 1
    data_parallel: int = 1
    gpu_memory: float = 0.9


@dataclass
class EngineConfig(Section):
    name: str = "single"
    device: str = "auto"
    precision: str = "auto"
    layout: str = "auto"
    tokens_per_row: int = 512
    tokens_per_batch: int = 2048
    head_chunk: int = 2048
    gradient_checkpointing: bool = False
    zero_stage: int = 3
    offload_optimizer: bool = False


@dataclass
class EvaluationConfig(Section):
    name: str = "heldout"
    enabled: bool = True
    samples: int = 3
    bootstrap: int = 1000
    embedder: str | None = None
    against: str | None = None
    harness: list[str] | None = None
    harness_include: str | None = None
    harness_limit: int | None = None
    harness_batch_size: int = 8
    questions: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_timeout: float = 60.0


@dataclass
class StoreConfig(Section):
    path: str = "outputs/store"


@dataclass
class CheckpointConfig(Section):
    minutes: float = 5.0
    steps: int | None = None
    shard_size: int = 256


@dataclass
class CacheConfig(Section):
    path: str = "~/.cache/spin"


@dataclass
class TrackingConfig(Section):
    wandb: str = "auto"
    project: str = "spin"
    entity: str | None = None


@dataclass
class Config(Section):
    name: str = "spin"
    seed: int = 0
    iter: int | None = None
    stage: str = "game"
    plan: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def iterations(self) -> int:
        """How many iterations are played: `iter=2` plays 0, 1 and 2."""
        return self.schedule.iterations if self.iter is None else self.iter + 1

    @property
    def max_new_tokens(self) -> int:
        """The cap on generated answers: by default what human answers may have, so that length tells nothing."""
        return self.generation.max_new_tokens or self.data.max_response_length or 256


CHOICES = {
    "model.adapter": ("none", "lora"),
    "model.quantization": ("none", "nf4"),
    "data.format": ("auto", "messages", "prompt", "alpaca", "sharegpt", "chitchat"),
    "data.turns": ("first", "all"),
    "data.filter": ("none", "prose"),
    "data.overlong": ("drop", "cut"),
    "data.check": ("none", "exact", "number"),
    "optimizer.name": ("rmsprop", "adamw", "rmsprop8bit", "adamw8bit"),
    "optimizer.states": ("fp32", "bf16"),
    "loss.link": ("logistic", "hinge", "exponential", "correlation"),
    "loss.reference": ("opponent", "start", "mixture"),
    "schedule.replay": ("none", "previous", "all"),
    "generation.engine": ("transformers", "vllm"),
    "engine.name": ("single", "deepspeed"),
    "engine.precision": ("auto", "fp32", "bf16"),
    "engine.layout": ("auto", "packed", "masked", "padded"),
    "tracking.wandb": ("auto", "online", "offline", "disabled"),
}


def value_at_iteration(value: PerIteration, iteration: int) -> float:
    """The value of a per-iteration quantity at `iteration` (0-based)."""
    return float(value[iteration] if isinstance(value, list) else value)


def load_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Raises UserError: an unknown key, a value of the wrong type or out of range, or values that do not go together.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    config = typing.cast(Config, config)
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise UserError for the first value that is out of range or does not go with the others."""
    for path, allowed in CHOICES.items():
        group, key = path.split(".")
        value = getattr(getattr(config, group), key)
        _require(value in allowed, path, value, f"must be one of {', '.join(allowed)}")

    _require(config.iter is None or config.iter >= 0, "iter", config.iter, "must be 0 or more: iterations count from 0")
    _require(config.seed >= 0, "seed", config.seed, "must be 0 or more")
    schedule, data, generation, engine = config.schedule, config.data, config.generation, config.engine
    _require(schedule.iterations >= 1, "schedule.iterations", schedule.iterations, "must be 1 or more")

    _per_iteration(config, "loss.beta", config.loss.beta)
    loss = config.loss
    _require(0 <= loss.sft_weight < math.inf, "loss.sft_weight", loss.sft_weight, "must be 0 (no SFT term) or more")
    _require(0 <= loss.alpha <= 1, "loss.alpha", loss.alpha, "must lie in [0, 1]: 1 is the opponent, 0 the start")
    _per_iteration(config, "optimizer.lr", config.optimizer.lr)
    _per_iteration(config, "schedule.epochs", schedule.epochs)

    _require(
        config.optimizer.max_grad_norm > 0, "optimizer.max_grad_norm", config.optimizer.max_grad_norm, "must be above 0"
    )
    _require(
        config.optimizer.weight_decay >= 0, "optimizer.weight_decay", config.optimizer.weight_decay, "must be 0 or more"
    )
    _require(len(config.optimizer.betas) == 2, "optimizer.betas", config.optimizer.betas, "must have two entries")
    for value in (config.optimizer.alpha, *config.optimizer.betas):
        _require(0 <= value < 1, "optimizer.alpha and optimizer.betas", value, "must lie in [0, 1)")
    _require(config.optimizer.eps > 0, "optimizer.eps", config.optimizer.eps, "must be above 0")
    _require(schedule.batch_size >= 1, "schedule.batch_size", schedule.batch_size, "must be 1 pair or more")
    _require(0 <= schedule.warmup_ratio < 1, "schedule.warmup_ratio", schedule.warmup_ratio, "must lie in [0, 1)")
    _require(schedule.sft_epochs >= 0, "schedule.sft_epochs", schedule.sft_epochs, "must be 0 (no SFT stage) or more")
    _require(schedule.sft_lr > 0, "schedule.sft_lr", schedule.sft_lr, "must be above 0")

    _require(
        generation.temperature >= 0, "generation.temperature", generation.temperature, "must be 0 (greedy) or more"
    )
    _require(0 < generation.top_p <= 1, "generation.top_p", generation.top_p, "must lie in (0, 1]")
    _require(config.max_new_tokens >= 1, "generation.max_new_tokens", generation.max_new_tokens, "must be 1 or more")
    _require(
        generation.num_answers >= 1,
        "generation.num_answers",
        generation.num_answers,
        "must be 1 answer a prompt, or more",
    )
    _require(
        generation.num_answers == 1 or generation.temperature > 0,
        "generation.num_answers",
        generation.num_answers,
        "all answers to a prompt are the same at generation.temperature=0: give a temperature above 0, or answers=1",
    )
    _require(generation.batch_size >= 1, "generation.batch_size", generation.batch_size, "must be 1 or more")

    _require(generation.tokens >= 1, "generation.tokens", generation.tokens, "must be 1 or more")
    for key in ("tensor_parallel", "data_parallel"):
        _require(getattr(generation, key) >= 1, f"generation.{key}", getattr(generation, key), "must be 1 or more")
    _require(0 < generation.gpu_memory <= 1, "generation.gpu_memory", generation.gpu_memory, "must lie in (0, 1]")

    _require(data.size is None or data.size >= 1, "data.size", data.size, "must be 1 or more, or null for all")
    _require(data.held_out >= 0, "data.held_out", data.held_out, "must be 0 or more")
    _require(data.max_prompt_length >= 1, "data.max_prompt_length", data.max_prompt_length, "must be 1 token or more")
    _require(
        data.min_response_length >= 1, "data.min_response_length", data.min_response_length, "must be 1 token or more"
    )
    _require(
        data.max_length > data.max_prompt_length,
        "data.max_length",
        data.max_length,
        f"must exceed data.max_prompt_length={data.max_prompt_length}, or the longest prompts leave no room for an answer",
    )
    if data.max_response_length is not None:
        _require(
            data.max_response_length >= data.min_response_length,
            "data.max_response_length",
            data.max_response_length,
            f"must be data.min_response_length={data.min_response_length} or more",
        )
    _require(
        data.template in ("chat", "paper") or "{prompt}" in data.template,
        "data.template",
        data.template,
        "must be chat, paper, or a text with {prompt} in it",
    )
    _require(
        config.model.path is not None or config.model.package is not None,
        "model.path",
        config.model.path,
        "must name a model: a local folder or a Hugging Face name",
    )
    _require(
        config.model.path is not None or config.model.file is not None,
        "model.file",
        config.model.file,
        "must name the weights in model.package",
    )
    _model_adapter(config.model, config.stage)
    _require(
        data.path is not None or data.package is not None,
        "data.path",
        data.path,
        "must name the data: a file, a folder or a Hugging Face name",
    )
    _require(engine.tokens_per_row >= 1, "engine.tokens_per_row", engine.tokens_per_row, "must be 1 or more")
    _require(
        engine.tokens_per_batch >= engine.tokens_per_row,
        "engine.tokens_per_batch",
        engine.tokens_per_batch,
        f"must be engine.tokens_per_row={engine.tokens_per_row} or more",
    )
    if engine.name == "deepspeed":
        _deepspeed(config)
    _require(engine.head_chunk >= 1, "engine.head_chunk", engine.head_chunk, "must be 1 or more")
    _require(config.stage in ("game", "evaluate"), "stage", config.stage, "must be game or evaluate")
    _require(
        config.stage == "game" or (config.evaluation.enabled and data.held_out > 0),
        "stage",
        config.stage,
        "needs evaluation.enabled=true and data.held_out of 1 or more",
    )
    _require(
        config.evaluation.against is None or config.stage == "evaluate",
        "evaluation.against",
        config.evaluation.against,
        "goes with stage=evaluate",
    )
    limit, size = config.evaluation.harness_limit, config.evaluation.harness_batch_size
    _require(limit is None or limit >= 1, "evaluation.harness_limit", limit, "must be 1 or more, or null for all")
    _require(size >= 1, "evaluation.harness_batch_size", size, "must be 1 or more")
    _require(
        config.evaluation.judge_timeout > 0,
        "evaluation.judge_timeout",
        config.evaluation.judge_timeout,
        "must be above 0",
    )
    kept = config.checkpoint
    _require(
        kept.minutes >= 0, "checkpoint.minutes", kept.minutes, "must be 0 (as often as 3 % of the time allows) or more"
    )
    _require(kept.steps is None or kept.steps >= 1, "checkpoint.steps", kept.steps, "must be 1 or more, or null")
    _require(kept.shard_size >= 1, "checkpoint.shard_size", kept.shard_size, "must be 1 or more")
    _require(config.evaluation.samples >= 1, "evaluation.samples", config.evaluation.samples, "must be 1 or more")
    _require(config.evaluation.bootstrap >= 1, "evaluation.bootstrap", config.evaluation.bootstrap, "must be 1 or more")


def _deepspeed(config: Config) -> None:
    engine, optimizer = config.engine, config.optimizer
    _require(engine.zero_stage in (0, 1, 2, 3), "engine.zero_stage", engine.zero_stage, "must be 0, 1, 2 or 3")
    _require(
        engine.zero_stage > 0 or not engine.offload_optimizer,
        "engine.offload_optimizer",
        engine.offload_optimizer,
        "needs engine.zero_stage of 1 or more",
    )
    _require(
        config.model.quantization == "none",
        "model.quantization",
        config.model.quantization,
        "a rounded base can't be spread over ranks: set engine=single, or none",
    )
    _require(
        not optimizer.name.endswith("8bit") and optimizer.states == "fp32",
        "optimizer",
        f"{optimizer.name} with {optimizer.states} states",
        "engine=deepspeed spreads fp32 states over ranks: set optimizer=rmsprop or adamw, and optimizer.states=fp32",
    )


def _model_adapter(model: ModelConfig, stage: str) -> None:
    _require(model.lora_rank >= 1, "model.lora_rank", model.lora_rank, "must be 1 or more")
    _require(model.lora_alpha >= 1, "model.lora_alpha", model.lora_alpha, "must be 1 or more")
    targets = model.lora_targets
    _require(
        (isinstance(targets, str) and targets != "")
        or (isinstance(targets, list) and targets != [] and all(isinstance(name, str) for name in targets)),
        "model.lora_targets",
        targets,
        "must be all-linear, or a list of layers' names such as [q_proj,v_proj]",
    )
    has_adapter = model.adapter == "lora"
    _require(has_adapter or not model.merge, "model.merge", model.merge, "goes with model.adapter=lora")
    _require(
        has_adapter or model.quantization == "none" or stage == "evaluate",
        "model.quantization",
        model.quantization,
        "rounded weights can't be trained, only an adapter beside them: set model.adapter=lora",
    )


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        shown = "null" if value is None else value
        raise UserError(f"{key}={shown}: {rule}.")


def _per_iteration(config: Config, key: str, value: PerIteration) -> None:
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        numeric = isinstance(entry, (int, float)) and not isinstance(entry, bool)
        _require(numeric, key, entry, "must be a number, or a list with one number an iteration")
        _require(math.isfinite(entry) and entry > 0, key, entry, "must be above 0")
    if isinstance(value, list):
        _require(
            len(value) >= config.iterations,
            key,
            value,
            f"has {len(value)} entries, but {config.iterations} iterations are played: give one number, or more entries",
        )
