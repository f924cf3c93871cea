"""The default game with the real bundled model and data; takes minutes and packages from the registry (marked slow)."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import broken_answers
from spin.engines.logps import reference_logps
from spin.engines.packing import Continuations
from spin.evaluation.measures import rouge_l
from spin.method.pairs import read_pairs
from spin.models.load import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
RUN = ROOT / "outputs" / "smollm2-sharegpt"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def make_run() -> tuple[str, float]:
    # As a user would run it, without the variables of a `make` that runs these tests.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ARGS", "OMP"))}
    started = time.monotonic()
    result = subprocess.run(["make", "run"], cwd=ROOT, capture_output=True, text=True, timeout=1400, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, time.monotonic() - started


@pytest.fixture(scope="module")
def game() -> dict:
    make_run()
    return json.loads((RUN / "game.json").read_text())


def test_measures_improve(game):
    """The measures of later policies improve by more than the noise of few prompts."""
    by_policy = {row["policy"]: row for row in game["evaluations"]}
    assert list(by_policy) == ["start", "sft", "iter0", "iter1"]
    # SFT on the human answers makes held-out human answers likelier; self-play does not undo it.
    assert by_policy["sft"]["nll_per_token"] < by_policy["start"]["nll_per_token"] - 0.1
    assert by_policy["iter1"]["nll_per_token"] < by_policy["start"]["nll_per_token"]
    # At first human answers are easily distinguished from generated ones; self-play moves this towards even odds.
    assert by_policy["start"]["human_likelier"] > 0.7
    last = by_policy["iter1"]["human_likelier"]
    assert abs(last - 0.5) < abs(by_policy["start"]["human_likelier"] - 0.5)
    assert by_policy["iter0"]["margin"] > 0
    # The two-sample tests agree: the start is distinguished reliably, the last policy less well.
    start, end = by_policy["start"], by_policy["iter1"]
    assert start["classifier_auc_interval"][0] > 0.7 and end["classifier_auc"] < start["classifier_auc"] - 0.05
    assert start["mauve"] < 0.4 and end["mauve_if_equal"] > 0.8
    # One policy's MAUVE on 96 prompts is uncertain by 0.2 and more, so the mean over the trained policies is tested.
    trained = [by_policy[name]["mauve"] for name in ("sft", "iter0", "iter1")]
    assert start["mauve"] < sum(trained) / 3 - 0.15


def test_broken_answers_detected(game):
    """Measures that can detect a fault of broken answers do so far outside of their noise."""
    measured = broken_answers.measure_answers([])
    for kind in ("human answers to other prompts", "one word repeated", "one answer to all prompts"):
        row = measured[kind]
        assert row["human_likelier_interval"][0] > 0.5, kind
        assert row["classifier_auc_interval"][0] > 0.6, kind
        assert row["mauve_interval"][1] < 0.5 < 0.8 < row["mauve_if_equal"], kind
    repeated, same, shuffled = (
        measured[kind] for kind in ("one word repeated", "one answer to all prompts", "human answers, words shuffled")
    )
    assert repeated["distinct_2"] < 0.1 and repeated["diversity"] < 0.1 and same["diversity"] < 0.1
    assert repeated["rouge_l_interval"][1] < measured["the policy's answers"]["rouge_l_interval"][0]
    assert shuffled["classifier_auc_interval"][0] > 0.8 and shuffled["human_likelier"] > 0.9


def test_first_step_policy_equals_opponent(game):
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    first_rows = [row for row in rows if row["stage"] == "train" and row["step"] == 0]
    assert len(first_rows) == 2
    for row in first_rows:
        assert row["loss/spin"] == pytest.approx(0.6931, abs=0.02)
        assert abs(row["rewards/margins"]) < 0.05


def test_stored_scores_match_opponent(game):
    """Packed bf16 scores approximate the fp32 forward pass of the saved SFT model, one sequence at a time."""
    model = load_model(RUN / "sft" / "policy", torch.float32, torch.device("cpu"))
    pairs, logps = read_pairs(RUN / "iter0" / "pairs.parquet")
    for k, pair in enumerate(pairs[:3]):
        real, generated = reference_logps(model, Continuations(pair.prompt_ids, (pair.real_ids, pair.generated_ids)))
        assert logps["opponent"]["real"][k].item() == pytest.approx(real.sum().item(), abs=2)
        assert logps["opponent"]["generated"][k].item() == pytest.approx(generated.sum().item(), abs=3)


def test_tokenizer_splits_digits(game):
    for folder in ("sft", "iter1"):
        tokenizer = load_tokenizer(RUN / folder / "policy")
        assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n2. in 1995").input_ids) == "ĊĊ 2 . Ġin Ġ 1 9 9 5".split()


def test_policy_in_transformers_pipeline(game):
    """A policy works in a transformers pipeline, as the README states."""
    from transformers import pipeline

    chat = pipeline("text-generation", str(RUN / "iter1" / "policy"))
    turns = chat([{"role": "user", "content": "Why is the sky blue?"}], max_new_tokens=32, do_sample=False)
    answer = turns[0]["generated_text"][-1]["content"]
    assert len(answer.split()) > 5 and rouge_l(answer, "the sky is blue because") > 0


def test_memory_and_second_run(game):
    assert game["peak_memory_gib"] <= 6
    output, seconds = make_run()
    assert "nothing was computed again" in output
    assert seconds < 90  # it takes 20 on an idle machine


def test_chitchat(tmp_path):
    """The second packaged data set is read."""
    words = ["data=chitchat", "plan=true", f"store.path={tmp_path}/store", f"hydra.run.dir={tmp_path}/run"]
    command = [ROOT / ".venv/bin/python", "run.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 stages to reuse" in result.stdout
