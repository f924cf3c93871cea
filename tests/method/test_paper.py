"""The paper's run end to end: both recipes, unchanged, on a small data set and model in the layout of the hub.

The settings beside `experiment=` are paths, sizes and, except in one slow test, an engine that runs without torchrun.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import paper_memory
from spin.config import schema
from spin.engines import memory
from spin.method.pairs import read_pairs
from spin.models.find import find_model
from spin.runtime.errors import UserError
from tests import hub
from tests.config.test_schema import ROOT, composed, load

PAPER = ["experiment=paper", "engine=single"]
ONE_GPU = ["experiment=paper_one_gpu"]
SIZE, HELD_OUT = 64, 8
# Per iteration: learning rate, beta, opponent, source of replayed pairs (paper, section 6.1 and appendix B).
ITERATIONS = [
    (5e-7, 0.1, "start", []),
    (5e-7, 0.1, "iter0", ["iter0"]),
    (1e-7, 0.1, "iter1", ["iter1"]),
    (1e-7, 5.0, "iter2", ["iter2"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    hub.write_zephyr(folder / "zephyr-7b-sft-full")
    return SimpleNamespace(folder=folder, talks=hub.write_ultrachat(folder / "ultrachat_200k"))


def words(place, run):
    settings = {
        "data.path": place.folder / "ultrachat_200k",
        "data.size": SIZE,
        "data.held_out": HELD_OUT,
        "evaluation.bootstrap": 50,
        "cache.path": place.folder / "cache",
        "store.path": place.folder / "store",
        "hydra.run.dir": place.folder / run,
        "tracking.wandb": "disabled",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def model(place):
    return f"model.path={place.folder / 'zephyr-7b-sft-full'}"


def play(place, games, run, recipe):
    result = games.play(*recipe, model(place), *words(place, run))
    return outcome(place, run, result)


def outcome(place, run, result):
    assert result.returncode == 0, result.stdout + result.stderr
    folder = place.folder / run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        stdout=result.stdout,
        folder=folder,
        training=[row for row in rows if row["stage"] == "train"],
        pairs=[read_pairs(folder / f"iter{t}" / "pairs.parquet")[0] for t in range(4)],
        logps=[read_pairs(folder / f"iter{t}" / "pairs.parquet")[1]["opponent"] for t in range(4)],
        manifests=[json.loads((folder / f"iter{t}" / "manifest.json").read_text()) for t in range(4)],
        game=json.loads((folder / "game.json").read_text()),
    )


@pytest.fixture(scope="module")
def paper(place, games):
    return play(place, games, "paper", PAPER)


# --- the recipes ------------------------------------------------------------------------------------------------------


def test_recipe_equals_the_papers():
    config = load(*PAPER)
    model, data, schedule, optimizer = config.model, config.data, config.schedule, config.optimizer
    assert model.path == "alignment-handbook/zephyr-7b-sft-full" and model.adapter == model.quantization == "none"
    assert model.revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    assert (data.path, data.splits, data.size) == ("HuggingFaceH4/ultrachat_200k", None, 50_000)
    assert (data.turns, data.template, data.max_length, data.filter) == ("first", "paper", 2048, "none")
    assert (schedule.iterations, schedule.epochs, schedule.batch_size) == (4, 2, 64)
    assert (schedule.warmup_ratio, schedule.replay, schedule.sft_epochs) == (0.1, "previous", 0)
    assert (optimizer.name, optimizer.weight_decay, optimizer.states) == ("rmsprop", 0, "fp32")
    assert (config.loss.link, config.loss.reference, config.loss.sft_weight) == ("logistic", "opponent", 0)
    for t, (lr, beta, *_) in enumerate(ITERATIONS):
        assert (schema.value_at_iteration(optimizer.lr, t), schema.value_at_iteration(config.loss.beta, t)) == (
            lr,
            beta,
        )
    assert (config.generation.temperature, config.generation.top_p, config.max_new_tokens) == (1, 1, 256)
    assert config.engine.precision == "bf16" and config.seed == 0


def test_one_gpu_recipe_differs_in_memory_only():
    paper, one_gpu = (OmegaConf.to_container(composed(*recipe), resolve=True) for recipe in (PAPER, ONE_GPU))
    changed = {
        f"{group}.{key}" if isinstance(value, dict) else group
        for group, value in paper.items()
        for key in (value if isinstance(value, dict) else [None])
        if value != one_gpu[group] and (key is None or value[key] != one_gpu[group][key])
    }
    assert changed == {"name", "optimizer.states", "engine.gradient_checkpointing"}
    assert one_gpu["engine"]["name"] == "single"


def test_recipes_fit_80_gib():
    lines, details = paper_memory.table()
    docs = (ROOT / "docs" / "paper.md").read_text().splitlines()
    assert [line for line in lines if line not in docs] == []
    totals = [memory.total(parts) for _, stages in details for parts in stages.values()]
    assert len(totals) == 6 and max(totals) < paper_memory.USABLE


def test_start_is_found_in_the_hub_cache(place, monkeypatch):
    """The start model is found in the hub's cache, where a download puts it."""
    config = load(*PAPER).model
    snapshot = place.folder / "hub" / f"models--{config.path.replace('/', '--')}" / "snapshots" / config.revision
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(place.folder / "zephyr-7b-sft-full")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place.folder / "hub"))
    assert find_model(config, place.folder / "cache").folder == snapshot
    with pytest.raises(UserError, match="the Hugging Face hub does not have it or cannot be reached"):
        find_model(config.model_copy(update={"revision": "0" * 40}), place.folder / "cache")


# --- what is played ---------------------------------------------------------------------------------------------------


def test_splits_and_first_rounds(place, paper):
    talks = place.talks
    rounds = {(talk[0], talk[1]): split for split, split_talks in reversed(talks.items()) for talk in split_talks}
    del rounds[talks["test_gen"][0][0], talks["test_gen"][0][1]]  # its prompt is too long
    trained = {(pair.prompt, pair.real) for pair in paper.pairs[0]}
    (measured, *_) = (place.folder / "store" / "evaluate").glob("*/held_out.parquet")
    held_out = {(pair.prompt, pair.real) for pair in read_pairs(measured)[0]}
    assert trained | held_out <= rounds.keys() and not trained & held_out
    assert (len(paper.pairs[0]), len(trained), len(held_out)) == (SIZE, SIZE, HELD_OUT)
    assert Counter(rounds[pair] for pair in trained).keys() == hub.SIZES.keys()
    read = sum(hub.SIZES.values())
    # Two conversations start with the same round and give one example.
    assert paper.game["data"]["counts"] == {
        "read": read,
        "kept": SIZE + HELD_OUT,
        "duplicate": 1,
        "prompt too long": 1,
        "not needed": read - SIZE - HELD_OUT - 2,
    }
    texts = " ".join(pair.prompt + pair.real for pairs in paper.pairs for pair in pairs)
    assert "Case 1:" in texts and "Later" not in texts and "Last" not in texts


def test_template_and_special_tokens(place, paper):
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "zephyr-7b-sft-full")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    truncated = finished = 0
    for pair in [pair for pairs in paper.pairs for pair in pairs]:
        text = f"### Instruction: {pair.prompt}\n\n### Response: "
        assert list(pair.prompt_ids) == tokenizer(text)["input_ids"]
        assert pair.prompt_ids[0] == 1 and (*pair.prompt_ids, *pair.real_ids).count(1) == 1
        assert 2 not in pair.prompt_ids
        decoded = tokenizer.decode(pair.prompt_ids + pair.real_ids)
        if pair.real == hub.LONG_ANSWER:  # truncated to 2,048 tokens in total, without an end token
            truncated += 1
            assert len(pair.prompt_ids) + len(pair.real_ids) == 2048 and 2 not in pair.real_ids
            assert f"<s> {text}{pair.real}".startswith(decoded)
        else:
            assert decoded == f"<s> {text}{pair.real}</s>" and pair.real_ids.count(2) == 1
        stopped = pair.finish_reason == "stop"
        finished += stopped
        assert pair.generated_ids.count(2) == stopped and (pair.generated_ids[-1] == 2) == stopped
        assert stopped or len(pair.generated_ids) == 256
    assert truncated and 0 < finished < sum(map(len, paper.pairs))


def check_game(game):
    """Check manifests, pairs and metrics of the four iterations."""
    pairs, weights = game.pairs, [manifest["policy"]["weights"] for manifest in game.manifests]
    for t, (lr, beta, opponent, replay) in enumerate(ITERATIONS):
        manifest = game.manifests[t]
        score, train = (manifest["stages"][stage]["made_from"] for stage in ("score", "train"))
        assert (
            manifest["iteration"] == t and manifest["policy"]["starts_as"] == manifest["opponent"]["label"] == opponent
        )
        assert t == 0 or manifest["opponent"]["weights"] == weights[t - 1] != weights[t]
        assert score["policy"] == train["start"] == manifest["opponent"]["weights"]
        assert manifest["loss"]["beta"] == train["objective"]["beta"] == beta and train["lr"] == lr
        assert manifest["replay"] == replay and train["epochs"] == 2 and train["batch_size"] == 64
        assert train["numerics"]["precision"] == "bfloat16" and train["optimizer"]["name"] == "rmsprop"

        # Its own pairs and those of the previous iteration, all scored under the current opponent.
        ids = Counter(pair.iter for pair in pairs[t])
        assert ids == ({0: SIZE} if t == 0 else {t - 1: SIZE, t: SIZE})
        new = {pair.id for pair in pairs[t] if pair.iter == t}
        assert t == 0 or new == {pair.id for pair in pairs[t - 1]}
        before = {pair.id: index for index, pair in enumerate(pairs[t - 1]) if pair.iter == t - 1} if t else {}
        replayed = [(index, pair) for index, pair in enumerate(pairs[t]) if pair.iter == t - 1]
        assert all(pair.generated_ids == pairs[t - 1][before[pair.id]].generated_ids for _, pair in replayed)
        now, old = game.logps[t]["generated"], game.logps[t - 1]["generated"]
        moved = sum(now[index] != old[before[pair.id]] for index, pair in replayed)
        assert moved >= 0.9 * len(replayed)
        assert all(values.isfinite().all() for values in game.logps[t].values())

        rows = [row for row in game.training if row["iter"] == t]
        assert len(rows) == 2 * len(pairs[t]) // 64 and [row["pairs"] for row in rows] == [64] * len(rows)
        assert rows[0]["step"] == 0 and rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
        assert max(row["learning_rate"] for row in rows) == pytest.approx(lr)
        assert all(row["grad_norm"] > 0 for row in rows)
    assert [iteration["pairs"] for iteration in game.game["iterations"]] == [SIZE, 2 * SIZE, 2 * SIZE, 2 * SIZE]

    start = None
    for t in range(4):
        folder = game.folder / f"iter{t}" / "policy"
        policy = AutoModelForCausalLM.from_pretrained(folder)
        assert policy.dtype == torch.float32 and policy.config.sliding_window == 4096
        assert AutoTokenizer.from_pretrained(folder).chat_template == hub.CHAT_TEMPLATE
        now = policy.model.layers[0].mlp.up_proj.weight
        assert start is None or 0 < (now - start).abs().max() < 1e-4  # fp32 masters keep steps that bf16 loses
        start = now.detach()
    report = (game.folder / "report.md").read_text()
    assert "| 3 | iter2 | link logistic, beta 5.0 | 1e-7 | 128 |" in report and list(
        (game.folder / "figures").glob("*.png")
    )


def test_four_iterations(paper):
    check_game(paper)
    assert [e["policy"] for e in paper.game["evaluations"]] == ["start", "iter0", "iter1", "iter2", "iter3"]


def test_one_gpu_recipe_reuses_stages(place, games, paper):
    """The start's measures, the first answers and their scores are reused."""
    folder = place.folder / "first"
    result = games.play(*ONE_GPU, "iter=0", model(place), *words(place, "first"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("reused") == 3 and "iter 0: score: reused" in result.stdout
    manifests = [json.loads((run / "iter0" / "manifest.json").read_text()) for run in (folder, paper.folder)]
    one_gpu, eight_gpus = (manifest["stages"]["train"]["made_from"] for manifest in manifests)
    assert (one_gpu["optimizer"]["states"], eight_gpus["optimizer"]["states"]) == ("bf16", "fp32")
    assert all(one_gpu[key] == eight_gpus[key] for key in ("scores", "lr", "objective"))
    assert manifests[0]["policy"]["weights"] != manifests[1]["policy"]["weights"]


@pytest.mark.slow
def test_two_ranks_play_the_recipe(place):
    """The command for eight GPUs (DeepSpeed, ZeRO-3, bf16) runs in two processes on a CPU."""
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 run.py".split()]
    settings = ["experiment=paper", model(place), *words(place, "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launch, *settings], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    game = outcome(place, "two", result)
    check_game(game)
    assert all(manifest["stages"]["train"]["made_from"]["engine"] == "deepspeed" for manifest in game.manifests)
    assert "2 processes, ZeRO stage 3" in game.stdout


@pytest.mark.slow
def test_one_gpu_recipe(place, games):
    check_game(play(place, games, "paper_one_gpu", ONE_GPU))
