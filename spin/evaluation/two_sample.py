"""Differences between model answers and human answers: a classifier two-sample test, and a divergence similar to MAUVE.

The fixed point of SPIN is a policy whose answers have the human distribution (Theorem 5.2 of the paper). Both measures
use each answer together with its prompt, so that good answers to the wrong prompts differ as well.
"""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spin.runtime.errors import explaining

Features = Any  # a sparse matrix [2 * prompts, features], human answers first

FOLDS = 5
DIMENSIONS = 20  # dimension of the space in which answers are clustered
ANSWERS_A_CLUSTER = 10  # as in the MAUVE paper, section 2.2
MOST_CLUSTERS = 500
SCALE = 5.0  # c in the MAUVE paper: how fast similarity falls with divergence
MIXTURES = np.linspace(0, 1, 27)[1:-1]
SWAPS = 200  # number of samples under equal distributions


def features(prompts: Sequence[str], real: Sequence[str], generated: Sequence[str]) -> Features:
    """Return [2 * prompts, features], human answers first: tf-idf of word and character n-grams, and a few numbers.

    The numbers are the length in words and in characters, the share of distinct words, and the overlap of answer and
    prompt. Neither the labels nor the policy's log-probs are included.
    """
    from scipy.sparse import csr_matrix, hstack  # imported locally, here and below, because it takes a second
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import StandardScaler

    answers = [*real, *generated]
    columns = []
    words = {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b|[^\w\s]"}
    for ngrams in (words, {"analyzer": "char_wb", "ngram_range": (1, 3)}):
        with contextlib.suppress(ValueError):  # no n-gram occurs in two answers
            columns.append(TfidfVectorizer(sublinear_tf=True, min_df=2, **ngrams).fit_transform(answers))
    numbers = np.array([_numbers(prompt, answer) for prompt, answer in zip([*prompts, *prompts], answers, strict=True)])
    columns.append(csr_matrix(0.5 * StandardScaler().fit_transform(numbers)))
    return hstack(columns).tocsr()


def _numbers(prompt: str, answer: str) -> list[float]:
    prompt_words, words = (re.findall(r"\w+", text.lower()) for text in (prompt, answer))
    shared = set(prompt_words) & set(words)
    return [
        np.log1p(len(words)),
        np.log1p(len(answer)),
        len(set(words)) / max(1, len(words)),
        len(shared) / max(1, len(set(prompt_words))),
        sum(word in shared for word in words) / max(1, len(words)),
        sum(len(word) for word in shared) / max(1, len(answer)),
    ]


def classifier_scores(x: Features) -> np.ndarray:
    """Return [2, prompts]: a classifier's scores of human (row 0) and model answers (row 1), higher for "human".

    It is a logistic regression, cross-validated over prompts: both answers to a prompt are scored by a model trained on
    neither. The AUC of these scores is 0.5 if the distributions are equal (Lopez-Paz and Oquab, 2017, use accuracy).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    n = x.shape[0] // 2
    if n == 1:
        return np.zeros((2, 1))
    labels, prompts = np.repeat([1, 0], n), np.tile(np.arange(n), 2)
    model, folds = LogisticRegression(C=3.0, max_iter=500), GroupKFold(min(FOLDS, n))
    return cross_val_predict(model, x, labels, groups=prompts, cv=folds, method="decision_function").reshape(2, n)


def clusters(x: Features, seed: int) -> np.ndarray:
    """Return [2, prompts]: the cluster of each answer, human answers in row 0. Clustering does not use the labels."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    n = x.shape[0]
    count = int(np.clip(n // ANSWERS_A_CLUSTER, 2, MOST_CLUSTERS))
    space = TruncatedSVD(min(DIMENSIONS, n - 1, x.shape[1] - 1), random_state=seed).fit_transform(x)
    return KMeans(count, n_init=5, random_state=seed).fit_predict(space).reshape(2, -1)


def mauve(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the similarity of two samples of clusters: 1 for equal shares, 0 for no common cluster.

    It is the area under the divergence curve of Pillutla et al. (2021), section 2.1, with the points exp(-c KL(Q|R)),
    exp(-c KL(P|R)) for mixtures R of P (human) and Q (model). The paper clusters the hidden states of a large model.
    """
    count = int(max(real.max(), generated.max())) + 1
    p, q = (np.bincount(sample, minlength=count) / len(sample) for sample in (real, generated))
    r = MIXTURES[:, None] * p + (1 - MIXTURES[:, None]) * q
    y, x = (np.exp(-SCALE * _kl(distribution, r)) for distribution in (p, q))
    x, y = np.array([1.0, *x, 0.0]), np.array([0.0, *y, 1.0])  # the curve's ends, where R is P or Q
    order = np.lexsort((-y, x))
    return float(np.trapezoid(y[order], x[order]))


def _kl(p: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return KL(p | r) of one distribution to each row of r, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / r), 0.0).sum(-1)


def mauve_if_equal(labels: np.ndarray, seed: int) -> float:
    """Return the median of `mauve` if human and model answers have the same distribution: below 1, since two samples of
    one distribution differ. It is computed from `labels` [2, prompts] by swapping the two answers of random prompts,
    which leaves the distribution of such answers unchanged."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(SWAPS):
        swap = rng.random(labels.shape[1]) < 0.5
        values.append(mauve(np.where(swap, labels[1], labels[0]), np.where(swap, labels[0], labels[1])))
    return float(np.median(values))


def check_embedder(model: str) -> None:
    """Raise UserError unless config and tokenizer of the embedding model `model` can be loaded; load no weights."""
    from transformers import AutoConfig, AutoTokenizer

    for cls in (AutoConfig, AutoTokenizer):
        _load_part(cls, model)


def _load_part(cls: Any, model: str, **settings: Any) -> Any:
    with explaining(f"evaluation.embedder={model}: no embedding model can be loaded"):
        return cls.from_pretrained(model, trust_remote_code=False, **settings)


@torch.inference_mode()
def embed(model: str, prompts: Sequence[str], answers: Sequence[str], device: torch.device) -> np.ndarray:
    """Return [answers, width]: the mean last hidden state of an embedding model over each prompt with its answer.

    `model` is a folder or hub name for AutoModel. Raises UserError if it can't be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = _load_part(AutoTokenizer, model)
    encoder = _load_part(AutoModel, model, use_safetensors=True).to(device).eval()
    longest = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", 512), 512)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # One at a time, because padding changes the hidden states of some models.
        inputs = tokenizer(f"{prompt}\n\n{answer}", truncation=True, max_length=longest, return_tensors="pt").to(device)
        rows.append(encoder(**inputs).last_hidden_state[0].float().mean(0).cpu().numpy())
    return np.stack(rows)


def with_embeddings(x: Features, embeddings: np.ndarray) -> Features:
    """Return the features with embeddings appended, which are scaled to the same total weight as the n-grams."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(embeddings) / np.sqrt(embeddings.shape[1])
    return hstack([x, csr_matrix(scaled)]).tocsr()
