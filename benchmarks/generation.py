"""Measure the speed and memory of generation with spin and with other tools.

    python benchmarks/generation.py                    the embedded model, 128 prompts, answers of up to 128 tokens
    python benchmarks/generation.py --repeats 5 --only spin,plain

Each tool runs in its own processes, alternating with the others, on the same weights, prompts and precision, sampling
at temperature 1:

- spin: prompts are sorted by length; when an answer ends, the next prompt takes its row.
- plain: transformers' `generate` on padded prompts in the given order, with the same batch size.
- continuous: transformers' continuous batching (`generate_batch`).
- vllm: vLLM, with the interpreter given by --vllm (`make vllm`). Its start-up time is not counted.
- beams: one prompt at a time with five beams, on the first prompts only.

Prints a markdown table with the answer tokens per second (up to and including the stop token) and the peak resident
memory, for vLLM that of its own process.
"""

import argparse
import json
import resource
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import (
    ROOT,
    Workload,
    describe_machine,
    median,
    prepare_workload,
    resident_peak_gib,
    run_in_turn,
    timed,
)

BEAM_PROMPTS = 6
VLLM = ROOT / ".venv-vllm/bin/python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64, help="prompts decoded at a time")
    parser.add_argument("--new", type=int, default=128, help="maximum length of an answer in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="processes per tool")
    parser.add_argument(
        "--only", default=",".join(CONTENDERS), help="tools, separated by commas; the first is the baseline"
    )
    parser.add_argument("--vllm", default=str(VLLM), help="interpreter with vLLM; vllm is skipped if it does not exist")
    parser.add_argument("--words", default="", help="settings of run.py for the model and data, as one string")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        workload = Workload(options.model, options.data)
        print(json.dumps(measure(options.contender, workload, options.batch_size, options.new, options.vllm)))
        return
    if options.only == "vllm" and not Path(options.vllm).exists():
        parser.error(f"--vllm={options.vllm}: there is no such interpreter; `make vllm` installs one")
    workload = prepare_workload(options.prompts, shlex.split(options.words))
    commands = {
        name: [
            *(sys.executable, __file__, "--contender", name, "--batch-size", str(options.batch_size)),
            *("--new", str(options.new), "--model", str(workload.model), "--data", str(workload.pairs)),
            *("--vllm", options.vllm),
        ]
        for name in options.only.split(",")
        if name != "vllm" or Path(options.vllm).exists()
    }
    results = run_in_turn(commands, options.repeats)
    baseline = next(iter(results.values()))
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {baseline[0]['precision']}. {describe_machine()}\n")
    print("| | prompts | tokens | tokens/s | slower by | peak memory, GiB | tokens/s of each process |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        rate, memory, tokens = (median(rows, key) for key in ("rate", "memory", "tokens"))
        slower, each = median(baseline, "rate") / rate, ", ".join(f"{row['rate']:.0f}" for row in rows)
        print(f"| {name} | {rows[0]['prompts']} | {tokens:.0f} | {rate:.0f} | {slower:.2f} | {memory:.2f} | {each} |")


def measure(name: str, workload: Workload, batch_size: int, new: int, python: str) -> dict:
    """Return the rate and the peak memory of one tool, measured in this process or, for vLLM, in that of its interpreter."""
    import torch

    from spin.config.schema import EngineConfig
    from spin.engines.base import select_dtype
    from spin.method.pairs import read_pairs
    from spin.models.load import load_model, load_tokenizer, stop_ids

    dtype, tokenizer = select_dtype(EngineConfig.from_defaults(), torch.device("cpu")), load_tokenizer(workload.model)
    pairs, _ = read_pairs(workload.pairs)
    prompts = [list(pair.prompt_ids) for pair in pairs[: BEAM_PROMPTS if name == "beams" else None]]
    stops = sorted(stop_ids(workload.model, tokenizer))

    def timed_answers(
        answer: Callable[[list[list[int]], int], list[Sequence[int]]],
    ) -> tuple[list[Sequence[int]], float]:
        answer(prompts[:2], 4)  # warm-up
        return timed(lambda: answer(prompts, new))

    if name == "vllm":
        with vllm(workload.model, dtype, stops, python, max(map(len, prompts)) + new) as answer:
            answers, seconds = timed_answers(answer)
        memory = resident_peak_gib(resource.RUSAGE_CHILDREN)
    else:
        model = load_model(workload.model, dtype, torch.device("cpu"))
        answers, seconds = timed_answers(partial(CONTENDERS[name], model, tokenizer, stops, batch_size))
        memory = resident_peak_gib()
    tokens = sum(next((k + 1 for k, token in enumerate(ids) if token in stops), len(ids)) for ids in answers)
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "rate": tokens / seconds,
        "memory": memory,
        "precision": str(dtype).removeprefix("torch."),
    }


@contextmanager
def vllm(folder, dtype, stops, python, longest):
    """Start vLLM and yield a function `answer(prompts, new)` that returns the answers' token ids."""
    from spin.config.schema import GenerationConfig
    from spin.generation.vllm import llm_arguments, run_workers, sampling_arguments
    from spin.models.policy import Policy

    settings = GenerationConfig.from_defaults(engine="vllm", python=python)
    arguments = {"llm": llm_arguments(Policy("start", folder, ""), dtype, settings, longest), "lora": None}
    with tempfile.TemporaryDirectory() as logs, run_workers(arguments, settings, Path(logs)) as ask:

        def answer(prompts, new):
            outputs = ask(prompts, [sampling_arguments(i, settings, new, stops) for i in range(len(prompts))])
            return [output["token_ids"] for output in outputs]

        yield answer


# --- contenders -------------------------------------------------------------------------------------------------------
# Each returns the token ids of the answers to `prompts`, decoded in batches of `batch_size`, each of at most `new` tokens.


def spin(model, tokenizer, stops, batch_size, prompts, new):
    from spin.config.schema import GenerationConfig
    from spin.data.examples import Example
    from spin.generation.answers import AnswerRequest
    from spin.generation.sampling import generate_answers

    examples = [Example(str(i), "", tuple(ids), "", ()) for i, ids in enumerate(prompts)]
    settings = GenerationConfig.from_defaults(batch_size=batch_size)
    request = AnswerRequest(tokenizer, examples, settings, new, stops, seed=0)
    return [answer.ids for answer in generate_answers(model, request)]


def plain(model, tokenizer, stops, batch_size, prompts, new):
    import torch

    torch.manual_seed(0)
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        length = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch])
        output = model.generate(
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
        answers += output[:, length:].tolist()
    return answers


def continuous(model, tokenizer, stops, batch_size, prompts, new):
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    outputs = model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
    return [output.generated_tokens for output in outputs.values()]


def beams(model, tokenizer, stops, batch_size, prompts, new):
    import torch

    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            num_beams=5,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


CONTENDERS = {"spin": spin, "plain": plain, "continuous": continuous, "vllm": vllm, "beams": beams}

if __name__ == "__main__":
    main()
