"""Nothing lost, nothing done twice: whole games that are killed, stopped, damaged, starved and started twice at once.

Whatever happens, the next run of the same command ends in the bits of a game that nothing happened to.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.method.pairs import read_pairs
from tests.games import Place

ROOT = Path(__file__).parents[2]
# Many small shards and checkpoints, so that there is much to go on from.
WORDS = (
    "generation.batch_size=4",
    "checkpoint.shard_size=4",
    "checkpoint.steps=1",
    "schedule.batch_size=4",
    "schedule.replay=previous",
)
ORDER = ["evaluate", "sft", "evaluate", *["generate", "score", "train", "evaluate"] * 2]
TIMINGS = {"tokens_per_second", "pairs_per_second"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, games):
    """A game that nothing happens to. It makes the model that the others start from."""
    place = Place(tmp_path_factory.mktemp("reference"), games)
    place.play(*WORDS)
    return place


@pytest.fixture
def place(tmp_path, games, reference):
    shutil.copytree(reference.folder / "cache", tmp_path / "cache")
    return Place(tmp_path, games)


def records(place: Place, run: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in place.metrics(run)]


def assert_same(place: Place, reference: Place, run: str = "run") -> None:
    """Policies tensor by tensor, pairs, metrics (but for speeds), and what the report is made from; no row twice."""
    for name in ("sft", "iter0", "iter1"):
        one, other = (
            load_file(p / name / "policy" / "model.safetensors") for p in (place.folder / run, reference.folder / "run")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    for name in ("iter0", "iter1"):
        pairs = [read_pairs(p / name / "pairs.parquet") for p in (place.folder / run, reference.folder / "run")]
        assert pairs[0] == pairs[1]
        assert len({(pair.id, pair.iter) for pair in pairs[0]}) == len(pairs[0])
    rows = records(place, run)
    assert rows == records(reference, "run")
    marks = Counter((row["stage"], row["iter"], row.get("policy"), row["step"]) for row in rows)
    assert max(marks.values()) == 1
    games = [json.loads((p / "game.json").read_text()) for p in (place.folder / run, reference.folder / "run")]
    for key in ("iterations", "evaluations", "samples", "data"):
        assert games[0][key] == games[1][key]
    assert place.stages() == reference.stages()
    assert unfinished(place) == []


def unfinished(place: Place) -> list[str]:
    """The stages that are begun and not finished."""
    return sorted(path.parent.name for path in (place.folder / "store").glob("*/*.part"))


def await_stage(place: Place, game, number: int) -> bool:
    """Wait until the game plays, and is at its stage `number` or beyond it; False if the game ends before."""
    name, before = ORDER[number], ORDER[:number].count(ORDER[number])
    folder = place.folder / "store" / name
    while game.poll() is None:
        if not game.out.read_text():  # what there is to see in the store is from the game before
            time.sleep(0.002)
            continue
        finished = sum((path / "manifest.json").exists() for path in folder.glob("*[!.][!p]"))
        if finished > before or (finished == before and any(folder.glob("*.part"))):
            return True
        time.sleep(0.002)
    return False


def await_path(place: Place, game, pattern: str) -> Path:
    """Wait for something to appear in the store."""
    while game.poll() is None:
        if found := sorted((place.folder / "store").glob(pattern)):
            return found[0]
        time.sleep(0.002)
    raise AssertionError(f"the game ended with {game.returncode} before there was any {pattern}")


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file, in a file of its own: what is linked elsewhere stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.unlink()
    path.write_bytes(content)


def test_killed_at_any_moment_a_game_ends_in_the_same_bits(place, reference):
    """SIGKILL at random moments: three tries at each of the eleven stages, with what comes before and after."""
    rng = random.Random(7)
    killed: Counter[str] = Counter()
    for number in range(len(ORDER)):
        for _ in range(3):
            game = place.start(*WORDS)
            if await_stage(place, game, number):
                time.sleep(rng.uniform(0, 0.12))
                game.kill(signal.SIGKILL)
            done = game.wait()
            if done.returncode == -signal.SIGKILL:
                killed.update(set(unfinished(place)) or {"between"})
            else:
                assert done.returncode == 0, done.stderr
    assert sum(killed.values()) >= 20, killed
    assert set(killed) >= {"evaluate", "sft", "generate", "score", "train"}, killed
    place.play(*WORDS)
    assert_same(place, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_game_that_is_asked_to_stop_says_so_keeps_its_state_and_goes_on(place, reference, number):
    """Without a checkpoint being due: the signal itself has the state written."""
    rng, words = random.Random(number), [*WORDS, "checkpoint.steps=null", "checkpoint.minutes=60"]
    kept = stopped = 0
    for at in (1, 1, 3, 5, 9, 9):
        game = place.start(*words)
        if await_stage(place, game, at):
            time.sleep(rng.uniform(0.1, 0.3))
            game.kill(number)
        done = game.wait()
        if done.returncode == 0:
            continue
        assert done.returncode == 128 + number
        (line,) = done.stderr.strip().splitlines()
        assert line == f"stopped by {number.name}: what is done is kept, run the same command to go on."
        stopped += 1
        kept += "training is kept up to step" in done.stdout
    assert stopped >= 3 and kept >= 1
    place.play(*words)
    assert_same(place, reference)


def test_a_resumed_stage_says_where_it_goes_on(place, reference):
    game = place.start(*WORDS)
    await_path(place, game, "sft/*.part/resume/training/step-00000004")
    game.kill()
    game.wait()
    plan = place.play(*WORDS, "plan=true").stdout
    step = int(re.search(r"sft +start +resume +training up to step (\d+)", plan)[1])
    assert step >= 4
    assert "1 stages to reuse, 1 to resume, 9 to play" in plan
    done = place.play(*WORDS)
    assert f"SFT: going on from training up to step {step}" in done.stdout
    assert_same(place, reference)


def test_a_damaged_shard_is_made_again(place, reference):
    game = place.start(*WORDS)
    shard = await_path(place, game, "generate/*.part/resume/answers/00002").parent / "00001"
    game.kill()
    game.wait()
    flip(shard / "rows.parquet")
    done = place.play(*WORDS)
    assert f"{shard}: the content of rows.parquet has changed: this shard is made again" in done.stdout
    assert_same(place, reference)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(place, reference, damage):
    game = place.start(*WORDS)
    await_path(place, game, "train/*.part/resume/training/step-00000003")
    game.kill()
    game.wait()
    newest = sorted((place.folder / "store").glob("train/*.part/resume/training/step-*"))[-1]
    weights = newest / "masters.safetensors"
    if damage == "flipped":
        flip(weights)
    else:
        os.truncate(weights, weights.stat().st_size // 2)
    step = int(newest.name.removeprefix("step-"))
    done = place.play(*WORDS)
    assert f"{newest}: " in done.stdout and "this checkpoint is not used" in done.stdout
    assert_same(place, reference)
    assert step >= 3


@pytest.mark.parametrize(
    ("pattern", "replayed"),
    [
        ("score/*/pairs.parquet", {"score"}),
        ("generate/*/answers.parquet", {"generate"}),
        ("evaluate/*/evaluation.json", {"evaluate"}),
        ("train/*/policy/model.safetensors", {"train"}),
        ("sft/*/manifest.json", {"sft"}),
    ],
)
def test_a_damaged_stage_is_played_again_and_only_that(reference, place, pattern, replayed):
    shutil.copytree(reference.folder / "store", place.folder / "store")
    damaged = sorted((place.folder / "store").glob(pattern))[0]
    flip(damaged)
    said = {line.split()[0] for line in place.play(*WORDS, "plan=true").stdout.splitlines() if "it is damaged" in line}
    assert said == (replayed if "manifest" not in pattern else set())  # a manifest that can't be read is as none
    done = place.play(*WORDS)
    stage = Path(*damaged.parts[: len((place.folder / "store").parts) + 2])
    assert f"{stage}: " in done.stdout and "this stage is made again" in done.stdout
    assert "1 stages played" in done.stdout
    assert_same(place, reference)


def play_limited(limits: str, words: list[str]) -> subprocess.CompletedProcess:
    """Play in an interpreter of its own, which first runs the code `limits`."""
    script = (
        f"import resource, runpy, sys; {limits} sys.argv[0] = 'run.py'; runpy.run_path('run.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_disk_that_fills_up_in_the_middle_costs_nothing_that_is_done(place, reference):
    """Files may not grow past a size that the scores fit in and a checkpoint does not; then the room is there."""
    limits = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limits += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    done = play_limited(limits, place.words(*WORDS))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no space left" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert place.stages() == {"evaluate": 1} and unfinished(place) == ["sft"]
    place.play(*WORDS)
    assert_same(place, reference)


def test_the_same_command_twice_at_once_plays_one_game(place, reference):
    both = [place.start(*WORDS), place.start(*WORDS)]
    done = [game.wait() for game in both]
    assert [game.returncode for game in done] == [0, 0], done
    assert sum("another run is at work in" in game.stdout for game in done) == 1
    assert sum("11 stages played" in game.stdout for game in done) == 1
    assert sum("nothing was computed again" in game.stdout for game in done) == 1
    assert_same(place, reference)


def test_two_runs_that_share_a_store_play_each_stage_once(place, reference):
    both = [place.start(*WORDS, run=run) for run in ("one", "two")]
    done = [game.wait() for game in both]
    assert [game.returncode for game in done] == [0, 0], done
    played = [re.search(r"(\d+) stages played", game.stdout) for game in done]
    assert sum(int(found[1]) for found in played if found) == len(ORDER)
    for run in ("one", "two"):
        assert_same(place, reference, run)


def test_a_run_takes_over_from_one_that_dies_while_it_waits(place, reference):
    first = place.start(*WORDS)
    await_path(place, first, "sft/*.part/resume/training/step-00000002")
    first.kill(signal.SIGSTOP)
    second = place.start(*WORDS, run="second")
    while "another run is at the same sft stage" not in second.out.read_text():
        assert second.poll() is None, second.err.read_text()
        time.sleep(0.01)
    first.kill(signal.SIGKILL)
    first.wait()
    done = second.wait()
    assert done.returncode == 0, done.stderr
    assert "SFT: going on from training up to step" in done.stdout
    assert_same(place, reference, "second")


def test_a_learning_rate_that_breaks_the_weights_ends_with_advice(place):
    done = place.play(*WORDS, "optimizer.lr=1e30", status=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "not finite" in done.stderr and "lower the learning rate" in done.stderr
    rows = [row for row in place.metrics() if row["stage"] == "train"]
    assert rows[-1]["skipped"] >= 1 and rows[-1]["grad_norm"] is None
    assert place.stages()["train"] == 0 and place.stages()["sft"] == 1


def test_weights_that_are_not_finite_are_named(place):
    model = next((place.folder / "cache").glob("tiny-*[0-9]"))
    broken = place.folder / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = place.play(*WORDS, f"model.path={broken}", status=1)
    (line,) = done.stderr.strip().splitlines()
    assert "not finite" in line and "weights are broken" in line
    assert place.stages() == {}


def test_short_memory_ends_with_the_settings_to_lower(tmp_path, place):
    """The address space may not grow by more than 1 GiB once everything is imported: enough for all that is small, and half
    of what one mask takes, of 50 long answers in a row."""
    records = ({"prompt": f"Tell {i}.", "response": f"{i} " + "and so on " * 90} for i in range(58))
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    limits = "import re, spin.game, transformers.models.llama.modeling_llama, matplotlib.pyplot;"
    limits += "size = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024 + 2**30;"
    limits += "resource.setrlimit(resource.RLIMIT_AS, (size, size));"
    words = ["data=local", f"data.path={tmp_path}/long.jsonl", "data.template=paper", "data.held_out=50"]
    words += ["generation.max_new_tokens=8", "engine.layout=masked"]
    words += ["engine.tokens_per_row=60000", "engine.tokens_per_batch=60000"]
    done = play_limited(limits, place.words(*words))
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "memory is short: set engine.gradient_checkpointing=true" in line


def test_the_table_of_faults_names_tests_that_there_are():
    text = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text() if test else (ROOT / "tests" / file).is_file(), (
            test
        )
