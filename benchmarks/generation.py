"""Generation, side by side with what people use now.

    python benchmarks/generation.py                    the embedded model, 128 prompts, answers of up to 128 tokens
    python benchmarks/generation.py --repeats 5 --only spin,plain

Contenders, each in processes of its own, in turn, on the same weights, prompts and precision, sampling at temperature 1:

- spin: this project: sorted by length, as an answer ends the next prompt begins.
- plain: transformers' `generate`, prompts in order of arrival, padded, the same number at a time.
- continuous: transformers' continuous batching (`generate_batch`).
- article: one prompt at a time, five beams, as the article does that this project began with; on the first prompts only.

Printed as a table in markdown: tokens of answers a second (stop token included, padding and tokens after it not), and peak
resident memory.
"""

import argparse
import json
import resource
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.workload import Workload, interleaved, machine, median, prepare  # noqa: E402

ARTICLE_PROMPTS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at a time")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each contender")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by commas; the first is compared")
    parser.add_argument("--words", default="", help="settings of run.py for the model and data, in one string")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        workload = Workload(options.model, options.data)
        print(json.dumps(contend(options.contender, workload, options.batch_size, options.new)))
        return
    workload = prepare(options.prompts, shlex.split(options.words))
    contenders = {
        name: [
            *(sys.executable, __file__, "--contender", name, "--batch-size", str(options.batch_size)),
            *("--new", str(options.new), "--model", str(workload.model), "--data", str(workload.pairs)),
        ]
        for name in options.only.split(",")
    }
    found = interleaved(contenders, options.repeats)
    ours = next(iter(found))
    base = median(found[ours], "rate")
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {found[ours][0]['precision']}. {machine()}\n")
    print("| | prompts | tokens | tokens/s | slower by | peak memory, GiB | tokens/s of each process |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in found.items():
        rate, memory = median(rows, "rate"), median(rows, "memory")
        each = ", ".join(f"{row['rate']:.0f}" for row in rows)
        prompts, tokens = rows[0]["prompts"], median(rows, "tokens")
        print(f"| {name} | {prompts} | {tokens:.0f} | {rate:.0f} | {base / rate:.2f} | {memory:.2f} | {each} |")


def contend(name: str, workload: Workload, batch_size: int, new: int) -> dict:
    import torch

    from spin.config import schema
    from spin.engines.base import select_dtype
    from spin.method.pairs import read_pairs
    from spin.models.load import load_model, load_tokenizer, stop_ids

    dtype = select_dtype(schema.EngineConfig.from_defaults(), torch.device("cpu"))
    model, tokenizer = load_model(workload.model, dtype, torch.device("cpu")), load_tokenizer(workload.model)
    prompts = [list(pair.prompt_ids) for pair in read_pairs(workload.pairs)]
    prompts = prompts[:ARTICLE_PROMPTS] if name == "article" else prompts
    stops = sorted(stop_ids(workload.model, tokenizer))
    CONTENDERS[name](model, tokenizer, prompts[:2], stops, batch_size, 4)  # what is done once is not measured
    started = time.perf_counter()
    answers = CONTENDERS[name](model, tokenizer, prompts, stops, batch_size, new)
    seconds = time.perf_counter() - started
    tokens = sum(next((k + 1 for k, token in enumerate(ids) if token in stops), len(ids)) for ids in answers)
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "rate": tokens / seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "precision": str(dtype).removeprefix("torch."),
    }


def spin(model, tokenizer, prompts, stops, batch_size, new):
    from spin.config.schema import GenerationConfig
    from spin.data.examples import Example
    from spin.generation.sampling import generate_answers

    examples = [Example(str(i), "", tuple(ids), "", ()) for i, ids in enumerate(prompts)]
    found = generate_answers(
        model, tokenizer, examples, 1, GenerationConfig.from_defaults(batch_size=batch_size), new, stops, seed=0
    )
    return [answer.ids for answer in found]


def plain(model, tokenizer, prompts, stops, batch_size, new):
    import torch

    torch.manual_seed(0)
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        length = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch])
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += found[:, length:].tolist()
    return answers


def continuous(model, tokenizer, prompts, stops, batch_size, new):
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    settings = GenerationConfig.from_defaults(
        max_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
    return [output.generated_tokens for output in found.values()]


def article(model, tokenizer, prompts, stops, batch_size, new):
    import torch

    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            num_beams=5,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(found[0, len(prompt) :].tolist())
    return answers


CONTENDERS = {"spin": spin, "plain": plain, "continuous": continuous, "article": article}

if __name__ == "__main__":
    main()
