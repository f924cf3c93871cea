"""Tests of the two-sample measures on equal distributions and broken answers, and against their definitions."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from spin.evaluation.two_sample import (
    MIXTURES,
    SCALE,
    classifier_scores,
    clusters,
    embed,
    features,
    mauve,
    mauve_if_equal,
    with_embeddings,
)

TOPICS = {
    topic: [f"{topic}{i}" for i in range(12)]
    for topic in ("sky", "food", "law", "music", "sport", "code", "plant", "car")
}
COMMON = "the a of to and is in it that for on with as was be by at this".split()


def answer(rng: random.Random, topic: str) -> str:
    words = rng.choices(COMMON, k=rng.randint(6, 14)) + rng.choices(TOPICS[topic], k=rng.randint(2, 5))
    rng.shuffle(words)
    return " ".join(words)


def human_answers(n: int, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Return prompts on random topics, and two answers to each from one distribution."""
    rng = random.Random(seed)
    topics = [rng.choice(list(TOPICS)) for _ in range(n)]
    prompts = [" ".join(["tell", "me", *rng.choices(TOPICS[topic], k=3)]) for topic in topics]
    return prompts, [answer(rng, topic) for topic in topics], [answer(rng, topic) for topic in topics]


def auc(scores: np.ndarray) -> float:
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in scores[0] for b in scores[1]]))


def two_sample(prompts, real, generated) -> tuple[float, float, float]:
    """Return the AUC, MAUVE, and the MAUVE of equal distributions."""
    x = features(prompts, real, generated)
    labels = clusters(x, 0)
    return auc(classifier_scores(x)), mauve(labels[0], labels[1]), mauve_if_equal(labels, 0)


@pytest.mark.parametrize("n", [48, 300])
def test_equal_distributions(n):
    values = [two_sample(*human_answers(n, seed)) for seed in range(6)]
    aucs, likeness, equal = np.array(values).T
    assert abs(aucs.mean() - 0.5) < 0.06 and np.all(abs(aucs - 0.5) < 0.2 if n == 48 else abs(aucs - 0.5) < 0.1)
    assert abs(likeness.mean() - equal.mean()) < 0.05
    assert equal.mean() > 0.85


def broken(kind: str, prompts, real, generated, rng: random.Random) -> list[str]:
    if kind == "answers to other prompts":
        return generated[1:] + generated[:1]
    if kind == "one word repeated":
        return ["the " * len(text.split()) for text in generated]
    if kind == "one answer to all":
        return [generated[0]] * len(generated)
    if kind == "empty":
        return [""] * len(generated)
    if kind == "half as long":
        return [" ".join(text.split()[: len(text.split()) // 2]) for text in generated]
    assert kind == "echoes the prompt"
    return list(prompts)


KINDS = [
    "answers to other prompts",
    "one word repeated",
    "one answer to all",
    "empty",
    "half as long",
    "echoes the prompt",
]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_answers_are_caught(kind):
    prompts, real, generated = human_answers(100)
    value, likeness, equal = two_sample(prompts, real, broken(kind, prompts, real, generated, random.Random(0)))
    assert value > 0.65, kind
    assert likeness < 0.75 * equal, kind


def test_classifier_sees_word_order():
    """The classifier detects shuffled words; MAUVE of so few answers does not, as its clusters are topics and lengths."""
    rng = random.Random(0)
    prompts, _, _ = human_answers(100)
    real = [" ".join(f"{a} {a}s" for a in rng.choices("cat dog cow hen owl fox ant bee".split(), k=6)) for _ in prompts]
    generated = [" ".join(rng.sample(text.split(), len(text.split()))) for text in real]
    assert two_sample(prompts, real, generated)[0] > 0.9


def test_scores_are_cross_validated():
    """The AUC of pure noise is near 0.5; a classifier that is tested on its training set would separate all answers."""
    rng = random.Random(1)
    noise = [[" ".join(f"w{rng.randrange(40)}" for _ in range(12)) for _ in range(120)] for _ in range(3)]
    assert abs(auc(classifier_scores(features(*noise))) - 0.5) < 0.12


def test_swapped_labels():
    prompts, real, generated = human_answers(60)
    generated = generated[1:] + generated[:1]
    scores, swapped = (classifier_scores(features(prompts, *sides)) for sides in ((real, generated), (generated, real)))
    assert auc(scores) == pytest.approx(auc(swapped), abs=0.02)


def test_few_prompts_and_odd_texts():
    for n in (1, 2, 3):
        prompts, real, generated = human_answers(n)
        value, likeness, equal = two_sample(prompts, real, generated)
        assert 0 <= value <= 1 and 0 <= likeness <= 1 and 0 <= equal <= 1
    assert all(np.isfinite(two_sample(["", "\n"], ["", "!!"], ["�", "\x00 a"])))


def test_mauve():
    rng = np.random.default_rng(0)
    real, generated = rng.integers(0, 5, 400), np.minimum(rng.integers(0, 7, 400), 4)
    p, q = ([float((sample == k).mean()) for k in range(5)] for sample in (real, generated))
    points = [(0.0, 1.0)]
    for weight in MIXTURES[::-1]:  # from R near P to R near Q, so that x, which falls with KL(Q | R), rises
        r = [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]
        divergences = [sum(a * np.log(a / c) for a, c in zip(shares, r, strict=True) if a > 0) for shares in (q, p)]
        points.append((np.exp(-SCALE * divergences[0]), np.exp(-SCALE * divergences[1])))
    points.append((1.0, 0.0))
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in zip(points, points[1:], strict=False))
    assert mauve(real, generated) == pytest.approx(area, abs=1e-9)
    assert mauve(real, real) == pytest.approx(1)
    assert mauve(np.zeros(10, int), np.ones(10, int)) < 0.03
    assert mauve(real, generated) == pytest.approx(mauve(generated, real), abs=1e-6)


def test_embeddings(tiny_folder):
    """Embeddings are the mean states of transformers' own forward, and are appended to the features."""
    prompts, real, generated = human_answers(20)
    states = embed(str(tiny_folder), [*prompts, *prompts], [*real, *generated], torch.device("cpu"))
    model, tokenizer = AutoModel.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    with torch.no_grad():
        ids = torch.tensor([tokenizer(f"{prompts[3]}\n\n{real[3]}")["input_ids"]])
        expected = model(input_ids=ids).last_hidden_state[0].mean(0)
    assert np.allclose(states[3], expected.numpy(), atol=1e-5)
    x = features(prompts, real, generated)
    joined = with_embeddings(x, states)
    assert joined.shape == (40, x.shape[1] + states.shape[1])
    assert classifier_scores(joined).shape == clusters(joined, 0).shape == (2, 20)
