"""Generate a task with many right answers and a known distribution, so that the divergence from it can be computed exactly.

A prompt is four letters out of ten, for example `hbfa`; an answer is a chain of one to three letters. Each letter has three
successors with probabilities 0.6, 0.3 and 0.1. There are two tables of successors. The prompt's first letter determines the
table and the probability that a chain ends, and it is the start of the chain (the answer does not repeat it). The other
three letters carry no information: a model that memorises them overfits. Every prompt has 39 right answers.

`python -m experiments.chains` writes one training file per seed, with an answer to each prompt sampled from that
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
TEST_PROMPTS = PROMPTS[:TEST]  # the same for all seeds; no training file contains them


@cache
def distribution(first: str) -> dict[str, float]:
    """Return the right answers to prompts that begin with the letter `first`, with their probabilities, which sum to 1."""
    number = LETTERS.index(first) % 2
    table, end = TABLES[number], ENDS[number]
    answers, open_chains = {}, {"": 1.0}
    for length in range(1, LONGEST + 1):
        longer = {
            chain + letter: probability * share
            for chain, probability in open_chains.items()
            for letter, share in zip(table[(first + chain)[-1]], SHARES, strict=True)
        }
        stop = end if length < LONGEST else 1.0
        answers |= {chain: probability * stop for chain, probability in longer.items()}
        open_chains = {chain: probability * (1 - stop) for chain, probability in longer.items()}
    return answers


def entropy(prompts: Sequence[str]) -> float:
    """Return the mean entropy of the human answers in nats per answer: the NLL of a model with their distribution."""
    return -sum(p * math.log(p) for prompt in prompts for p in distribution(prompt[0]).values()) / len(prompts)


def records(seed: int) -> list[dict[str, str]]:
    """Return `TRAIN` prompts with one human answer each, which are the same for the same seed."""
    rng = random.Random(f"chains:{seed}")
    rows = []
    for prompt in rng.sample(PROMPTS[TEST:], TRAIN):
        answers = distribution(prompt[0])
        rows.append({"prompt": prompt, "response": rng.choices([*answers], [*answers.values()])[0]})
    return rows


def answer_logps(policy: Path, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """Return log p of each answer to each prompt, including the end token, under the policy in a model folder.

    [prompts, answers], in nats.
    """
    tokenizer, model = load_tokenizer(policy), load_model(policy, torch.float32, torch.device("cpu"))
    encoded = encode_prompts(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts], TEMPLATE)
    items = []
    for prompt, texts in zip(encoded, answers, strict=True):
        responses = encode_responses(tokenizer, [prompt] * len(texts), texts, TEMPLATE)
        items.append(Continuations(prompt[1], tuple((*response, tokenizer.eos_token_id) for response in responses)))
    forward = Forward("padded", "chunked", 16384, 4096)
    return compute_logps(model, items, forward).view(len(prompts), -1).double().numpy()


def measure(policy: Path, prompts: Sequence[str] = TEST_PROMPTS) -> dict[str, float]:
    """Return how far the policy in a model folder is from the humans, computed from all right answers without sampling.

    kl: KL(human || policy) in nats per answer, the held-out NLL minus the entropy. tv: total variation, the maximum
    difference between the two in the probability of any event. right: the policy's probability of a right answer. All are
    means over prompts.
    """
    logps = answer_logps(policy, prompts, [[*distribution(prompt[0])] for prompt in prompts])
    human = np.array([[*distribution(prompt[0]).values()] for prompt in prompts])
    policy_probs, right = np.exp(logps), np.exp(logps).sum(1)
    return {
        "kl": float((human * (np.log(human) - logps)).sum(1).mean()),
        "tv": float(((np.abs(human - policy_probs).sum(1) + 1 - right) / 2).mean()),
        "right": float(right.mean()),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):
        lines = [json.dumps(record) + "\n" for record in records(seed)]
        (FOLDER / f"{seed}.jsonl").write_text("".join(lines))
    print(f"{FOLDER}: {SEEDS} files of {TRAIN} prompts; the entropy of answers is {entropy(TEST_PROMPTS):.3f} nats")


if __name__ == "__main__":
    main()
