"""A task with many right answers whose distribution is known, so that the distance to it can be computed exactly.

A prompt is four letters out of ten, `hbfa`; an answer is a chain of one to three letters. Each letter has three successors,
which follow it with probability 0.6, 0.3 and 0.1. There are two tables of successors: which one holds, and how soon chains
end, is decided by the prompt's first letter, which is also where the chain begins (it is not said again). The other
three letters mean nothing: a model that learns them by heart overfits. Every prompt has 39 right answers.

`python -m experiments.chains` writes the training files, one a seed, the answer of each prompt drawn from that
distribution.
"""

import json
import math
import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch

from spin.data.templates import encode_prompts, encode_responses
from spin.engines.logps import Forward, compute_logps
from spin.engines.packing import Continuations
from spin.models.load import load_model, load_tokenizer

LETTERS = "abcdefghij"
LONGEST = 3
SHARES = (0.6, 0.3, 0.1)
ENDS = (0.25, 0.5)  # by table: the probability that a chain of 1 or 2 letters ends
TEMPLATE = "{prompt}="
TRAIN, TEST, SEEDS = 2048, 64, 5
FOLDER = Path("outputs/chains")

_rng = random.Random("chains")
TABLES = [{letter: _rng.sample(LETTERS, len(SHARES)) for letter in LETTERS} for _ in ENDS]
PROMPTS = ["".join(letters) for letters in product(LETTERS, repeat=4)]
_rng.shuffle(PROMPTS)
TEST_PROMPTS = PROMPTS[:TEST]  # the same for all seeds, in no training file


@cache
def distribution(first: str) -> dict[str, float]:
    """The right answers to prompts that begin with the letter `first`, and their probabilities, which sum to 1."""
    number = LETTERS.index(first) % 2
    table, end = TABLES[number], ENDS[number]
    found, open_chains = {}, {"": 1.0}
    for length in range(1, LONGEST + 1):
        longer = {
            chain + letter: probability * share
            for chain, probability in open_chains.items()
            for letter, share in zip(table[(first + chain)[-1]], SHARES, strict=True)
        }
        stop = end if length < LONGEST else 1.0
        found |= {chain: probability * stop for chain, probability in longer.items()}
        open_chains = {chain: probability * (1 - stop) for chain, probability in longer.items()}
    return found


def entropy(prompts: Sequence[str]) -> float:
    """Mean entropy of the human answers, nats per answer: the NLL of a model that has their distribution."""
    return -sum(p * math.log(p) for prompt in prompts for p in distribution(prompt[0]).values()) / len(prompts)


def records(seed: int) -> list[dict[str, str]]:
    """`TRAIN` prompts with one human answer each, the same for the same seed."""
    rng = random.Random(f"chains:{seed}")
    found = []
    for prompt in rng.sample(PROMPTS[TEST:], TRAIN):
        answers = distribution(prompt[0])
        found.append({"prompt": prompt, "response": rng.choices([*answers], [*answers.values()])[0]})
    return found


def answer_logps(policy: Path, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """[prompts, answers]: log p of each of a prompt's answers, with its end, by the policy in a model folder, in nats."""
    tokenizer, model = load_tokenizer(policy), load_model(policy, torch.float32, torch.device("cpu"))
    encoded = encode_prompts(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts], TEMPLATE)
    items = []
    for prompt, said in zip(encoded, answers, strict=True):
        responses = encode_responses(tokenizer, [prompt] * len(said), said, TEMPLATE)
        items.append(Continuations(prompt[1], tuple((*response, tokenizer.eos_token_id) for response in responses)))
    forward = Forward("padded", "chunked", 16384, 4096)
    return compute_logps(model, items, forward).view(len(prompts), -1).double().numpy()


def measure(policy: Path, prompts: Sequence[str] = TEST_PROMPTS) -> dict[str, float]:
    """How far the policy in a model folder is from the humans, computed from all right answers to `prompts`, no sampling.

    kl: KL(human || policy), nats per answer, the held-out NLL above its entropy bound. tv: total variation, the most by
    which the two can differ in the probability of any event. right: the policy's probability of a right answer. All means
    over prompts.
    """
    logps = answer_logps(policy, prompts, [[*distribution(prompt[0])] for prompt in prompts])
    human = np.array([[*distribution(prompt[0]).values()] for prompt in prompts])
    own, right = np.exp(logps), np.exp(logps).sum(1)
    return {
        "kl": float((human * (np.log(human) - logps)).sum(1).mean()),
        "tv": float(((np.abs(human - own).sum(1) + 1 - right) / 2).mean()),
        "right": float(right.mean()),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):
        lines = [json.dumps(record) + "\n" for record in records(seed)]
        (FOLDER / f"{seed}.jsonl").write_text("".join(lines))
    print(f"{FOLDER}: {SEEDS} files of {TRAIN} prompts; answers have {entropy(TEST_PROMPTS):.3f} nats of entropy")


if __name__ == "__main__":
    main()
