"""Checks, made before any long computation, of a run's settings against its start and the installed libraries."""

import re
import shutil

from spin.config.schema import Config, ModelConfig
from spin.engines.deepspeed import check_deepspeed
from spin.engines.routers import find_routers
from spin.evaluation.external import harness, judges, mt_bench
from spin.evaluation.two_sample import check_embedder
from spin.generation.vllm import check_vllm
from spin.models import adapters
from spin.models.policy import Policy
from spin.models.quantization import check_bitsandbytes
from spin.runtime.errors import UserError
from spin.runtime.shards import Say


def lora_settings(model: ModelConfig) -> adapters.Lora:
    """Return the settings of a fresh adapter."""
    targets = model.lora_targets
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]  # a single name; PEFT would match a string against full module names
    names = targets if isinstance(targets, str) else sorted(set(targets))  # their order does not matter
    return adapters.Lora(model.lora_rank, model.lora_alpha, names)


def adapter_size(config: Config, start: Policy) -> int:
    """Return the number of parameters of a fresh adapter. Raises UserError if a target module does not exist."""
    return adapters.num_parameters(adapters.empty_model(start.folder, lora_settings(config.model))[0])


def check_start(config: Config, start: Policy, say: Say) -> None:
    """Raise UserError if the settings are incompatible with the start, or a library or file is missing."""
    model, weight = config.model, config.loss.router_aux_weight
    if model.adapter == "lora":
        if start.base:
            say(f"model.path={model.path} is a LoRA adapter; it is trained further as it is.")
        else:
            adapter_size(config, start)
    elif start.base and config.stage == "game":
        raise UserError(
            f"model.path={model.path} is a LoRA adapter: set model.adapter=lora to train it further, or merge it into "
            "its base first."
        )
    if weight and config.stage == "game":
        empty = adapters.without_weights(start.base_or_self.folder)
        if not find_routers(empty):
            raise UserError(
                f"loss.router_aux_weight={weight:g}: a {empty.config.model_type} model has no experts with a load-balancing "
                "loss: set it to 0."
            )
    check_libraries(config, start)


def check_libraries(config: Config, start: Policy) -> None:
    """Raise UserError if a library, file, benchmark or judge that the settings name is missing."""
    evaluation, generation, quantization = config.evaluation, config.generation, start.base_or_self.quantization
    if evaluation.embedder is not None:
        check_embedder(evaluation.embedder)
    if quantization or config.optimizer.name.endswith("8bit"):
        setting = f"model.quantization={quantization}" if quantization else f"optimizer.name={config.optimizer.name}"
        check_bitsandbytes(setting)
    if config.engine.compile and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("engine.compile=true needs a C++ compiler: install g++, or set it to false.")
    if config.engine.name == "deepspeed":
        check_deepspeed()
    if generation.engine == "vllm":
        fresh = config.model.lora_rank if config.model.adapter == "lora" else 0
        check_vllm(generation, start, adapters.largest_rank(start.folder) if start.base else fresh)
    if evaluation.harness:
        harness.check_tasks(harness.parse_tasks(evaluation.harness), evaluation.harness_include)
    if evaluation.judge is not None:
        judges.identity(evaluation.judge, evaluation.judge_model)
    if evaluation.questions is not None or evaluation.name == "mt_bench":
        questions = mt_bench.read_questions(evaluation.questions)  # if None, the error says where to get them
        if evaluation.judge is not None:
            mt_bench.read_grading(str(evaluation.questions), questions)
