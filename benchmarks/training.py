"""Measure the speed and memory of training and scoring with spin and with other tools.

    python benchmarks/training.py                      the embedded model, 16 pairs, 8 per step
    python benchmarks/training.py --repeats 5 --only spin,trl

Each tool runs in its own processes, alternating with the others, on the same weights, token ids, steps and precision
(bf16 products with fp32 master weights, or fp32 if the processor has no bf16):

- spin: this project.
- trl: TRL's DPOTrainer with precomputed reference log-probs and without gradient checkpointing, its best settings for a CPU.
- trl-defaults: DPOTrainer with gradient checkpointing and a forward pass of the reference model in each step.
- official: the method of the paper's code: chosen and rejected answers padded into one batch, full logits, a forward pass of
  the reference model in each step.

Prints a markdown table: pairs per second of training (each pair once, after a warm-up step) and of scoring, peak resident
memory of the process, the loss of the first step (ln 2 if policy and reference agree), and the useful FLOPs (no padding,
shared prompts) as a share of the peak rate of a large product, which is measured before and after.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import (
    BETA,
    LR,
    Workload,
    describe_machine,
    find_forward,
    median,
    peak_rate,
    prepare_workload,
    resident_peak_gib,
    run_in_turn,
    score_pairs,
    step_seconds,
    timed,
    train_pairs,
)

COLUMNS = (
    "",
    "training, pairs/s",
    "slower by",
    "scoring, pairs/s",
    "slower by",
    "peak memory, GiB",
    "times ours",
    "first loss",
    "of peak",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="pairs to train on, rounded down to full steps")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--repeats", type=int, default=3, help="processes per tool")
    parser.add_argument(
        "--only", default=",".join(CONTENDERS), help="tools, separated by commas; the first is the baseline"
    )
    parser.add_argument("--words", default="", help="settings of run.py for the model and data, as one string")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scored", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, Workload(options.model, options.scored), options.batch_size)))
        return
    workload = prepare_workload(options.pairs, shlex.split(options.words))
    commands = {
        name: [
            *(sys.executable, __file__, "--contender", name, "--batch-size", str(options.batch_size)),
            *("--model", str(workload.model), "--scored", str(workload.pairs)),
        ]
        for name in options.only.split(",")
    }
    precision = str(compute_dtype()).removeprefix("torch.")
    before = peak_rate(precision, seconds=2)
    results = run_in_turn(commands, options.repeats)
    peak = max(before, peak_rate(precision, seconds=2))
    print_table(results, workload, options.batch_size, precision, peak)


def compute_dtype():
    """Return the dtype in which all tools compute on this processor."""
    import torch

    from spin.config.schema import EngineConfig
    from spin.engines.base import select_dtype

    return select_dtype(EngineConfig.from_defaults(), torch.device("cpu"))


def pairs_of(workload: Workload, batch_size: int) -> list:
    """Return as many pairs as fill complete steps; some answers may have been dropped."""
    from spin.method.pairs import read_pairs

    pairs, _ = read_pairs(workload.pairs)
    return pairs[: len(pairs) // batch_size * batch_size]


def print_table(
    results: dict[str, list[dict]], workload: Workload, batch_size: int, precision: str, peak: float
) -> None:
    """Print the command, the workload and a row for each tool. `peak` is the FLOP/s of a large product."""
    pairs = pairs_of(workload, batch_size)
    baseline = next(iter(results.values()))
    flops, command = useful_flops(workload.model, pairs), shlex.join(["python", *sys.argv])
    kinds = ("prompt_ids", "real_ids", "generated_ids")
    lengths = [statistics.mean(len(getattr(pair, kind)) for pair in pairs) for kind in kinds]
    print(f"\n`{command}`: {len(pairs)} pairs of {' + '.join(f'{length:.0f}' for length in lengths)} tokens")
    print(
        f"(prompt, human answer, generated answer), {precision}. {describe_machine()} "
        f"A large product: {peak / 1e12:.2f} TFLOP/s.\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    base = {key: median(baseline, key) for key in ("train", "score", "memory")}
    for name, rows in results.items():
        train, memory = median(rows, "train"), median(rows, "memory")
        score = median(rows, "score") if rows[0]["score"] else None
        scoring = f"{score:.2f} | {base['score'] / score:.2f}" if score else "in its steps | – "
        print(
            f"| {name} | {train:.2f} | {base['train'] / train:.2f} | {scoring} | {memory:.2f} "
            f"| {memory / base['memory']:.2f} | {median(rows, 'loss'):.5f} | {flops * train / peak:.2f} |"
        )
    for name, rows in results.items():
        rates = ", ".join(f"{row['train']:.2f}" for row in rows)
        print(f"\n{name}: training, pairs/s, of each process: {rates}", end="")
    print()


def useful_flops(model: Path, pairs: list) -> float:
    """Return the minimum FLOPs of training on a pair, averaged over pairs: each prompt and answer token passes the layers
    once, forward and backward (3 products of 2 FLOPs per weight), the head is computed at response positions, and attention
    within each sequence."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = layers * (2 * width * queries + 2 * width * keys + 3 * width * inner)
    total = 0.0
    for pair in pairs:
        p, r, g = len(pair.prompt_ids), len(pair.real_ids), len(pair.generated_ids)
        attended = p * p / 2 + r * (p + r / 2) + g * (p + g / 2)
        total += 6 * (weights * (p + r + g) + width * config.vocab_size * (r + g) + 2 * layers * queries * attended)
    return total / len(pairs)


# --- contenders -------------------------------------------------------------------------------------------------------
# Each trains on the pairs in their order, `batch_size` per step, the first step twice. It returns the seconds of each step,
# the loss of the first, and the seconds for scoring all pairs (None if scoring is part of its steps).


def measure(name: str, workload: Workload, batch_size: int) -> dict:
    """Return the rates and the peak memory of one tool, measured in this process."""
    pairs = pairs_of(workload, batch_size)
    seconds, loss, scoring = CONTENDERS[name](workload, pairs, batch_size, compute_dtype())
    assert len(seconds) == 1 + len(pairs) // batch_size
    return {
        "train": len(pairs) / sum(seconds[1:]),
        "score": scoring and len(pairs) / scoring,
        "loss": loss,
        "memory": resident_peak_gib(),
    }


def spin(workload, pairs, batch_size, dtype):
    from dataclasses import replace
    from functools import partial

    import torch

    from spin.config.schema import EngineConfig, OptimizerConfig
    from spin.engines.single import SingleEngine
    from spin.method.pairs import to_continuations
    from spin.method.training import plan_steps
    from spin.models.load import load_model
    from spin.models.policy import Policy

    device = torch.device("cpu")
    policy = Policy("start", workload.model, "start")
    scored = load_model(policy.folder, dtype, device)
    forward = find_forward(scored, to_continuations(pairs))
    references, scoring = timed(partial(score_pairs, scored, pairs, forward))
    del scored
    engine = SingleEngine(policy, dtype, device, EngineConfig.from_defaults(), OptimizerConfig.from_defaults())
    # Training shuffles the pairs. Reorder them so that they are trained on in the same order as with the other tools.
    trained_order = [*range(batch_size), *range(len(pairs))]
    shuffled = [index for step in plan_steps(len(trained_order), 1, batch_size, seed=0) for index in step]
    source = dict(zip(shuffled, trained_order, strict=True))
    order = [source[index] for index in range(len(trained_order))]
    placed = [replace(pairs[k], id=str(index)) for index, k in enumerate(order)]
    placed_references = {
        model: {name: values[order] for name, values in logps.items()} for model, logps in references.items()
    }
    rows = train_pairs(engine, placed, placed_references, forward, batch_size)
    return [step_seconds(row) for row in rows], rows[0]["loss"], scoring


def trl(workload, pairs, batch_size, dtype, **settings):
    import torch
    import transformers
    from datasets import Dataset, concatenate_datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    scoring = None

    class SameTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset  # keep the token ids

        def _get_train_sampler(self, *arguments):
            return SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, dataset, name, size):
            nonlocal scoring
            warmup, measured = range(batch_size), range(batch_size, len(dataset))
            warmup_rows = super()._precompute_ref_logps(dataset.select(warmup), name, size)
            started = time.perf_counter()
            measured_rows = super()._precompute_ref_logps(dataset.select(measured), name, size)
            scoring = time.perf_counter() - started
            return concatenate_datasets([warmup_rows, measured_rows])

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []

        def on_step_begin(self, *arguments, **settings):
            self.started = time.perf_counter()

        def on_step_end(self, *arguments, **settings):
            self.seconds.append(time.perf_counter() - self.started)

    transformers.utils.logging.set_verbosity_error()
    rows = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.real_ids), "rejected_ids": list(p.generated_ids)}
        for p in pairs[:batch_size] + pairs
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} | settings
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            optim="rmsprop",
            learning_rate=LR,
            beta=BETA,
            warmup_steps=0.1,
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **options,
        )
        trainer = SameTokens(
            AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(workload.model),
            callbacks=[clock],
        )
        trainer.train()
        loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return clock.seconds, loss, scoring


def trl_defaults(workload, pairs, batch_size, dtype):
    return trl(workload, pairs, batch_size, dtype, gradient_checkpointing=True, precompute_ref_log_probs=False)


def official(workload, pairs, batch_size, dtype):
    """Train on chosen and rejected answers padded into one batch, with full logits and a reference forward in each step."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(kind):
        return AutoModelForCausalLM.from_pretrained(workload.model, dtype=kind).eval()

    def logps(model, chosen):
        rows = [(p.prompt_ids, p.real_ids) for p in chosen] + [(p.prompt_ids, p.generated_ids) for p in chosen]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, mask, counts = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            mask[row, :end] = 1
            counts[row, len(prompt) : end] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        token_logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (token_logps * counts[:, 1:]).sum(1).view(2, -1)

    model, reference = load(dtype), load(dtype).requires_grad_(False)
    weights = list(model.parameters())
    masters = [p.detach().float().clone() for p in weights] if dtype != torch.float32 else [p.data for p in weights]
    optimizer = torch.optim.RMSprop(masters, lr=LR)
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    with torch.no_grad():
        logps(reference, pairs[:2])  # warm-up
        started = time.perf_counter()
        for batch in batches:
            logps(reference, batch)
        scoring = time.perf_counter() - started
    seconds, losses = [], []
    for batch in batches[:1] + batches:
        started = time.perf_counter()
        with torch.no_grad():
            reference_logps = logps(reference, batch)
        real, generated = logps(model, batch) - reference_logps
        loss = torch.nn.functional.softplus(-BETA * (real - generated)).mean()
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, weight in zip(masters, weights, strict=True):
            weight.data.copy_(master)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return seconds, losses[0], scoring


CONTENDERS = {"spin": spin, "trl": trl, "trl-defaults": trl_defaults, "official": official}

if __name__ == "__main__":
    main()
