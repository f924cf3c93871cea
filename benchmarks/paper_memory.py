"""Estimate the memory of the paper's run, for the sizes in conf/experiment/paper*.yaml.

    python benchmarks/paper_memory.py

Nothing is downloaded or loaded: the estimate uses the architecture of the 7B model, and the longest prompts and answers that
the recipe allows. A real run uses its actual longest prompts and answers, so its estimate is lower.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory_table import CONTEXT, RESERVED
from spin.config.hydra import load
from spin.data.examples import Dataset, Example
from spin.engines import memory
from spin.engines.device_memory import GIB
from spin.models.policy import Policy
from spin.runtime.process_group import ProcessGroup
from spin.runtime.tables import Rows

USABLE = 80 * GIB * (1 - RESERVED) - CONTEXT
ZEPHYR = MistralConfig()  # the defaults equal Zephyr's config.json
EXAMPLES = 50_000  # per iteration in the paper

# Experiments: the number of GPUs, and the changes to compare.
CASES: dict[str, tuple[int, list[str]]] = {
    "paper": (
        8,
        [
            "",
            "engine.tokens_per_batch=16384",
            "engine.tokens_per_batch=16384 engine.gradient_checkpointing=true",
            "generation.batch_size=256 generation.tokens=327680",
        ],
    ),
    "paper_one_gpu": (
        1,
        [
            "",
            "optimizer.states=fp32",
            "optimizer=rmsprop8bit",
            "engine.gradient_checkpointing=false",
            "engine.tokens_per_batch=16384",
        ],
    ),
}


def needed(experiment: str, words: list[str], gpus: int) -> dict[str, memory.Parts]:
    """Return the memory of training, scoring and generation on each GPU."""
    config = load(f"experiment={experiment}", *words)
    prompt = config.data.max_prompt_length
    longest = Example("longest", "", (0,) * prompt, "", (0,) * (config.data.max_length - prompt))
    examples, none = Rows.of(Example, [longest]).at(np.zeros(EXAMPLES, int)), Rows.of(Example, [])
    data = Dataset(examples, none, {}, 0, none, end=0)
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    model = Policy("zephyr", Path(), "")
    shape = memory.shape_of(ZEPHYR)
    load_on_gpu = memory.load_of(shape, config, data, model, torch.device("cuda"), dtype, ProcessGroup(size=gpus))
    stages = memory.stages(load_on_gpu)
    return {stage: stages[stage] for stage in ("training", "scoring", "generating")}


def table() -> tuple[list[str], list[tuple[str, dict[str, memory.Parts]]]]:
    """Return one markdown line for each case, and the stages of each unchanged experiment."""
    lines, details = [], []
    for experiment, (gpus, changes) in CASES.items():
        for change in changes:
            stages = needed(experiment, change.split(), gpus)
            totals = [memory.total(parts) for parts in stages.values()]
            cells = " | ".join(f"{size / GIB:.1f}" for size in totals)
            fits = "yes" if max(totals) <= USABLE else "no"
            run, changed = ("1 GPU" if gpus == 1 else f"{gpus} GPUs"), (f"`{change}`" if change else "nothing")
            lines.append(f"| {run} | {changed} | {cells} | {fits} |")
            if not change:
                details.append((experiment, stages))
    return lines, details


def main() -> None:
    lines, details = table()
    print("| run | changed | training | scoring | generating | fits |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"\nGiB on each GPU; {USABLE / GIB:.1f} of 80 are usable. In detail:\n")
    for experiment, stages in details:
        for stage, parts in stages.items():
            sizes = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
            print(f"{experiment}, {stage}: {sizes}")


if __name__ == "__main__":
    main()
