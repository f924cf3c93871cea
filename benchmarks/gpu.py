"""The paper's step on one GPU: 64 pairs of UltraChat-like lengths through a Mistral-7B architecture with random weights.

    python benchmarks/gpu.py                           on the GPU, or as with --small if there is none
    python benchmarks/gpu.py --small                   a tiny model on the CPU: checks that the script runs

The paper reports 6.69 s to generate and 10 s to train for 64 examples on eight A100-80G (section 6.1). Here: full fine-tuning
with fp32-exact master weights, RMSprop with bf16 states, gradient checkpointing, the whole batch in one packed pass. The
targets on one 80 GB GPU are 10 s to train, at 45 % of the GPU's peak.

Prints a markdown table: seconds, peak memory, and the useful FLOPs as a share of the peak rate of a large product,
measured in the same run.
"""

import argparse
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload
from benchmarks.training import useful_flops

# Medians in tokens of UltraChat's first rounds: prompt, answer. The opponent's answers end at 256.
PROMPT, ANSWER, NEW = 100, 300, 256
SMALL_DIVISOR = 16  # of all lengths with --small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and short answers")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="training steps; the first is not counted")
    options = parser.parse_args()
    import torch

    small = options.small or not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), torch.device("cpu" if small else "cuda"), options.pairs, options.steps, small)
    name = "a tiny model on the CPU, which only checks that the script runs" if small else torch.cuda.get_device_name()
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {name}. {workload.describe_machine()}\n")
    print("| | seconds for the batch | peak memory, GiB | of the peak |\n|---|---|---|---|")
    for part, seconds, memory, share in rows:
        print(f"| {part} | {seconds:.3g} | {memory:.1f} | {share:.2f} |")


def measure(folder: Path, device: Any, count: int, steps: int, small: bool) -> list[tuple[str, float, float, float]]:
    """Rows of the table: what was measured, seconds, peak memory in GiB, share of the peak rate."""
    import torch

    from spin.config.schema import EngineConfig, GenerationConfig, OptimizerConfig
    from spin.data.examples import Example
    from spin.engines.device_memory import peak_memory_gib
    from spin.engines.single import SingleEngine
    from spin.generation.sampling import generate_answers
    from spin.method.pairs import to_continuations
    from spin.models.load import load_model, load_tokenizer
    from spin.models.policy import Policy

    make_model(folder, device, small)
    divisor = SMALL_DIVISOR if small else 1
    pairs, new = make_pairs(count, divisor), NEW // divisor
    tokens = sum(len(p.prompt_ids) + len(p.real_ids) + len(p.generated_ids) for p in pairs)
    settings = EngineConfig.from_defaults(gradient_checkpointing=True, tokens_per_batch=tokens, head_chunk=8192)
    dtype = torch.float32 if small else torch.bfloat16
    peak = workload.peak_rate(str(dtype).removeprefix("torch."), 256 if small else 8192, device=str(device))
    rows = []

    def measure_part(part: str, work: Callable[[], Any], flops: float) -> Any:
        reset_peak(device)
        result, seconds = workload.timed(lambda: (work(), synchronize(device))[0])
        rows.append((part, seconds, peak_memory_gib(), flops / seconds / peak))
        return result

    model, tokenizer = load_model(folder, dtype, device), load_tokenizer(folder)
    examples = [Example(pair.id, "", pair.prompt_ids, "", pair.real_ids) for pair in pairs]
    sampling = GenerationConfig.from_defaults(batch_size=count)
    generate_answers(model, tokenizer, examples[:2], 1, sampling, 4, [], 0)  # warm-up
    parameters, flops = sum(p.numel() for p in model.parameters()), count * useful_flops(folder, pairs)
    measure_part(
        f"generation, {count} answers of {new} tokens",
        lambda: generate_answers(model, tokenizer, examples, 1, sampling, new, [], 0),
        2 * count * new * parameters,
    )
    forward = workload.find_forward(model, to_continuations(pairs), settings)
    workload.score_pairs(model, pairs, forward)  # warm-up
    references = measure_part("scoring", lambda: workload.score_pairs(model, pairs, forward), flops / 3)

    model.to("meta")  # frees its memory
    optimizer = OptimizerConfig.from_defaults(states="bf16")
    engine = SingleEngine(Policy("start", folder, "start"), dtype, device, settings, optimizer)
    reset_peak(device)
    metrics = workload.train_pairs(engine, pairs, references, forward, count, steps)
    seconds = statistics.median(workload.step_seconds(row) for row in metrics[1:])
    rows.append((f"training, {count} pairs, {tokens} tokens", seconds, peak_memory_gib(), flops / seconds / peak))
    return rows


def make_model(folder: Path, device: Any, small: bool) -> None:
    """Write a model folder with random weights in Mistral-7B's shapes, or tiny ones, and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from spin.models import tiny

    tiny.make_tiny_model(folder)  # for its tokenizer
    if small:
        shape = {
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
    else:
        shape = {"num_key_value_heads": 8}  # the defaults are Mistral-7B's
    config = MistralConfig(**shape, sliding_window=4096)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if small else torch.bfloat16)
    model.save_pretrained(folder)


def make_pairs(count: int, divisor: int) -> list:
    """Pairs of random tokens, their lengths spread as those of UltraChat and divided by `divisor`."""
    from spin.method.pairs import Pair

    rng = random.Random(0)

    def ids(median: int, longest: int) -> tuple[int, ...]:
        length = min(longest, max(2, round(rng.lognormvariate(0, 0.5) * median / divisor)))
        return tuple(rng.randrange(3, 1000) for _ in range(length))

    return [
        Pair(f"p{k}", "", "", "", "length", ids(PROMPT, 512), ids(ANSWER, 512), ids(10**6, NEW // divisor))
        for k in range(count)
    ]


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: Any) -> None:
    import torch

    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
