"""Measure the seconds and peak resident memory of reading a data set, first and from the cache, and compare with `datasets`.

    python benchmarks/data.py                              25,000, 50,000 and 100,000 records of 1.2 kB
    python benchmarks/data.py --records 250000             up to a million records; half an hour on two cores
    python benchmarks/data.py --pairs 50000                also a game with this number of pairs, played and then repeated

`datasets` reads the same file with the same tokenizer and chat template, by its calls `load_dataset` and `map`. Each
row is measured in its own process. Prints markdown tables.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import ROOT, describe_machine

WORDS = "the a city tree story river market old new small why how what tell write explain moves grows keeps".split()
OURS = """
from spin.config.schema import DataConfig
from spin.data.examples import load_dataset
config = DataConfig.from_defaults(path=str(path), held_out=8, max_length=4096, max_prompt_length=2048)
data = load_dataset(config, tokenizer, {tokenizer.eos_token_id}, 0, cache)
count, digest = len(data.train), data.train.digest
"""
DATASETS = """
import datasets
datasets.disable_progress_bars()
def encode(rows):
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows["messages"]]
    return {"ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}
data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
data = data.map(encode, batched=True, batch_size=512)
count = len(data)
"""
COMMON = """
import json, sys, time
from pathlib import Path
import torch, transformers
path, cache, model = map(Path, sys.argv[1:4])
from spin.models.load import load_tokenizer
tokenizer = load_tokenizer(model)
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
print(json.dumps([count, seconds, peak]))
"""


def write_records(path: Path, count: int) -> None:
    """Write `count` chats of a question and an answer, 1.2 kB per record."""
    rng = random.Random(0)
    with path.open("w") as file:
        for n in range(count):
            prompt, answer = (" ".join(rng.choices(WORDS, k=size)) for size in (50, 160))
            messages = [{"role": "user", "content": f"{prompt} {n}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(work: str, path: Path, cache: Path, model: Path) -> tuple[int, float, float]:
    """Read the data in a new process. Returns the number of examples, the seconds and the peak resident memory (GiB)."""
    command = [sys.executable, "-c", COMMON.format(work=work), path, cache, model]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def reading_table(records: int, folder: Path, model: Path) -> None:
    print("| reader, records | first, s | µs per record | peak, GiB | second, s | first / second | peak, GiB |")
    print("|---|---|---|---|---|---|---|")
    for factor in (1, 2, 4):
        path = folder / f"{factor}.jsonl"
        write_records(path, factor * records)
        for name, work in (("spin", OURS), ("datasets", DATASETS)):
            first, second = (measure(work, path, folder / f"{name}-{factor}", model) for _ in range(2))
            per_record, ratio = first[1] / first[0] * 1e6, first[1] / second[1]
            cells = [f"{name}, {factor * records:,}", f"{first[1]:.1f}", f"{per_record:.0f}", f"{first[2]:.2f}"]
            cells += [f"{second[1]:.2f}", f"{ratio:.1f}", f"{second[2]:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        path.unlink()


def game_table(pairs: int, folder: Path) -> None:
    """Play a game with a tiny model on `pairs` pairs, of which it trains on 64, then repeat it, and print both costs."""
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for n in range(pairs):
            file.write(json.dumps({"prompt": f"Say {n}.", "response": f"Here is {n}, said as you asked."}) + "\n")
    words = (
        f"experiment=smoke data=local data.path={path} data.template=paper data.held_out=8 data.max_prompt_length=64 "
    )
    words += f"iter=0 generation.max_new_tokens=8 generation.batch_size=512 generation.tokens=65536 schedule.epochs={64 / pairs} "
    words += f"schedule.sft_epochs=0 data.max_response_length=64 store.path={folder}/store cache.path={folder}/cache "
    words += f"hydra.run.dir={folder}/run checkpoint.shard_size=4096 tracking.wandb=disabled"
    print("| game | seconds | peak, GiB |\n|---|---|---|")
    for name in ("played", "again, finished"):
        started = time.perf_counter()
        with subprocess.Popen([sys.executable, "run.py", *words.split()], cwd=ROOT, stdout=subprocess.DEVNULL) as game:
            _, status, usage = os.wait4(game.pid, 0)
            game.returncode = os.waitstatus_to_exitcode(status)
        assert game.returncode == 0
        print(f"| {name} | {time.perf_counter() - started:.1f} | {usage.ru_maxrss / 2**20:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=25_000, help="records of the smallest data set; 0: skip reading")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of the game to play; 0: skip the game")
    parser.add_argument("--tokenizer", help="folder with a tokenizer; default: the embedded model's")
    settings = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="spin-data-") as name:
        if settings.records:
            reading_table(settings.records, Path(name), Path(settings.tokenizer or embedded_model()))
        if settings.pairs:
            game_table(settings.pairs, Path(name))


def embedded_model() -> Path:
    from spin.config.hydra import load
    from spin.models.find import find_model

    config = load()
    return find_model(config.model, Path(config.cache.path).expanduser()).tokenizer


if __name__ == "__main__":
    main()
