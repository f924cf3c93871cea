"""Measure how costs grow: scoring, training and generation with 1, 2 and 4 times the number and length of answers, and the
rate of a training step from one process to two.

    python benchmarks/growth.py                        the embedded model, random tokens
    python benchmarks/growth.py --repeats 1 --words model=tiny
    python benchmarks/growth.py --parts processes      the second table only

The first table shows medians over processes: the seconds of the part alone, and the peak resident memory of the process.
Training uses 8 pairs per step, generation 16 prompts at a time, all answered to the full length. A linear cost doubles with
each column. Memory should not grow with the number of pairs or prompts, and with their length only up to the budget of a
batch (engine.tokens_per_batch).

The second table shows the rate of steps of 64 pairs, as in the paper, with engine=single in one process and engine=deepspeed
in two, with one thread each: medians over runs. The cost of summing gradients and updating weights does not depend on the
number of pairs per step.
"""

import argparse
import json
import random
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload

STEP, ROWS = 8, 16
PROMPT, ANSWER, NEW = 48, 80, 32  # tokens
LENGTH = "tokens of an answer"
# The quantities that grow, and their smallest values.
AXES = {
    "scoring, by pairs": 16,
    "training, by pairs": 8,
    f"scoring, by {LENGTH}": 64,
    f"training, by {LENGTH}": 64,
    "generation, by prompts": 32,
    f"generation, by {LENGTH}": 32,
}
TIMES = (1, 2, 4)
SHARED_STEP = 64  # pairs per step in the table of processes
PROCESSES = {"1 process": None, **{f"2 processes, ZeRO {stage}": stage for stage in (0, 2)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes per number")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all amounts")
    parser.add_argument("--words", default="", help="settings of run.py for the model, as one string")
    parser.add_argument("--parts", nargs="+", choices=("growth", "processes"), default=["growth", "processes"])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure-steps", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        axis, amount = options.measure
        print(json.dumps(measure(options.model, axis, int(amount))))
        return
    if options.measure_steps:
        name, pairs = options.measure_steps
        measure_steps(options.model, PROCESSES[name], int(pairs))
        return
    model = workload.find_start(shlex.split(options.words)).folder
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {workload.describe_machine()}\n")
    if "growth" in options.parts:
        print_growth(model, options.scale, options.repeats)
    if "processes" in options.parts:
        print_processes(model, max(2, round(SHARED_STEP * options.scale)), options.repeats)


def print_growth(model: Path, scale: float, repeats: int) -> None:
    axes = {axis: max(1, round(amount * scale)) for axis, amount in AXES.items()}
    commands = {
        f"{axis} {times}": [sys.executable, __file__, "--model", str(model), "--measure", axis, str(times * amount)]
        for axis, amount in axes.items()
        for times in TIMES
    }
    results = workload.run_in_turn(commands, repeats)
    print("| | 1x | seconds | 2x | 4x | peak memory, GiB | 2x | 4x |\n|---|---|---|---|---|---|---|---|")
    for axis, amount in axes.items():
        seconds, memory = (
            [workload.median(results[f"{axis} {times}"], key) for times in TIMES] for key in ("seconds", "memory")
        )
        growth = " | ".join(f"{value:.3g} ({value / seconds[0]:.2f}x)" for value in seconds[1:])
        print(f"| {axis} | {amount} | {seconds[0]:.3g} | {growth} | {' | '.join(f'{m:.2f}' for m in memory)} |")


def print_processes(model: Path, pairs: int, repeats: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--model", str(model), "--measure-steps"]
    commands = {
        name: [
            "env",
            "OMP_NUM_THREADS=1",
            sys.executable,
            *([] if stage is None else launcher),
            __file__,
            *options,
            name,
            str(pairs),
        ]
        for name, stage in PROCESSES.items()
    }
    results = workload.run_in_turn(commands, repeats)
    rates = {name: workload.median(rows, "pairs_per_second") for name, rows in results.items()}
    print(f"\n| a step of {pairs} pairs | pairs/s | times one process | pairs/s of each run |\n|---|---|---|---|")
    for name, rate in rates.items():
        runs = ", ".join(f"{row['pairs_per_second']:.3g}" for row in results[name])
        print(f"| {name} | {rate:.3g} | {rate / rates['1 process']:.2f} | {runs} |")


def measure(folder: Path, axis: str, amount: int) -> dict:
    """Return the seconds and peak memory of one part, measured in this process."""
    import torch

    from spin.config.schema import EngineConfig
    from spin.engines.base import select_dtype

    part, _, unit = axis.partition(", by ")
    device = torch.device("cpu")
    dtype = select_dtype(EngineConfig.from_defaults(), device)
    if unit == LENGTH:
        count, length = (ROWS if part == "generation" else STEP), amount
    else:
        count, length = amount, (NEW if part == "generation" else ANSWER)
    seconds = PARTS[part](folder, dtype, device, count, length)
    return {"seconds": seconds, "memory": workload.resident_peak_gib()}


def measure_steps(folder: Path, stage: int | None, pairs: int) -> None:
    """Train three steps in this process, or as a rank at a ZeRO `stage`, and print the median rate without the first."""
    import torch

    from spin.config.schema import EngineConfig
    from spin.engines.base import select_dtype
    from spin.runtime.process_group import exit_process, join_group, leave_group

    ranks = join_group("single" if stage is None else "deepspeed", "cpu")
    options = EngineConfig.from_defaults(**({} if stage is None else {"name": "deepspeed", "zero_stage": stage}))
    device = torch.device("cpu")
    rows = train_steps(folder, select_dtype(options, device), device, 3 * pairs, ANSWER, pairs, options, ranks)
    if ranks.is_main_process:
        print(json.dumps({"pairs_per_second": workload.median(rows[1:], "pairs_per_second")}), flush=True)
    leave_group()
    exit_process()


def random_pairs(count: int, answer: int) -> list:
    """Return pairs with lengths within a quarter of their means, the same for every `count`."""
    from spin.method.pairs import Pair

    rng = random.Random(0)

    def ids(mean: int, k: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 250) for _ in range(max(1, round(mean * (0.75 + (k % 8) / 14)))))

    return [
        Pair(str(k), "", "", "", "length", ids(PROMPT, k), ids(answer, k + 3), ids(answer, k + 5)) for k in range(count)
    ]


def time_scoring(folder, dtype, device, count, length) -> float:
    from spin.method.pairs import to_continuations
    from spin.models.load import load_model

    pairs, model = random_pairs(count, length), load_model(folder, dtype, device)
    forward = workload.find_forward(model, to_continuations(pairs))
    workload.score_pairs(model, pairs[:2], forward)  # warm-up
    return workload.timed(lambda: workload.score_pairs(model, pairs, forward))[1]


def time_training(folder, dtype, device, count, length) -> float:
    """Return the seconds of all steps except the first, which is a warm-up with the same number of pairs."""
    from spin.config.schema import EngineConfig
    from spin.runtime.process_group import SINGLE_PROCESS

    options = EngineConfig.from_defaults()
    rows = train_steps(folder, dtype, device, count + STEP, length, STEP, options, SINGLE_PROCESS)
    return sum(workload.step_seconds(row) for row in rows[1:])


def train_steps(folder, dtype, device, count, length, step, options, ranks) -> list[dict]:
    """Train with `step` pairs per step, in one process or as one of the `ranks`. Returns the metrics of each step."""
    from spin.config.schema import OptimizerConfig
    from spin.engines.deepspeed import DeepSpeedEngine
    from spin.engines.single import SingleEngine
    from spin.method.pairs import to_continuations
    from spin.models.load import load_model
    from spin.models.policy import Policy

    pairs, model = random_pairs(count, length), load_model(folder, dtype, device)
    forward = workload.find_forward(model, to_continuations(pairs))
    references = workload.score_pairs(model, pairs, forward)
    del model
    arguments = (Policy("start", folder, "start"), dtype, device, options, OptimizerConfig.from_defaults())
    engine = DeepSpeedEngine(*arguments, ranks) if options.name == "deepspeed" else SingleEngine(*arguments)
    rows = workload.train_pairs(engine, pairs, references, forward, step)
    engine.close()
    return rows


def time_generation(folder, dtype, device, count, length) -> float:
    from spin.config.schema import GenerationConfig
    from spin.data.examples import Example
    from spin.generation.answers import AnswerRequest
    from spin.generation.sampling import generate_answers
    from spin.models.load import load_model, load_tokenizer

    model, tokenizer = load_model(folder, dtype, device), load_tokenizer(folder)
    examples = [Example(pair.id, "", pair.prompt_ids, "", ()) for pair in random_pairs(count, 1)]
    settings = GenerationConfig.from_defaults(batch_size=ROWS)
    generate_answers(model, AnswerRequest(tokenizer, examples[:2], settings, 2, [], seed=0))  # warm-up
    request = AnswerRequest(tokenizer, examples, settings, length, [], seed=0)
    return workload.timed(lambda: generate_answers(model, request))[1]


PARTS = {"scoring": time_scoring, "training": time_training, "generation": time_generation}

if __name__ == "__main__":
    main()
