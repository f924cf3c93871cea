"""The memory that a run's settings and data ask for, compared with what the device has free."""

import torch
from transformers import AutoConfig

from spin.config.schema import Config
from spin.data.examples import Dataset
from spin.engines import memory
from spin.engines.device_memory import free_memory
from spin.models.policy import Policy, weight_files
from spin.runtime.process_group import ProcessGroup


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
        shape = memory.with_adapter(shape, adapter_parameters)
    load = load_of(config, data, base, device, dtype, ranks)

    def with_adapter() -> memory.Shape:
        return memory.shape_of(architecture, memory.RANK)

    line, warning = memory.check_memory(shape, load, free_memory(device, ranks.here), with_adapter)
    return [line, warning] if warning else [line]


def load_of(
    config: Config, data: Dataset, base: Policy, device: torch.device, dtype: torch.dtype, ranks: ProcessGroup
) -> memory.Load:
    """The sizes that decide a run's peak memory on one rank."""
    examples, engine = [*data.train, *data.held_out], config.engine
    new, answers = config.max_new_tokens, config.generation.num_answers
    is_padded = engine.layout == "padded"
    prompt = max(len(e.prompt_ids) for e in examples)
    # A packed row has the prompt once with all of its answers; in padded rows every answer has its own prompt.
    row = max(
        len(e.prompt_ids) + (max(len(e.real_ids), new) if is_padded else len(e.real_ids) + answers * new)
        for e in examples
    )
    item = (1 + answers) * row if is_padded else row
    batch = max(engine.tokens_per_batch, row)
    prompts = -(-config.schedule.batch_size // ranks.size)  # of a step, on this rank
    on_cpu = device.type == "cpu"
    spread = None
    if engine.name == "deepspeed":
        spread = memory.Spread(ranks.size, engine.zero_stage, engine.offload_optimizer and not on_cpu)
    rows_that_fit = config.generation.tokens // (prompt + new)
    return memory.Load(
        precision="fp32" if dtype == torch.float32 else "bf16",
        optimizer=config.optimizer.name,
        checkpointing=engine.gradient_checkpointing,
        quantization=base.quantization,
        training_tokens=min(batch, max(row, prompts * item)),
        scoring_tokens=min(batch, max(row, len(examples) * item)),
        row=row,
        head_chunk=engine.head_chunk,
        decoded=max(1, min(config.generation.batch_size, answers * len(examples), rows_that_fit)),
        prompt=prompt,
        length=prompt + new,
        files=sum(path.stat().st_size for path in weight_files(base.folder)) if on_cpu else 0,
        plays=config.stage == "game",
        states=config.optimizer.states,
        passes=-(-prompts * item // batch),
        mask=max(engine.tokens_per_row, row) if engine.layout == "masked" else 0,
        spread=spread,
    )
