"""Measure variants of the paper's step on one GPU: 64 pairs of UltraChat-like lengths, Mistral-7B with random weights.

    python benchmarks/gpu.py --minutes 25              on the GPU; without a GPU, the same as --small
    python benchmarks/gpu.py --small                   a tiny model on the CPU, to check that the script runs
    python benchmarks/gpu.py --only training compile   some of the parts; --list names all

The paper reports 6.69 s to generate and 10 s to train for 64 examples on eight A100-80G (section 6.1). This benchmark uses
full fine-tuning with fp32-exact master weights, RMSprop with bf16 states, gradient checkpointing, and the whole batch in one
packed pass. The target on one 80 GB GPU is to train in 8 s, at 45 % of the GPU's peak.

Each part runs in its own process, writes its output to <logs>/<part>.log, and needs no network. A part that fails or
has no time left is skipped, and the reason is printed. Prints a markdown table: seconds, peak memory, and the useful FLOPs
as a share of the peak rate of a large product, measured in the same process.
"""

import argparse
import functools
import json
import os
import random
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload
from benchmarks.training import useful_flops

# Median lengths in tokens of prompts and answers in UltraChat's first rounds, and the maximum length of generated answers.
PROMPT, ANSWER, NEW = 100, 300, 256
SMALL_DIVISOR = 16  # all lengths are divided by this with --small
# The kind of each part, and its changes from the settings of the part "training".
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "device-tests": ("tests", {}),
    "training": ("training", {}),
    "generation": ("generation", {}),
    "scoring": ("scoring", {}),
    "compile": ("training", {"engine": {"compile": True}}),
    "triton-attention": ("training", {"kernel": {"BACKEND": "TRITON"}}),
    "fa4-attention": ("training", {"kernel": {"BACKEND": "FLASH"}}),
    "full-blocks": ("training", {"full_blocks": True}),
    "head-of-2048": ("training", {"engine": {"head_chunk": 2048}}),
    "head-at-once": ("training", {"engine": {"head_chunk": 10**6}}),
    "8-bit-states": ("training", {"optimizer": {"name": "rmsprop8bit", "states": "fp32"}}),
    "no-checkpointing": ("training", {"engine": {"gradient_checkpointing": False, "tokens_per_batch": 8192}}),
    "vllm": ("vllm", {}),
    "default-game": ("game", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="time limit for all parts")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--small", action="store_true", help="use a tiny model and short answers")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="training steps; the first is not counted")
    parser.add_argument("--logs", type=Path, default=workload.ROOT / "outputs" / "benchmarks" / "gpu")
    parser.add_argument("--vllm", default=sys.executable, help="Python interpreter with vLLM")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(PARTS))
        return
    import torch

    options.small = options.small or not torch.cuda.is_available()
    device = torch.device("cpu" if options.small else "cuda")
    if options.part:
        print(json.dumps(measure(options, device)))
        return
    options.logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", device, options.small)
        results = {part: run_part(part, options, Path(folder), end) for part in options.only}
    name = (
        "a tiny model on the CPU, which only checks that the script runs"
        if options.small
        else torch.cuda.get_device_name()
    )
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {name}. {workload.describe_machine()}\n")
    print("| | seconds for the batch | peak memory, GiB | of the peak |\n|---|---|---|---|")
    for part, result in results.items():
        if isinstance(result, dict):
            share = f"{result['share']:.2f}" if result["share"] else "–"
            memory = f"{result['memory']:.1f}" if result["memory"] else "–"
            print(f"| {part}: {result['text']} | {result['seconds']:.3g} | {memory} | {share} |")
    for part, result in results.items():
        if isinstance(result, str):
            print(f"\n{part}: skipped, {result}; see {options.logs / part}.log")


def run_part(part: str, options: argparse.Namespace, folder: Path, end: float) -> dict | str:
    """Measure a part in a new process. Returns its numbers, or the reason why it was skipped."""
    seconds_left = end - time.monotonic()
    if seconds_left < 20:
        return f"no time is left of {options.minutes:g} minutes"
    words = [f"--pairs={options.pairs}", f"--steps={options.steps}", f"--vllm={options.vllm}", f"--folder={folder}"]
    command = [sys.executable, __file__, "--part", part, *words, *["--small"] * options.small]
    with (options.logs / f"{part}.log").open("w") as log:
        print(shlex.join(command), file=log, flush=True)
        started = time.monotonic()
        try:
            status, output = run_in_group(command, log, seconds_left)
        except subprocess.TimeoutExpired:
            return f"it takes more than the remaining {seconds_left:.0f} s"
        log.write(output)
    print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    lines = (options.logs / f"{part}.log").read_text().splitlines()
    return json.loads(lines[-1]) if status == 0 else lines[-1][:200]


def run_in_group(command: list[str], log: IO[str], timeout: float) -> tuple[int, str]:
    """Return a command's exit status and output. If it takes longer, its processes are ended with it."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=workload.ROOT, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:  # TimeoutExpired, or an interruption, which does not reach the new session
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


def measure(options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Measure one part in this process. Returns `text`, `seconds`, `memory` in GiB, and `share` of the peak rate.

    `memory` and `share` are 0 if they are not measured: vLLM's processes allocate the memory that they may use.
    """
    kind, changes = PARTS[options.part]
    if kind == "tests":
        words = ["tests/engines/test_device.py", "-m", "not slow" if options.small else "slow or not slow"]
        return command_seconds([sys.executable, "-m", "pytest", "-q", *words], "the tests that need the device")
    if kind == "game":
        words = ["experiment=smoke"] if options.small else ["evaluation.bootstrap=200"]
        words += [
            f"store.path={options.folder}/store",
            f"hydra.run.dir={options.folder}/run",
            "tracking.wandb=disabled",
        ]
        return command_seconds([sys.executable, "run.py", *words], f"python run.py {words[0]}")
    from spin.engines.device_memory import peak_memory_gib

    pairs = make_pairs(options.pairs, SMALL_DIVISOR if options.small else 1)
    dtype = "float32" if options.small else "bfloat16"
    reset_peak(device)
    text, seconds, flops = {
        "training": measure_training,
        "scoring": measure_scoring,
        "generation": measure_generation,
        "vllm": measure_vllm,
    }[kind](options, device, dtype, pairs, changes)
    memory = 0 if kind == "vllm" else peak_memory_gib()
    peak = workload.peak_rate(dtype, 256 if options.small else 8192, device=str(device))
    return {"text": text, "seconds": seconds, "memory": memory, "share": flops / seconds / peak}


def command_seconds(command: list[str], text: str) -> dict[str, Any]:
    """Time a command and write its output to the log. If it fails, this process ends with its exit status.

    `memory` is the peak resident memory of the largest of its processes.
    """
    done, seconds = workload.timed(lambda: subprocess.run(command, stdout=sys.stderr, cwd=workload.ROOT))
    if done.returncode:
        sys.exit(done.returncode)
    return {
        "text": text,
        "seconds": seconds,
        "memory": workload.resident_peak_gib(resource.RUSAGE_CHILDREN),
        "share": 0,
    }


Measured = tuple[str, float, float]  # description, seconds, useful FLOPs


def measure_training(options: argparse.Namespace, device: Any, dtype: str, pairs: list, changes: dict) -> Measured:
    import torch

    from spin.config.schema import OptimizerConfig
    from spin.engines.single import SingleEngine
    from spin.method.pairs import to_continuations
    from spin.models.load import load_model
    from spin.models.policy import Policy

    folder, settings = options.folder / "model", engine_settings(pairs, **changes.get("engine", {}))
    change_attention(changes)
    model = load_model(folder, getattr(torch, dtype), device)
    forward = workload.find_forward(model, to_continuations(pairs), settings)
    references = workload.score_pairs(model, pairs, forward)
    model.to("meta")  # frees its memory
    optimizer = OptimizerConfig.from_defaults(**{"states": "bf16", **changes.get("optimizer", {})})
    engine = SingleEngine(Policy("start", folder, "start"), getattr(torch, dtype), device, settings, optimizer)
    reset_peak(device)
    metrics = workload.train_pairs(engine, pairs, references, forward, len(pairs), options.steps)
    print(json.dumps(metrics), file=sys.stderr)
    seconds = statistics.median(workload.step_seconds(row) for row in metrics[1:])
    return f"{len(pairs)} pairs, {num_tokens(pairs)} tokens", seconds, len(pairs) * useful_flops(folder, pairs)


def measure_scoring(options: argparse.Namespace, device: Any, dtype: str, pairs: list, changes: dict) -> Measured:
    import torch

    from spin.method.pairs import to_continuations
    from spin.models.load import load_model

    folder = options.folder / "model"
    model = load_model(folder, getattr(torch, dtype), device)
    forward = workload.find_forward(model, to_continuations(pairs), engine_settings(pairs))
    workload.score_pairs(model, pairs, forward)  # warm-up
    reset_peak(device)
    _, seconds = workload.timed(lambda: workload.score_pairs(model, pairs, forward))
    return f"{len(pairs)} pairs", seconds, len(pairs) * useful_flops(folder, pairs) / 3


def measure_generation(options: argparse.Namespace, device: Any, dtype: str, pairs: list, changes: dict) -> Measured:
    import torch

    from spin.config.schema import GenerationConfig
    from spin.data.examples import Example
    from spin.generation.answers import AnswerRequest
    from spin.generation.sampling import generate_answers
    from spin.models.load import load_model, load_tokenizer

    folder, new = options.folder / "model", NEW // (SMALL_DIVISOR if options.small else 1)
    model, tokenizer = load_model(folder, getattr(torch, dtype), device), load_tokenizer(folder)
    examples = [Example(pair.id, "", pair.prompt_ids, "", pair.real_ids) for pair in pairs]
    sampling = GenerationConfig.from_defaults(batch_size=len(pairs))
    generate_answers(model, AnswerRequest(tokenizer, examples[:2], sampling, 4, [], 0))  # warm-up
    reset_peak(device)
    request = AnswerRequest(tokenizer, examples, sampling, new, [], 0)
    _, seconds = workload.timed(lambda: generate_answers(model, request))
    flops = 2 * len(pairs) * new * sum(weight.numel() for weight in model.parameters())
    return f"{len(pairs)} answers of {new} tokens", seconds, flops


def measure_vllm(options: argparse.Namespace, device: Any, dtype: str, pairs: list, changes: dict) -> Measured:
    import torch

    from benchmarks.generation import vllm

    folder, new = options.folder / "model", NEW // (SMALL_DIVISOR if options.small else 1)
    prompts = [list(pair.prompt_ids) for pair in pairs]
    longest = max(map(len, prompts)) + new
    with vllm(folder, getattr(torch, dtype), [], options.vllm, longest) as answer:
        answer(prompts[:2], 4)  # warm-up
        answers, seconds = workload.timed(lambda: answer(prompts, new))
    return f"{len(pairs)} answers, {sum(map(len, answers))} tokens", seconds, 0


def engine_settings(pairs: list, **changes: Any) -> Any:
    from spin.config.schema import EngineConfig

    settings = {"gradient_checkpointing": True, "tokens_per_batch": num_tokens(pairs), "head_chunk": 8192}
    return EngineConfig.from_defaults(**{**settings, **changes})


def change_attention(changes: dict) -> None:
    """Patch FlexAttention: `kernel` passes options to its kernel, `full_blocks` marks the blocks that need no mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    from spin.engines import attention, logps

    if "kernel" in changes:
        forward = attention.flex_attention_forward
        attention.flex_attention_forward = functools.partial(forward, kernel_options=changes["kernel"])
    if "full_blocks" in changes:
        block_mask = logps.block_mask

        def with_full_blocks(table: Any, length: int) -> Any:
            mask = block_mask(table, length).mask_mod
            return create_block_mask(mask, None, None, length, length, device=table.device, BLOCK_SIZE=logps.FLEX_BLOCK)

        logps.block_mask = with_full_blocks


def num_tokens(pairs: list) -> int:
    return sum(len(p.prompt_ids) + len(p.real_ids) + len(p.generated_ids) for p in pairs)


def make_model(folder: Path, device: Any, small: bool) -> None:
    """Write a model folder with random weights of Mistral-7B's shapes, or tiny ones, and a tokenizer."""
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
    del model
    reset_peak(device)


def make_pairs(count: int, divisor: int) -> list:
    """Return pairs of random tokens with the length distribution of UltraChat, divided by `divisor`."""
    from spin.method.pairs import Pair

    rng = random.Random(0)

    def ids(median: int, longest: int) -> tuple[int, ...]:
        length = min(longest, max(2, round(rng.lognormvariate(0, 0.5) * median / divisor)))
        return tuple(rng.randrange(3, 1000) for _ in range(length))

    return [
        Pair(f"p{k}", "", "", "", "length", ids(PROMPT, 512), ids(ANSWER, 512), ids(10**6, NEW // divisor))
        for k in range(count)
    ]


def reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
