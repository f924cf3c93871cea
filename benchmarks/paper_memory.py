"""What the paper's run needs of memory, and how the sizes in conf/experiment/paper*.yaml were found.

    python benchmarks/paper_memory.py

Nothing is downloaded or loaded: the 7B model is counted by its architecture, and prompts and answers are as long as the
recipe lets them be. That is more than the run itself says, which knows its longest ones.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from transformers import MistralConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import spin.config.hydra  # noqa: E402, F401  # registers the resolvers that conf/ uses
from spin.engines.device_memory import GIB  # noqa: E402
from spin.engines.memory import CONTEXT, RESERVED, Load, Needed, Spread, generating, scoring, shape_of, training  # noqa: E402

USABLE = 80 * GIB * (1 - RESERVED) - CONTEXT
# Zephyr's, as its config.json has it.
ZEPHYR = MistralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)

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


def stages(experiment: str, words: Sequence[str], ranks: int) -> list[Needed]:
    """Training, scoring and generating: bytes on each card."""
    config = compose("config", [f"experiment={experiment}", *words])
    data, engine, generation, schedule = config.data, config.engine, config.generation, config.schedule
    prompt, new = data.max_prompt_length, generation.max_new_tokens
    # As spin/stages.py: the longest prompt and human answer, and a generated one.
    row = data.max_length + new
    batch = max(engine.tokens_per_batch, row)
    load = Load(
        precision=engine.precision,
        optimizer=config.optimizer.name,
        checkpointing=engine.gradient_checkpointing,
        quantization=None,
        training_tokens=batch,
        scoring_tokens=batch,
        row=row,
        head_chunk=engine.head_chunk,
        decoded=min(generation.batch_size, generation.tokens // (prompt + new)),
        prompt=prompt,
        length=prompt + new,
        states=config.optimizer.states,
        passes=-(-schedule.batch_size * row // (ranks * batch)),
        spread=Spread(ranks, engine.zero_stage, engine.offload_optimizer) if engine.name == "deepspeed" else None,
    )
    shape = shape_of(ZEPHYR)
    return [training(shape, load), scoring(shape, load), generating(shape, load)]


def table() -> tuple[list[str], list[tuple[str, Needed]]]:
    """Lines in markdown, one a case, and of the recipes as they are the parts of each stage."""
    lines, details = [], []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for experiment, (ranks, changes) in CASES.items():
            for change in changes:
                found = stages(experiment, change.split(), ranks)
                cells = " | ".join(f"{one.total / GIB:.1f}" for one in found)
                fits = "yes" if max(one.total for one in found) <= USABLE else "no"
                changed = f"`{change}`" if change else "nothing"
                lines.append(f"| {'one card' if ranks == 1 else f'{ranks} cards'} | {changed} | {cells} | {fits} |")
                if not change:
                    details += [(experiment, one) for one in found]
    return lines, details


def main() -> None:
    lines, details = table()
    print("| run | changed | training | scoring | generating | fits |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"\nGiB on each card; {USABLE / GIB:.1f} of 80 can be used. Of which:\n")
    for experiment, one in details:
        print(
            f"{experiment}, {one.stage}: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in one.parts.items())
        )


if __name__ == "__main__":
    main()
