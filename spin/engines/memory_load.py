"""The sizes of a run that decide how much memory it needs."""

import numpy as np
import torch

from spin.config.schema import Config
from spin.data.examples import Dataset, Example
from spin.engines.memory import Load, Shape
from spin.models.policy import Policy, weight_files
from spin.runtime.process_group import ProcessGroup
from spin.runtime.tables import Rows


def load_of(
    shape: Shape,
    config: Config,
    data: Dataset,
    base: Policy,
    device: torch.device,
    dtype: torch.dtype,
    ranks: ProcessGroup,
) -> Load:
    """Return the sizes that decide a run's peak memory on one rank."""
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
    return Load(
        shape,
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
        trains=config.stage == "game",
        states=config.optimizer.states,
        passes=-(-items * train_row // batch),
        zero_stage=engine.zero_stage if engine.name == "deepspeed" else None,
        ranks=ranks.size,
        offload=engine.offload_optimizer,
        on_cpu=is_on_cpu,
    )
