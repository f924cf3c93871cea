"""Tests of engine=deepspeed: two real processes (gloo, CPU) against one: losses, weights, answers, checkpoints, games."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spin.engines.base import MASTERS
from spin.engines.deepspeed import check_deepspeed
from spin.engines.memory import bytes_per_weight
from spin.engines.packing import balance_by_tokens
from spin.method.pairs import read_pairs
from spin.runtime.errors import UserError
from spin.runtime.process_group import SINGLE_PROCESS
from spin.runtime.shards import compute_shards
from tests.config.test_schema import load
from tests.conftest import random_items, small_model
from tests.engines.ranks_worker import Case, answer_and_score, play
from tests.engines.test_memory import LOAD
from tests.games import Place
from tests.models.test_adapters import adapted

ROOT = Path(__file__).parents[2]
TIMINGS = {"tokens_per_second", "pairs_per_second"}


def torchrun(size: int, *words: str, timeout: float = 250, env: dict[str, str] | None = None):
    """Run `torchrun --nproc-per-node SIZE *words` and wait for its end."""
    return subprocess.run(
        launch(size, *words),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch(size: int, *words: str) -> list[str]:
    """Return torchrun's command line; `--standalone` selects a free port."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [*runner, *words]


class Results:
    """The results of `cases` on `size` ranks, in `folder`, and of the same cases in one process."""

    def __init__(self, folder: Path, cases: list[Case], size: int = 2, shared: str | None = None):
        self.folder, self.cases = folder, {case.name: case for case in cases}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cases.json").write_text(json.dumps({"cases": [asdict(case) for case in cases], "shared": shared}))
        done = torchrun(size, "-m", "tests.engines.ranks_worker", str(folder))
        assert done.returncode == 0, done.stdout + done.stderr
        self.printed = done.stdout + done.stderr

    def alone(self, name: str) -> Path:
        """Return the folder of a case's results in one process, which trains the case if the folder is missing."""
        if not (self.folder / "alone" / name).exists():
            play(self.cases[name], self.folder / "alone")
        return self.folder / "alone" / name

    def read(self, name: str) -> tuple[dict, list[dict]]:
        """Return the facts and rows that the ranks wrote."""
        facts, rows = (json.loads((self.folder / name / f"{part}.json").read_text()) for part in ("facts", "rows"))
        return facts, rows

    def weight_changes(self, name: str, folder: Path | None = None) -> torch.Tensor:
        """Return the change of every weight by training, as one vector."""
        saved = weights_of((folder or self.folder / name) / "policy")
        start = weights_of(Path(self.cases[name].model))
        assert saved.keys() == start.keys()
        return torch.cat([(saved[key].double() - start[key].double()).flatten() for key in sorted(saved)])

    def compare(self, name: str) -> None:
        """Assert that rows and weights of the ranks are near those of one process.

        In fp32 the order of sums changes a gradient by 1e-6 of its size. RMSprop and AdamW divide a gradient by its size, so
        the few weights whose gradients consist of rounding errors change by the full learning rate in either direction: the
        bound applies to all changes together. In bf16 a gradient is rounded to 2^-9 of its size when it is summed over
        layers and, at stage 0, over micro-batches and ranks, and later log-probs use weights that differ in the last bit.
        """
        fp32 = self.cases[name].precision == "fp32"
        single_folder = self.alone(name)
        rows, expected = self.read(name)[1], json.loads((single_folder / "rows.json").read_text())
        assert len(rows) == len(expected) > 0
        for row, single_row in zip(rows, expected, strict=True):
            assert row.keys() == single_row.keys()
            for key in row.keys() - TIMINGS:
                if isinstance(row[key], float):
                    bound = dict(rel=1e-4, abs=1e-4) if fp32 else dict(rel=0.02, abs=0.1)
                    assert row[key] == pytest.approx(single_row[key], nan_ok=True, **bound), (key, row, single_row)
                else:
                    assert row[key] == single_row[key], key
            assert row["loss"] == pytest.approx(single_row["loss"], nan_ok=True, rel=1e-5 if fp32 else 0.01)
        changes, expected_changes = self.weight_changes(name), self.weight_changes(name, single_folder)
        assert expected_changes.norm() > 0
        share = ((changes - expected_changes).norm() / expected_changes.norm()).item()
        assert share < (1e-4 if fp32 else 0.1), (name, share)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def same_weights(first_folder: Path, second_folder: Path) -> bool:
    first, second = weights_of(first_folder), weights_of(second_folder)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """This process uses one thread, like each rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory):
    """The tiny model (tied embeddings), an untied one, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("ranks-models")
    untied = small_model("llama")
    untied.save_pretrained(folder / "untied")
    (folder / "untied" / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    (folder / "untied" / "tokenizer_config.json").write_bytes((tiny_folder / "tokenizer_config.json").read_bytes())
    adapted(tiny_folder, folder / "adapter")
    return {"tied": str(tiny_folder), "untied": str(folder / "untied"), "adapter": str(folder / "adapter")}


def some_cases(models: dict[str, str], folder: Path) -> list[Case]:
    tied, untied = models["tied"], models["untied"]
    adamw = dict(model=tied, stage=3, optimizer="adamw")
    return [
        Case("0", tied, 0),
        Case("0 bf16 adamw", tied, 0, "bf16", "adamw"),
        Case("1 bf16 untied", untied, 1, "bf16"),
        Case("2 adamw offload", tied, 2, optimizer="adamw", offload=True),
        Case("2 bf16 small steps", tied, 2, "bf16", lr=1e-7),
        Case("3 adamw checkpointing", checkpointing=True, **adamw),
        Case("3 bf16 small steps", tied, 3, "bf16", lr=1e-7),
        Case("3 broken", tied, 3, objective="loss", broken=[1, 2, 4], epochs=2),
        Case("3 lora", models["adapter"], 3, base=tied),
        Case("3 cut", checkpoints=str(folder / "kept"), cut=2, **adamw),
        Case("3 again", checkpoints=str(folder / "kept"), **adamw),
        Case("3 after one", checkpoints=str(folder / "kept by one"), **adamw),
    ]


def more_cases(models: dict[str, str], folder: Path) -> list[Case]:
    tied, untied = models["tied"], models["untied"]
    broken = dict(broken=[1, 2, 4], epochs=2)
    return [
        Case("0 bf16 adamw", tied, 0, "bf16", "adamw"),
        Case("1 adamw", untied, 1, optimizer="adamw", tokens=4096),
        Case("2", tied, 2, tokens=200),
        Case("2 bf16", untied, 2, "bf16", checkpointing=True),
        Case("3 bf16 untied adamw", untied, 3, "bf16", "adamw", offload=True),
        Case("3 one pass", untied, 3, tokens=4096),
        Case("0 broken", tied, 0, objective="loss", **broken),
        Case("1 broken gradient bf16", tied, 1, "bf16", objective="gradient", **broken),
        Case("2 broken gradient", tied, 2, objective="gradient", **broken),
        Case("0 lora bf16", models["adapter"], 0, "bf16", base=tied),
        Case("2 lora", models["adapter"], 2, base=tied),
        Case("2 bf16 cut", tied, 2, "bf16", "adamw", checkpoints=str(folder / "kept 2"), cut=2),
        Case("2 bf16 again", tied, 2, "bf16", "adamw", checkpoints=str(folder / "kept 2")),
        Case("2 bf16 whole", tied, 2, "bf16", "adamw"),
        Case("0 bf16 cut", tied, 0, "bf16", "adamw", checkpoints=str(folder / "kept 0"), cut=2),
        Case("0 bf16 again", tied, 0, "bf16", "adamw", checkpoints=str(folder / "kept 0")),
    ]


@pytest.fixture(scope="module")
def two(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    cases = some_cases(models, folder)
    play(replace(cases[-1], name="cut by one", cut=2), folder)  # leaves a checkpoint, from which two ranks resume
    return Results(folder, cases, shared=models["untied"])


@pytest.fixture(scope="module")
def more(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("more-ranks")
    return Results(folder, more_cases(models, folder))


# --- training -----------------------------------------------------------------------------------------------------------


def test_training_matches_one_process(two):
    for name, case in two.cases.items():
        if case.checkpoints is None:
            two.compare(name)
    rows = two.read("0")[1]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [row["pairs"] for row in rows] == [3, 3, 3, 1]  # 2 and 1 on the ranks, in the last step 1 and 0
    assert all(row["grad_norm"] > two.cases["0"].clip for row in rows)  # clipped


@pytest.mark.slow
def test_more_trainings_match_one_process(more):
    for name, case in more.cases.items():
        if case.checkpoints is None:
            more.compare(name)
    assert same_weights(more.folder / "2 bf16 again" / "policy", more.folder / "2 bf16 whole" / "policy")
    assert same_weights(more.folder / "0 bf16 again" / "policy", more.folder / "0 bf16 adamw" / "policy")
    check_bytes(more)


def test_ranks_run_equally_many_passes(two):
    """A rank without a batch runs a pass with weight 0, because ZeRO 3 gathers weights in every pass."""
    facts, _ = two.read("0")
    assert facts["passes of all"] == 2 * facts["passes"] > 2 * 4


def test_first_logps_are_bit_identical(two):
    """The first log-probs have the bits of the scores, also in bf16, where DeepSpeed would round rotary positions."""
    for name, case in two.cases.items():
        if case.cut is not None or case.checkpoints is None:
            assert two.read(name)[0]["first"] == 0.0, name


@pytest.mark.parametrize("name", ["2 bf16 small steps", "3 bf16 small steps"])
def test_masters_keep_full_precision(two, name):
    """All steps together are below the resolution of bf16, so masters that start as rounded weights would be noticed."""
    moved = two.weight_changes(name).abs()
    assert 0 < moved.max() < 4 * 10 * 1e-7 * 1.1  # RMSprop's first steps are ten times the learning rate
    assert (moved > 1e-8).double().mean() > 0.5
    saved, start = weights_of(two.folder / name / "policy"), weights_of(Path(two.cases[name].model))
    assert any((start[key] != start[key].bfloat16().float()).any() for key in start)
    unchanged = torch.cat([(saved[key].bfloat16() == start[key].bfloat16()).flatten() for key in start])
    assert unchanged.double().mean() > 0.95


def test_nonfinite_step_is_skipped_by_all_ranks(two):
    rows = two.read("3 broken")[1]  # the weights are compared above
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2, 3, 3, 3]
    assert [math.isnan(row["grad_norm"]) for row in rows] == [False, True, True, False, True, False, False]


def test_only_the_adapter_is_trained_and_saved(two):
    facts, _ = two.read("3 lora")
    assert facts["trained"] and all(".lora_" in name for name in facts["trained"])
    assert all(".lora_" in name for name in weights_of(two.folder / "3 lora" / "policy"))


def check_bytes(results: Results) -> None:
    for name, case in results.cases.items():
        sizes = results.read(name)[0]["bytes"]
        numbers = sum(value.numel() for value in weights_of(Path(case.model)).values())
        load = replace(LOAD, precision=case.precision, optimizer=case.optimizer, zero_stage=case.stage, ranks=2)
        expected = bytes_per_weight(load)
        for part in sizes if case.base is None else ():  # parts have equal lengths, so the last is padded
            assert sizes[part] == pytest.approx(numbers * expected[part], rel=0.01), (name, part)


def test_memory_estimate_matches_a_rank(two):
    check_bytes(two)


def test_save_leaves_the_engine_usable(two):
    for name, case in two.cases.items():
        facts, _ = two.read(name)
        assert facts["after close"] == "this engine is closed", name
        if case.cut is None and case.base is None:  # the files of an adapter have other names
            policy, state = weights_of(two.folder / name / "policy"), load_file(two.folder / name / "state" / MASTERS)
            assert state and all(torch.equal(policy[key], value) for key, value in state.items()), name


# --- checkpoints --------------------------------------------------------------------------------------------------------


def test_resume_is_bit_identical(two):
    facts, rows = two.read("3 again")
    uninterrupted = two.read("3 adamw checkpointing")[1]
    assert facts["restored"] == 2
    assert [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows] == [
        {k: v for k, v in row.items() if k not in TIMINGS} for row in uninterrupted
    ]
    assert same_weights(two.folder / "3 again" / "policy", two.folder / "3 adamw checkpointing" / "policy")


def test_resume_on_another_number_of_ranks(two):
    """A checkpoint resumes on another number of ranks. AdamW's next update depends on the number of updates."""
    expected = two.weight_changes("3 adamw checkpointing", two.alone("3 adamw checkpointing"))
    assert two.read("3 after one")[0]["restored"] == 2
    assert (two.weight_changes("3 after one") - expected).norm() < 1e-4 * expected.norm()
    checkpoint = checkpoint_at(two, 3)
    play(replace(two.cases["3 again"], name="one after two", checkpoints=str(checkpoint)), two.folder)
    facts, _ = two.read("one after two")
    assert facts["restored"] == 3
    assert (two.weight_changes("3 again", two.folder / "one after two") - expected).norm() < 1e-4 * expected.norm()


def checkpoint_at(two: Results, step: int) -> Path:
    """Return a new folder that contains only the checkpoint of `step`."""
    folder = two.folder / f"kept at {step}, {time.monotonic_ns()}"
    shutil.copytree(two.folder / "kept" / f"step-{step:08d}", folder / f"step-{step:08d}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_resume_on_other_ranks_and_stages(two, tmp_path, size):
    cases = [
        replace(two.cases["3 again"], name=f"stage {stage}", stage=stage, checkpoints=str(checkpoint_at(two, 3)))
        for stage in (0, 2, 3)
    ]
    results = Results(tmp_path, cases, size)
    expected = two.weight_changes("3 adamw checkpointing", two.alone("3 adamw checkpointing"))
    for case in cases:
        assert results.read(case.name)[0]["restored"] == 3
        assert (results.weight_changes(case.name) - expected).norm() < 1e-4 * expected.norm()


# --- shared work --------------------------------------------------------------------------------------------------------


def test_balance_by_tokens():
    for count in (1, 2, 7, 40):
        items = random_items(count, seed=count)
        for ranks in (1, 2, 3, 8):
            shares = balance_by_tokens(items, ranks)
            assert len(shares) == ranks and sorted(i for share in shares for i in share) == list(range(count))
            tokens = [sum(items[i].tokens for i in share) for share in shares]
            assert max(tokens) - min(tokens) <= max(item.tokens for item in items)


def test_shared_answers_and_scores(two, models):
    """A damaged shard is computed again by one rank."""
    results = [json.loads((two.folder / f"shared-{rank}.json").read_text()) for rank in (0, 1)]
    expected = json.loads(json.dumps(answer_and_score(Path(models["untied"]), lambda name: compute_shards, 2)))
    for answers, logps in (result[when] for result in results for when in ("first", "again")):
        assert answers == expected[0]
        assert logps == pytest.approx(expected[1], abs=1e-4)
    (message,) = [line for result in results for line in result["messages"]]
    assert "00002" in message and "recomputing" in message


def test_process_group(two):
    results = [json.loads((two.folder / f"shared-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(results[0]["taken"] + results[1]["taken"]) == list(range(200))
    for result in results:
        assert result["counted"] == 3 and result["shared"] == {"rank": 0}
        assert result["most"] == 1 and result["total"] == 1 and result["mean"] == 3
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*results[1]["files"]}
    assert sorted(result["firsts"] for result in results) == [0, 3]  # the same rank at each call
    assert SINGLE_PROCESS.broadcast(5) == 5
    assert SINGLE_PROCESS.all_reduce_max(2) == 2 and SINGLE_PROCESS.all_reduce_sum(2) == 2
    assert SINGLE_PROCESS.mean(torch.tensor([1.0, 2.0])) == 1.5 and SINGLE_PROCESS.is_first_to_fail()


def test_library_is_quiet(two):
    lines = [line for line in two.printed.splitlines() if line.strip()]
    assert lines == [], lines[:10]


# --- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.adapter=lora", "model.quantization=nf4"], "model.quantization=nf4"),
        (["optimizer=rmsprop8bit"], "rmsprop8bit"),
        (["optimizer.states=bf16"], "optimizer.states=bf16: engine=deepspeed shards fp32 states only"),
        (["engine.zero_stage=0", "engine.offload_optimizer=true"], "engine.offload_optimizer=True"),
        (["engine.zero_stage=4"], "engine.zero_stage=4: must be less than or equal to 3"),
    ],
)
def test_unsupported_settings(words, message):
    with pytest.raises(UserError) as error:
        load("engine=deepspeed", *words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_deepspeed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "deepspeed" else find(name))
    with pytest.raises(UserError, match=r"pip install deepspeed==\d"):
        check_deepspeed()


# --- games --------------------------------------------------------------------------------------------------------------

GAME = ("engine=deepspeed", "engine.precision=fp32", "checkpoint.steps=1", "schedule.batch_size=4")


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "stopped by"))]


def play_ranks(place: Place, *words: str, run: str = "run", size: int = 2) -> subprocess.CompletedProcess:
    done = torchrun(size, "run.py", *place.words(*words, run=run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr
    return done


def assert_near(place: Place, ranks: str, single: str) -> None:
    """Assert that the rows of two runs agree until the end of iteration 0, and closely until its first update.

    RMSprop's first updates are full steps whatever the size of a gradient, even if it is a rounding error: after them, two
    packings in one process also differ by some hundredths of the loss.
    """
    stages, updated = ("sft", "generate", "score", "train"), False
    rows, expected = (
        [row for row in place.metrics(run) if row["stage"] in stages and row["iter"] in (None, 0)]
        for run in (ranks, single)
    )
    assert {row["stage"] for row in rows} >= {"generate", "score", "train"}
    for row, expected_row in zip(rows, expected, strict=True):
        assert row.keys() == expected_row.keys() and row["step"] == expected_row["step"]
        for key in row.keys() - TIMINGS if not updated else {"loss"}:
            bound = dict(abs=0.2) if updated else dict(rel=1e-3, abs=1e-3)
            value = expected_row[key]
            assert row[key] == (pytest.approx(value, **bound) if isinstance(value, float) else value), key
        updated = updated or row["stage"] == "train"


def test_game_matches_one_process(place):
    """Self-play from the start with ZeRO 3 has the same bits in answers and scores of iteration 0 as one process."""
    words = ["schedule.sft_epochs=0", "iter=0", "tracking.wandb=offline"]
    done = play_ranks(place, *GAME, *words, run="ranks")
    assert "2 processes, ZeRO stage 3" in done.stdout and done.stdout.count("report: ") == 1
    place.play(
        "engine.precision=fp32", "schedule.batch_size=4", *words, f"store.path={place.folder}/single", run="single"
    )
    runs = place.folder / "ranks", place.folder / "single"
    (pairs, logps), (expected_pairs, expected_logps) = (read_pairs(run / "iter0" / "pairs.parquet") for run in runs)
    assert pairs == expected_pairs
    for name, values in expected_logps["opponent"].items():
        assert torch.equal(logps["opponent"][name], values), name
    assert_near(place, "ranks", "single")
    assert len(list((runs[0] / "wandb").glob("offline-run-*"))) == 1
    for name in ("report.md", "config.yaml", "game.json", "iter0/manifest.json"):
        assert (runs[0] / name).is_file()
    repeated = play_ranks(place, *GAME, *words, run="ranks")
    assert "nothing was computed again" in repeated.stdout


def test_typo_is_reported_once(place):
    done = torchrun(2, "run.py", *place.words("loss.bta=1"))
    assert done.returncode == 1 and len(errors(done)) == 1 and "bta" in errors(done)[0]
    assert done.stdout == ""


def start_second(place: Place, *words: str) -> subprocess.Popen:
    """Start run.py as torchrun starts the second of two processes, without the first."""
    env = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "run.py", *place.words(*words)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_other_ranks_wait_for_the_first_to_report(place):
    """Other ranks wait until the first reports an error; if they ended, torchrun would end the first before that."""
    second = start_second(place, "loss.bta=1")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=12)
    second.terminate()
    assert second.communicate(timeout=60) == ("", "") and second.returncode == 1


@pytest.mark.slow
def test_only_failing_rank_reports(place):
    second = start_second(place, "loss.bta=1")
    printed, errors = second.communicate(timeout=120)
    assert second.returncode == 1 and printed == "" and errors.startswith("error: ") and "bta" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["engine=deepspeed", "loss.beta=-1"], "loss.beta=-1"),
        (["engine=single"], "2 processes were started, and engine=single plays in one"),
        (["engine=deepspeed", "model.path=nowhere/at/all"], "nowhere/at/all"),
        (["-m", "engine=deepspeed", "loss.beta=0.1,0.2"], "a sweep is started as one process"),
    ],
)
def test_user_errors_are_one_line(place, words, message):
    done = torchrun(2, "run.py", *place.words(*words))
    assert done.returncode == 1 and len(errors(done)) == 1 and message in errors(done)[0], done.stderr
    assert "report:" not in done.stdout


@pytest.mark.slow
def test_games_at_other_stages_and_on_one_rank(place):
    place.play("engine.precision=fp32", "schedule.batch_size=4", f"store.path={place.folder}/single", run="single")
    for stage in (0, 2):
        words = [*GAME, f"engine.zero_stage={stage}", f"store.path={place.folder}/zero{stage}"]
        play_ranks(place, *words, run=f"zero{stage}")
        assert_near(place, f"zero{stage}", "single")
    done = place.play(*GAME, f"store.path={place.folder}/alone", run="alone")  # without torchrun
    assert "processes" not in done.stdout
    assert_near(place, "alone", "single")
    planned = play_ranks(place, *words, "plan=true", run="zero2")
    assert planned.stdout.count("11 stages to reuse, 0 to resume, 0 to play") == 1
    model = f"model.path={place.folder}/zero2/iter1/policy"
    done = play_ranks(
        place, *GAME, model, "stage=evaluate", f"evaluation.against={place.folder}/zero2/iter0/policy", run="measured"
    )
    (row,) = [row for row in place.metrics("zero2") if row["stage"] == "evaluate" and row["iter"] == 1]
    measured = place.metrics("measured")[-1]
    assert measured["iter"] is None and measured["nll_per_token"] == row["nll_per_token"]


def start_ranks(place: Place, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        launch(2, "run.py", *place.words(*words)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_path(place: Place, pattern: str, game: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not any((place.folder / "store").glob(pattern)):
        assert game.poll() is None and time.monotonic() < end, pattern
        time.sleep(0.005)


def await_steps(place: Place, count: int, game: subprocess.Popen) -> None:
    """Wait until metrics.jsonl has `count` steps of training against an opponent."""
    path, end = place.folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count('"stage": "train"') < count:
        assert game.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def wait_for_end(game: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = game.communicate(timeout=120)
    return subprocess.CompletedProcess(game.args, game.returncode, out, err)


@pytest.mark.slow
def test_resume_after_kill_and_stop(place):
    """A game ends with the same bits after SIGKILL of a rank and, at the next attempt, SIGTERM to torchrun in training."""
    words = [*GAME, "engine.zero_stage=2", "iter=0", "schedule.epochs=3"]
    play_ranks(place, *words, f"store.path={place.folder}/whole", run="whole")
    game = start_ranks(place, *words)
    await_path(place, "sft/*.part/resume/training/step-00000003", game)
    children = Path(f"/proc/{game.pid}/task/{game.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    done = wait_for_end(game)
    assert done.returncode != 0 and len(errors(done)) == 1, done.stderr
    # Either the other rank notices first, or torchrun does and stops it.
    assert errors(done)[0].startswith(("error: another process of this game has ended", "stopped by SIGTERM: "))

    rarely_saved = [word.replace("steps=1", "steps=null") for word in words] + ["checkpoint.minutes=60"]
    game = start_ranks(place, *rarely_saved)
    await_steps(place, 3, game)
    game.send_signal(signal.SIGTERM)
    done = wait_for_end(game)
    assert done.returncode != 0
    assert errors(done) == ["stopped by SIGTERM: finished work is kept, run the same command to continue."], done.stderr
    assert "SFT: resuming, training up to step" in done.stdout
    saved = re.search(r"saved the training state at step (\d+) of 18", done.stdout)
    assert saved and int(saved[1]) >= 3

    done = play_ranks(place, *words)
    assert f"iter 0: train: resuming, training up to step {saved[1]}" in done.stdout
    for name in ("sft", "iter0"):
        assert same_weights(place.folder / "run" / name / "policy", place.folder / "whole" / name / "policy")
    rows = [
        [{k: v for k, v in row.items() if k not in TIMINGS} for row in place.metrics(run)] for run in ("run", "whole")
    ]
    assert rows[0] == rows[1]
