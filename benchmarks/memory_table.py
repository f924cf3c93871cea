"""Print which settings fit on which GPU: `python benchmarks/memory_table.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spin.engines.device_memory import GIB
from spin.engines.memory import RANK, Load, format_gib, peak, shape_of

CONTEXT = 0.6 * GIB  # of a GPU, taken by CUDA before any allocation
RESERVED = 0.05  # of a GPU, lost to the allocator's fragmentation
SIZES = (12, 16, 24, 40, 80, 141)  # GPU memory in GiB
# From the models' published configs; the 135M model is the embedded one.
MODELS: dict[str, dict[str, Any]] = {
    "135M (SmolLM2)": dict(vocab=49152, width=576, inner=1536, layers=30, heads=9, keys=3, tied=True),
    "1.7B (SmolLM2)": dict(vocab=49152, width=2048, inner=8192, layers=24, heads=32, keys=32, tied=True),
    "3B (Llama 3.2)": dict(vocab=128256, width=3072, inner=8192, layers=28, heads=24, keys=8, tied=True),
    "7B (Mistral, Zephyr)": dict(vocab=32000, width=4096, inner=14336, layers=32, heads=32, keys=8, tied=False),
    "8B (Llama 3.1)": dict(vocab=128256, width=4096, inner=14336, layers=32, heads=32, keys=8, tied=False),
    "14B (Qwen2.5)": dict(vocab=152064, width=5120, inner=13824, layers=48, heads=40, keys=8, tied=False),
    "70B (Llama 3.1)": dict(vocab=128256, width=8192, inner=28672, layers=80, heads=64, keys=8, tied=False),
}
# The lengths of the authors' script: prompts of 512 tokens, human answers of 512, and 256 generated tokens.
SETTINGS: dict[str, Any] = dict(
    precision="bf16",
    optimizer="rmsprop",
    checkpointing=False,
    quantization=None,
    training_tokens=2048,
    scoring_tokens=2048,
    row=1280,
    head_chunk=2048,
    decoded=16,
    prompt=512,
    length=768,
)
# Settings in the order of preference, as changes to `SETTINGS`, and whether an adapter is trained.
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"checkpointing": True},
    "full, checkpointing, 8-bit states": {"checkpointing": True, "optimizer": "rmsprop8bit"},
    "LoRA": {"adapter": True},
    "LoRA, checkpointing": {"adapter": True, "checkpointing": True},
    "LoRA on nf4, checkpointing": {"adapter": True, "checkpointing": True, "quantization": "nf4"},
}


def ways_of(ranks: int) -> dict[str, dict[str, Any]]:
    """Return `WAYS`, or the settings for several GPUs. Generation and scoring need the whole policy on each GPU."""
    if ranks == 1:
        return WAYS
    two, three = {"zero_stage": 2, "ranks": ranks}, {"zero_stage": 3, "ranks": ranks}
    return {
        "ZeRO 2": two,
        "ZeRO 2, checkpointing": {**two, "checkpointing": True},
        "ZeRO 3": three,
        "ZeRO 3, checkpointing": {**three, "checkpointing": True},
        "ZeRO 3, checkpointing, offload": {**three, "checkpointing": True, "offload": True},
        "LoRA, ZeRO 3, checkpointing": {**three, "checkpointing": True, "adapter": True},
    }


def architecture_of(vocab: int, width: int, inner: int, layers: int, heads: int, keys: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=tied,
    )


def table(models: Sequence[str], sizes: Sequence[int], ranks: int = 1) -> list[list[str]]:
    """Return a header, and a row for each model: for each GPU size, the first setting that fits on `ranks` such GPUs, and its
    peak on one of them in GiB."""
    rows = [["model", *(f"{f'{ranks} × ' if ranks > 1 else ''}{size} GiB" for size in sizes)]]
    for name in models:
        architecture = architecture_of(**MODELS[name])
        shapes = {False: shape_of(architecture), True: shape_of(architecture, RANK)}
        peaks = {}
        for way, settings in ways_of(ranks).items():
            changes = {key: value for key, value in settings.items() if key != "adapter"}
            load = Load(shapes["adapter" in settings], **{**SETTINGS, **changes})
            peaks[way] = peak(load)
        cells = []
        for size in sizes:
            fitting = [
                way for way, size_of_way in peaks.items() if size_of_way + CONTEXT <= size * GIB * (1 - RESERVED)
            ]
            cells.append(f"{fitting[0]} ({format_gib(peaks[fitting[0]])})" if fitting else "more GPUs")
        rows.append([name, *cells])
    return rows


def main(arguments: list[str]) -> None:
    """`python benchmarks/memory_table.py [--sizes 24 80] [--ranks 8]`."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/memory_table.py",
        description="Print for each model and GPU size the first setting that fits, and its peak in GiB, for bf16, RMSprop, "
        "pairs of up to 1,280 tokens, 2,048 tokens per batch, and batches of 16 prompts in generation.",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="GIB", help="GPU sizes in GiB")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="GPUS", help="GPUs that train together (engine=deepspeed)"
    )
    options = parser.parse_args(arguments)
    if min(options.sizes) < 1 or options.ranks < 1:
        sys.exit("error: --sizes and --ranks must be 1 or more.")
    for number, row in enumerate(table(list(MODELS), options.sizes, options.ranks)):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|" + "---|" * len(row))


if __name__ == "__main__":
    main(sys.argv[1:])
