"""Training and scoring of pairs, side by side with what people use now.

    python benchmarks/training.py                      the embedded model, 16 pairs, 8 a step
    python benchmarks/training.py --repeats 5 --only spin,trl

Contenders, each in processes of its own, in turn, on the same weights, token ids, steps and precision (bf16 products, fp32
master weights; fp32 where the processor has no bf16):

- spin: this project.
- trl: TRL's DPOTrainer with precomputed reference log-probs and its best settings for a CPU (no gradient checkpointing).
- trl-as-it-comes: DPOTrainer with its defaults: gradient checkpointing, and a reference model's forward in each step.
- official: the way of the paper's code: chosen and rejected padded into one batch, full logits, a reference model's
  forward in each step.

Printed as a table in markdown, with what made it: pairs a second of training (each pair once, after a step that warms up) and
of scoring, peak resident memory of the process, the loss of the first step (ln 2 where policy and reference agree), and the
share of the machine's own peak: the FLOPs that an unpadded computation with shared prompts needs, over the rate of a large
product in that type, measured before and after.
"""

import argparse
import json
import resource
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.workload import Workload, interleaved, machine, median, peak_rate, prepare  # noqa: E402

LR, BETA = 5e-7, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="pairs to train on, in whole steps")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each contender")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by commas; the first is compared")
    parser.add_argument("--words", default="", help="settings of run.py for the model and data, in one string")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scored", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(contend(options.contender, Workload(options.model, options.scored), options.batch_size)))
        return
    workload = prepare(options.pairs, shlex.split(options.words))
    contenders = {
        name: [
            *(sys.executable, __file__, "--contender", name, "--batch-size", str(options.batch_size)),
            *("--model", str(workload.model), "--scored", str(workload.pairs)),
        ]
        for name in options.only.split(",")
    }
    before = matrix_peaks()
    found = interleaved(contenders, options.repeats)
    peaks = {name: max(rate, before[name]) for name, rate in matrix_peaks().items()}
    report(found, workload, options.batch_size, peaks, shlex.join(["python", *sys.argv]))


def matrix_peaks() -> dict[str, float]:
    return {name: peak_rate(name, seconds=2) for name in ("bfloat16", "float32")}


def whole_steps(pairs: list, batch_size: int) -> list:
    """As many of the pairs as fill their last step: generation may have left fewer than were asked for."""
    return pairs[: len(pairs) // batch_size * batch_size]


def report(found: dict[str, list[dict]], workload: Workload, batch_size: int, peaks: dict, command: str) -> None:
    from spin.method.pairs import read_pairs

    pairs = whole_steps(read_pairs(workload.pairs), batch_size)
    ours = next(iter(found))
    precision = found[ours][0]["precision"]
    flops, peak = useful_flops(workload.model, pairs), peaks[precision]
    kinds = ("prompt_ids", "real_ids", "generated_ids")
    lengths = [statistics.mean(len(getattr(pair, kind)) for pair in pairs) for kind in kinds]
    print(f"\n`{command}`: {len(pairs)} pairs of {' + '.join(f'{length:.0f}' for length in lengths)} tokens")
    print(
        f"(prompt, human answer, generated answer), {precision}. {machine()} A large product: {peak / 1e12:.2f} TFLOP/s.\n"
    )
    print(
        "| | training, pairs/s | slower by | scoring, pairs/s | slower by | peak memory, GiB | times ours | first loss | of peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    base = {key: median(found[ours], key) for key in ("train", "score", "memory")}
    for name, rows in found.items():
        train, memory = median(rows, "train"), median(rows, "memory")
        score = median(rows, "score") if rows[0]["score"] else None
        scoring = f"{score:.2f} | {base['score'] / score:.2f}" if score else "in its steps | – "
        print(
            f"| {name} | {train:.2f} | {base['train'] / train:.2f} | {scoring} | {memory:.2f} "
            f"| {memory / base['memory']:.2f} | {median(rows, 'loss'):.5f} | {flops * train / peak:.2f} |"
        )
    for name, rows in found.items():
        spread = ", ".join(f"{row['train']:.2f}" for row in rows)
        print(f"\n{name}: training, pairs/s, of each process: {spread}", end="")
    print()


def useful_flops(model: Path, pairs: list) -> float:
    """FLOPs to train on a pair, at least: each prompt and answer token once through the layers, forward and backward
    (3 products of 2 FLOPs a weight), the head on response positions, attention within each answer's own sequence."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = layers * (2 * width * queries + 2 * width * keys + 3 * width * inner)
    total = 0.0
    for pair in pairs:
        p, r, g = len(pair.prompt_ids), len(pair.real_ids), len(pair.generated_ids)
        seen = p * p / 2 + r * (p + r / 2) + g * (p + g / 2)
        total += 6 * (weights * (p + r + g) + width * config.vocab_size * (r + g) + 2 * layers * queries * seen)
    return total / len(pairs)


# --- contenders -------------------------------------------------------------------------------------------------------
# Each trains on the pairs in their order, `batch_size` a step, the first step twice. It returns the seconds of each step, the
# loss of the first, and the seconds that scoring all pairs took (None if it does that in its steps).


def contend(name: str, workload: Workload, batch_size: int) -> dict:
    import torch

    from spin.config import schema
    from spin.engines.base import select_dtype
    from spin.method.pairs import read_pairs

    pairs = whole_steps(read_pairs(workload.pairs), batch_size)
    dtype = select_dtype(schema.EngineConfig.from_defaults(), torch.device("cpu"))
    seconds, loss, scoring = CONTENDERS[name](workload, pairs, batch_size, dtype)
    assert len(seconds) == 1 + len(pairs) // batch_size
    return {
        "train": len(pairs) / sum(seconds[1:]),
        "score": scoring and len(pairs) / scoring,
        "loss": loss,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "precision": str(dtype).removeprefix("torch."),
    }


def spin(workload, pairs, batch_size, dtype):
    from dataclasses import replace

    import torch

    from spin.config import schema
    from spin.engines.logps import choose_forward, compute_logps
    from spin.engines.single import SingleEngine
    from spin.method.pairs import as_continuations
    from spin.method.training import _order, train_spin
    from spin.models.load import load_model
    from spin.models.policy import Policy

    settings, device = schema.EngineConfig.from_defaults(), torch.device("cpu")
    policy = Policy("start", workload.model, "start")
    model = load_model(policy.folder, dtype, device)
    items = as_continuations(pairs)
    longest = max(item.tokens for item in items)
    forward, _ = choose_forward(model, items, "auto", settings.tokens_per_batch, settings.head_chunk, longest)
    started = time.perf_counter()
    compute_logps(model, items, forward)
    scoring = time.perf_counter() - started
    del model
    engine = SingleEngine(policy, dtype, device, settings, schema.OptimizerConfig.from_defaults())
    # It shuffles: lay them out so that they come in the order that the others take them in.
    wanted = [replace(pair, id=str(k)) for k, pair in enumerate(pairs[:batch_size] + pairs)]
    laid_out = dict(zip(_order(len(wanted), 1, seed=0), wanted, strict=True))
    rows: list[dict] = []
    common = {"lr": LR, "epochs": 1, "batch_size": batch_size, "warmup_ratio": 0.1, "seed": 0, "beta": BETA}
    train_spin(engine, [laid_out[k] for k in range(len(wanted))], forward, link="logistic", log=rows.append, **common)
    return [row["pairs"] / row["pairs_per_second"] for row in rows], rows[0]["loss"], scoring


def trl(workload, pairs, batch_size, dtype, **settings):
    import torch
    import transformers
    from datasets import Dataset, concatenate_datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    scoring = None

    class SameTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *rest):
            return dataset  # token ids as they are, where it would tokenise texts again

        def _get_train_sampler(self, *rest):
            return SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, dataset, name, size):
            nonlocal scoring
            cut = range(batch_size), range(batch_size, len(dataset))
            warm = super()._precompute_ref_logps(dataset.select(cut[0]), name, size)
            started = time.perf_counter()
            rest = super()._precompute_ref_logps(dataset.select(cut[1]), name, size)
            scoring = time.perf_counter() - started
            return concatenate_datasets([warm, rest])

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []

        def on_step_begin(self, *rest, **more):
            self.started = time.perf_counter()

        def on_step_end(self, *rest, **more):
            self.seconds.append(time.perf_counter() - self.started)

    transformers.utils.logging.set_verbosity_error()
    rows = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.real_ids), "rejected_ids": list(p.generated_ids)}
        for p in pairs[:batch_size] + pairs
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} | settings
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
            **chosen,
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


def trl_as_it_comes(workload, pairs, batch_size, dtype):
    return trl(workload, pairs, batch_size, dtype, gradient_checkpointing=True, precompute_ref_log_probs=False)


def official(workload, pairs, batch_size, dtype):
    """Padded chosen and rejected answers in one batch, full logits, a reference forward in each step."""
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
        found = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (found * counts[:, 1:]).sum(1).view(2, -1)

    model, reference = load(dtype), load(dtype).requires_grad_(False)
    weights = list(model.parameters())
    masters = [p.detach().float().clone() for p in weights] if dtype != torch.float32 else [p.data for p in weights]
    optimizer = torch.optim.RMSprop(masters, lr=LR)
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    with torch.no_grad():
        logps(reference, pairs[:2])  # what is done once is not measured
        started = time.perf_counter()
        for batch in batches:
            logps(reference, batch)
        scoring = time.perf_counter() - started
    seconds, losses = [], []
    for batch in batches[:1] + batches:
        started = time.perf_counter()
        with torch.no_grad():
            theirs = logps(reference, batch)
        real, generated = logps(model, batch) - theirs
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


CONTENDERS = {"spin": spin, "trl": trl, "trl-as-it-comes": trl_as_it_comes, "official": official}

if __name__ == "__main__":
    main()
