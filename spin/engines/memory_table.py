"""`python -m spin memory`: which settings fit which card."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import LlamaConfig

from spin.engines.memory import CONTEXT, GIB, RANK, RESERVED, Load, Shape, Spread, _gib, shape_of, stages

# --- which settings fit which card ------------------------------------------------------------------------------------

CARDS = (12, 16, 24, 40, 80, 141)  # GiB
# As their makers publish them, but for the 135M model's, which is the embedded one's.
MODELS: dict[str, dict[str, Any]] = {
    "135M (SmolLM2)": dict(vocab=49152, width=576, inner=1536, layers=30, heads=9, keys=3, tied=True),
    "1.7B (SmolLM2)": dict(vocab=49152, width=2048, inner=8192, layers=24, heads=32, keys=32, tied=True),
    "3B (Llama 3.2)": dict(vocab=128256, width=3072, inner=8192, layers=28, heads=24, keys=8, tied=True),
    "7B (Mistral, Zephyr)": dict(vocab=32000, width=4096, inner=14336, layers=32, heads=32, keys=8, tied=False),
    "8B (Llama 3.1)": dict(vocab=128256, width=4096, inner=14336, layers=32, heads=32, keys=8, tied=False),
    "14B (Qwen2.5)": dict(vocab=152064, width=5120, inner=13824, layers=48, heads=40, keys=8, tied=False),
    "70B (Llama 3.1)": dict(vocab=128256, width=8192, inner=28672, layers=80, heads=64, keys=8, tied=False),
}
# The lengths of the authors' script: 1,024 tokens of prompt and answer, of which 512 and 256 new ones.
TABLE_LOAD = Load(
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
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"checkpointing": True},
    "full, checkpointing, 8-bit states": {"checkpointing": True, "optimizer": "rmsprop8bit"},
    "LoRA": {"adapter": True},
    "LoRA, checkpointing": {"adapter": True, "checkpointing": True},
    "LoRA on nf4, checkpointing": {"adapter": True, "checkpointing": True, "quantization": "nf4"},
}


def _ways_of(ranks: int) -> dict[str, dict[str, Any]]:
    """What `WAYS` is for several cards. A policy that is generated with or scored is whole on each."""
    found = {}
    for stage in (2, 3):
        for checkpointing in (False, True):
            name = f"ZeRO {stage}{', checkpointing' * checkpointing}"
            found[name] = {"spread": Spread(ranks, stage), "checkpointing": checkpointing}
    found["ZeRO 3, checkpointing, offload"] = {"spread": Spread(ranks, 3, offload=True), "checkpointing": True}
    found["LoRA, ZeRO 3, checkpointing"] = {"spread": Spread(ranks, 3), "checkpointing": True, "adapter": True}
    return found


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


def peak_of(shapes: tuple[Shape, Shape], way: dict[str, Any]) -> float:
    """Bytes that a model, (without, with an adapter), needs in one of the `WAYS`."""
    settings = dict(way)
    shape = shapes[settings.pop("adapter", False)]
    return stages(shape, replace(TABLE_LOAD, **settings))[0].total


def table(models: Sequence[str], cards: Sequence[int], ranks: int = 1) -> list[list[str]]:
    """For every model and card, of which there are `ranks`, the first of the `WAYS` (of `_ways_of`) that fits, with its peak
    in GiB; the header first."""
    number = f"{ranks} × " if ranks > 1 else ""
    rows = [["model", *(f"{number}{card} GiB" for card in cards)]]
    ways = WAYS if ranks == 1 else _ways_of(ranks)
    for name in models:
        architecture = architecture_of(**MODELS[name])
        shapes = shape_of(architecture), shape_of(architecture, RANK)
        peaks = {way: peak_of(shapes, settings) for way, settings in ways.items()}
        cells = []
        for card in cards:
            fitting = [way for way, peak in peaks.items() if peak + CONTEXT <= card * GIB * (1 - RESERVED)]
            cells.append(
                f"{fitting[0]} ({_gib(peaks[fitting[0]])})" if fitting else ("several cards" if ranks == 1 else "more")
            )
        rows.append([name, *cells])
    return rows


def main(arguments: list[str]) -> None:
    """`python -m spin memory [--cards 24 80] [--ranks 8]`."""
    parser = argparse.ArgumentParser(prog="python -m spin memory", description=main_help())
    parser.add_argument("--cards", type=int, nargs="+", default=list(CARDS), metavar="GIB", help="cards, by their GiB")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="CARDS", help="so many cards together (engine=deepspeed)"
    )
    given = parser.parse_args(arguments)
    if min(given.cards) < 1 or given.ranks < 1:
        sys.exit("error: --cards takes GiB of 1 or more, --ranks 1 card or more.")
    for number, row in enumerate(table(list(MODELS), given.cards, given.ranks)):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|" + "---|" * len(row))


def main_help() -> str:
    return (
        "Which settings fit which card: for every model the first that does, and the GiB that it needs at its peak. bf16, "
        "RMSprop, pairs of up to 1,280 tokens, 2,048 in a batch, 16 prompts decoded together."
    )
