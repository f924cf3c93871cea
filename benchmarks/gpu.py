"""The paper's step on one GPU: 64 pairs of UltraChat-like lengths through a Mistral-7B architecture with random weights.

    python benchmarks/gpu.py                           on the GPU that is there; without one as with --small
    python benchmarks/gpu.py --small                   a tiny model on the CPU: shows that the script runs, measures nothing

The paper reports 6.69 s to generate and 10 s to train for 64 examples on eight A100-80G (section 6.1). Here: full fine-tuning
with fp32-exact master weights (bf16 and the 16 bits that complete it), RMSprop with bf16 states, gradient checkpointing, the
whole batch in one packed pass. Printed as a table in markdown: seconds, peak memory, and the share of the card's own peak (a
large bf16 product, measured in the same run) that the useful FLOPs make up. To reach on one card of 80 GB: 10 s to train, at
45 % of its peak.

No GPU was at hand when this was written: what has been tried is `--small`, which goes through the same calls but for the
kernels of a GPU (FlexAttention in place of SDPA by sequence, whose mask the tests compare).
"""

import argparse
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.training import useful_flops  # noqa: E402
from benchmarks.workload import machine, peak_rate  # noqa: E402

# Medians in tokens of UltraChat's first rounds: prompt, answer; the opponent's answers end at 256.
PROMPT, ANSWER, NEW = 100, 300, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and short answers")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="training steps, of which the first is not counted")
    options = parser.parse_args()
    import torch

    small = options.small or not torch.cuda.is_available()
    device = torch.device("cpu" if small else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), device, options.pairs, options.steps, small)
    name = "a tiny model on the CPU: this shows that the script runs, and measures nothing"
    name = name if small else torch.cuda.get_device_name()
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {name}. {machine()}\n")
    print("| | seconds for the batch | peak memory, GiB | of the peak |\n|---|---|---|---|")
    for what, seconds, memory, share in rows:
        print(f"| {what} | {seconds:.2f} | {memory:.1f} | {share:.2f} |")


def measure(folder: Path, device, count: int, steps: int, small: bool) -> list[tuple[str, float, float, float]]:
    import torch

    from spin.config import schema
    from spin.engines.logps import choose_forward, compute_logps
    from spin.engines.single import SingleEngine
    from spin.generation.sampling import generate_answers
    from spin.method.pairs import as_continuations, with_opponent_logps
    from spin.method.training import train_spin
    from spin.models.load import load_model, load_tokenizer
    from spin.models.policy import Policy

    short = 16 if small else 1
    make_model(folder, device, small)
    pairs = make_pairs(count, short)
    tokens = sum(len(p.prompt_ids) + len(p.real_ids) + len(p.generated_ids) for p in pairs)
    settings = schema.EngineConfig.from_defaults(gradient_checkpointing=True, tokens_per_batch=tokens, head_chunk=8192)
    dtype = torch.float32 if small else torch.bfloat16
    peak = peak_rate(str(dtype).removeprefix("torch."), 256 if small else 8192, device=str(device))
    policy, rows = Policy("start", folder, "start"), []

    def clock(what: str, work, flops: float):
        memory_reset(device)
        started = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        rows.append((what, seconds, memory_peak(device), flops / seconds / peak))
        return found

    model, tokenizer = load_model(folder, dtype, device), load_tokenizer(folder)
    parameters = sum(p.numel() for p in model.parameters())
    examples = [example_of(pair) for pair in pairs]
    sampling = schema.GenerationConfig.from_defaults(batch_size=count)
    generate_answers(model, tokenizer, examples[:2], 1, sampling, 4, [], 0)
    flops = useful_flops(folder, pairs)
    clock(
        f"generation, {count} answers of {NEW // short} tokens",
        lambda: generate_answers(model, tokenizer, examples, 1, sampling, NEW // short, [], 0),
        2 * count * NEW // short * parameters,
    )
    items = as_continuations(pairs)
    longest = max(item.tokens for item in items)
    forward, remark = choose_forward(model, items, "auto", tokens, settings.head_chunk, longest)
    print(remark or f"log-probs: {forward.layout} rows, as fast as they go", file=sys.stderr)
    compute_logps(model, items, forward)
    scores = clock("scoring", lambda: compute_logps(model, items, forward), count * flops / 3)
    pairs = with_opponent_logps(pairs, scores.view(-1, 2))
    model.to("meta")  # out of memory: one model at a time
    engine = SingleEngine(policy, dtype, device, settings, schema.OptimizerConfig.from_defaults(states="bf16"))
    found: list[dict] = []
    memory_reset(device)
    common = {"lr": 5e-7, "epochs": steps, "batch_size": count, "warmup_ratio": 0.1, "seed": 0, "beta": 0.1}
    train_spin(engine, pairs, forward, link="logistic", log=found.append, **common)
    seconds = statistics.median(row["pairs"] / row["pairs_per_second"] for row in found[1:])
    rows.append(
        (f"training, {count} pairs, {tokens} tokens", seconds, memory_peak(device), count * flops / seconds / peak)
    )
    return rows


def make_model(folder: Path, device, small: bool) -> None:
    """Random weights in Mistral-7B's shapes (or tiny ones), and a tokenizer, as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from spin.models import tiny

    tiny.make_tiny_model(folder)  # for its tokenizer
    shape = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        if small
        else {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    )
    config = MistralConfig(
        **{"vocab_size": 1024, "num_key_value_heads": 4 if small else 8, **shape}, sliding_window=4096
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if small else torch.bfloat16)
    model.save_pretrained(folder)


def make_pairs(count: int, short: int) -> list:
    from spin.method.pairs import Pair

    rng = random.Random(0)

    def ids(median: int, most: int) -> tuple[int, ...]:
        length = min(most, max(2, round(rng.lognormvariate(0, 0.5) * median / short)))
        return tuple(rng.randrange(3, 1000) for _ in range(length))

    return [
        Pair(f"p{k}", "", "", "", "length", ids(PROMPT, 512), ids(ANSWER, 512), ids(10**6, NEW // short))
        for k in range(count)
    ]


def example_of(pair):
    from spin.data.examples import Example

    return Example(pair.id, "", pair.prompt_ids, "", pair.real_ids)


def memory_reset(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_peak(device) -> float:
    from spin.pipeline.stages import peak_memory_gib

    return peak_memory_gib()


if __name__ == "__main__":
    main()
