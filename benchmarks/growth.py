"""How the cost of this project's parts grows with what they are given: once, twice and four times as much.

    python benchmarks/growth.py                        the embedded model, random tokens
    python benchmarks/growth.py --repeats 1 --words model=tiny

Each number is the median of several measurements, made in turn, each in a process of its own: seconds of the part alone, and
the process' peak resident memory. Pairs are scored and trained on 8 a step; the lengths of their answers grow at 8 pairs;
prompts are answered 16 at a time, all to the same length. A cost that is linear doubles with every column. Memory does not
grow with the number of pairs or prompts (but for what the allocator keeps of the first steps of training), and with their
length only up to the budget of a pass (engine.tokens_per_batch).
"""

import argparse
import json
import random
import resource
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.workload import interleaved, machine, median, start  # noqa: E402

STEP, ROWS = 8, 16
# What grows, and how many of it there are at once.
AXES = {
    "scoring, by pairs": 16,
    "training, by pairs": 8,
    "scoring, by tokens of an answer": 64,
    "training, by tokens of an answer": 64,
    "generation, by prompts": 32,
    "generation, by tokens of an answer": 32,
}
PROMPT, ANSWER, NEW = 48, 80, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes for each number")
    parser.add_argument("--words", default="", help="settings of run.py for the model, in one string")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, amount = options.measure
        print(json.dumps(measure(options.model, what, int(amount))))
        return
    model = start(shlex.split(options.words)).folder
    commands = {
        f"{what} {times}": [sys.executable, __file__, "--model", str(model), "--measure", what, str(times * once)]
        for what, once in AXES.items()
        for times in (1, 2, 4)
    }
    found = interleaved(commands, options.repeats)
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {machine()}\n")
    print("| | 1x | seconds | 2x | 4x | peak memory, GiB | 2x | 4x |\n|---|---|---|---|---|---|---|---|")
    for what, once in AXES.items():
        seconds, memory = (
            [median(found[f"{what} {times}"], key) for times in (1, 2, 4)] for key in ("seconds", "memory")
        )
        grown = " | ".join(f"{s:.2f} ({s / seconds[0]:.2f}x)" for s in seconds[1:])
        print(f"| {what} | {once} | {seconds[0]:.2f} | {grown} | {' | '.join(f'{m:.2f}' for m in memory)} |")


def measure(folder: Path, what: str, amount: int) -> dict:
    import torch

    from spin.config import schema
    from spin.engines.base import select_dtype

    part, _, axis = what.partition(", by ")
    device = torch.device("cpu")
    dtype = select_dtype(schema.EngineConfig.from_defaults(), device)
    work = {"scoring": scoring, "training": training, "generation": generation}[part]
    count = amount if axis != "tokens of an answer" else ROWS if part == "generation" else STEP
    seconds = work(folder, dtype, device, count, amount if axis == "tokens of an answer" else None)
    return {"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def random_pairs(count: int, answer: int) -> list:
    """Lengths spread by a quarter about their mean, the same at every number."""
    from spin.method.pairs import Pair

    rng = random.Random(0)

    def ids(mean: int, k: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 250) for _ in range(round(mean * (0.75 + (k % 8) / 14))))

    return [
        Pair(str(k), "", "", "", "length", ids(PROMPT, k), ids(answer, k + 3), ids(answer, k + 5)) for k in range(count)
    ]


def loaded(folder, dtype, device, pairs):
    """The model, and how pairs go through it; what is done once is done."""
    from spin.config import schema
    from spin.engines.logps import choose_forward, compute_logps
    from spin.method.pairs import as_continuations
    from spin.models.load import load_model

    model, items, settings = (
        load_model(folder, dtype, device),
        as_continuations(pairs),
        schema.EngineConfig.from_defaults(),
    )
    budgets = settings.tokens_per_batch, settings.head_chunk
    forward, _ = choose_forward(model, items, "auto", *budgets, max(item.tokens for item in items))
    compute_logps(model, items[:2], forward)
    return model, items, forward


def scoring(folder, dtype, device, count, answer) -> float:
    from spin.engines.logps import compute_logps

    model, items, forward = loaded(folder, dtype, device, random_pairs(count, answer or ANSWER))
    started = time.perf_counter()
    compute_logps(model, items, forward)
    return time.perf_counter() - started


def training(folder, dtype, device, count, answer) -> float:
    """Without the first step, which warms up: on as many pairs as the others, which come after."""
    from spin.config import schema
    from spin.engines.logps import compute_logps
    from spin.engines.single import SingleEngine
    from spin.method.pairs import with_opponent_logps
    from spin.method.training import train_spin
    from spin.models.policy import Policy

    pairs = random_pairs(count + STEP, answer or ANSWER)
    model, items, forward = loaded(folder, dtype, device, pairs)
    pairs = with_opponent_logps(pairs, compute_logps(model, items, forward).view(-1, 2))
    del model
    engine = SingleEngine(
        Policy("start", folder, "start"),
        dtype,
        device,
        schema.EngineConfig.from_defaults(),
        schema.OptimizerConfig.from_defaults(),
    )
    rows: list[dict] = []
    common = {"lr": 5e-7, "epochs": 1, "batch_size": STEP, "warmup_ratio": 0.1, "seed": 0, "beta": 0.1}
    train_spin(engine, pairs, forward, link="logistic", log=rows.append, **common)
    return sum(row["pairs"] / row["pairs_per_second"] for row in rows[1:])


def generation(folder, dtype, device, count, new) -> float:
    from spin.config.schema import GenerationConfig
    from spin.data.examples import Example
    from spin.generation.sampling import generate_answers
    from spin.models.load import load_model, load_tokenizer

    model, tokenizer = load_model(folder, dtype, device), load_tokenizer(folder)
    examples = [Example(pair.id, "", pair.prompt_ids, "", ()) for pair in random_pairs(count, 1)]
    config = GenerationConfig.from_defaults(batch_size=ROWS)
    generate_answers(model, tokenizer, examples[:2], 1, config, 2, [], seed=0)
    started = time.perf_counter()
    generate_answers(model, tokenizer, examples, 1, config, new or NEW, [], seed=0)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
