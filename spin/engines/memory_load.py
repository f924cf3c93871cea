"""The memory that a run's settings and data ask for, compared with what the device has free."""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig

from spin.config.schema import Config
from spin.data.examples import Dataset, Example
from spin.engines import memory
from spin.engines.device_memory import free_memory
from spin.models.policy import Policy, weight_files
from spin.runtime.process_group import ProcessGroup
from spin.runtime.tables import Rows


def check_run_memory(
    config: Config,
    start: Policy,
    data: Dataset,
    adapter_parameters: int | None,
    device: torch.device,
    dtype: torch.dtype,
    ranks: ProcessGroup,
) -> list[str]:
    """Return a line that says how much memory the run needs, and a warning if that may not fit.

    `adapter_parameters` is the size of the trained adapter, if there is one. Raises UserError if the run cannot fit.
    """
    base = start.base_or_self
    architecture = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    shape = memory.shape_of(architecture)
    if adapter_parameters is not None:
        shape = replace(shape, adapter=adapter_parameters, largest=min(shape.largest, adapter_parameters))
    load = load_of(config, data, base, device, dtype, ranks)

    def with_adapter() -> memory.Shape:
        return memory.shape_of(architecture, memory.RANK)

    line, warning = memory.check_memory(shape, load, free_memory(device, ranks.here), with_adapter)
    return [line, warning] if warning else [line]


def load_of(
    config: Config, data: Dataset, base: Policy, device: torch.device, dtype: torch.dtype, ranks: ProcessGroup
) -> memory.Load:
    """The sizes that decide a run's peak memory on one rank."""
    engine, generation = config.engine, config.generation
    new, is_on_cpu = config.max_new_tokens, device.type == "cpu"
    prompt = int(data.all.lengths("prompt_ids").max())

    def longest(examples: Rows[Example], num_answers: int) -> int:
        prompts, answers = examples.lengths("prompt_ids"), examples.lengths("real_ids")
        if engine.layout == "padded":  # a row for each answer
            return int(((1 + num_answers) * (prompts + np.maximum(answers, new))).max(initial=0))
        return int((prompts + answers + num_answers * new).max(initial=0))

    # An evaluation scores two generated answers to a prompt: the policy's and its opponent's.
    measured = data.held_out + data.validation
    train_row, held_out_row = longest(data.train, config.answers_per_prompt), longest(measured, 2)
    row = max(train_row, held_out_row)
    scored = max(len(data.train) * train_row, len(measured) * held_out_row)
    batch = max(engine.tokens_per_batch, train_row)
    items = -(-config.schedule.batch_size // ranks.size)  # of a step, on this rank
    answers = max(len(data.train) * generation.num_answers, len(measured))
    spread = None
    if engine.name == "deepspeed":
        spread = memory.Spread(ranks.size, engine.zero_stage, engine.offload_optimizer, is_on_cpu)
    return memory.Load(
        precision="fp32" if dtype == torch.float32 else "bf16",
        optimizer=config.optimizer.name,
        checkpointing=engine.gradient_checkpointing,
        quantization=base.quantization,
        training_tokens=min(batch, items * train_row),
        scoring_tokens=min(max(engine.tokens_per_batch, row), scored),
        row=row,
        head_chunk=engine.head_chunk,
        decoded=max(1, min(generation.batch_size, answers, generation.tokens // (prompt + new))),
        prompt=prompt,
        length=prompt + new,
        files=sum(path.stat().st_size for path in weight_files(base.folder)) if is_on_cpu else 0,
        plays=config.stage == "game",
        states=config.optimizer.states,
        passes=-(-items * train_row // batch),
        spread=spread,
    )
