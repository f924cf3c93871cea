"""Tests of complete games on a tiny model, started as users start them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.config.hydra import load
from spin.engines.logps import reference_logps
from spin.engines.packing import Continuations
from spin.generation.answers import Answer
from spin.method.pairs import Pair, read_pairs
from spin.models import tiny
from spin.models.load import load_model, load_tokenizer
from spin.pipeline import run_folder
from spin.runtime.signals import Interrupted
from spin.runtime.tables import read_parquet
from tests.games import ROOT, Games, Place


def pairs_in(path) -> list[Pair]:
    return read_pairs(path)[0]


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("game"), games)
    place.first = place.play("schedule.replay=previous")
    return place


def test_run_folder(played):
    run = played.folder / "run"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "report.md",
        "game.json",
        "iter0/pairs.parquet",
        "iter1/manifest.json",
    ):
        assert (run / name).is_file(), name
    assert list((run / "figures").glob("*.png"))
    columns = set(pq.read_table(run / "iter0" / "pairs.parquet").column_names)
    expected = "id prompt real generated finish_reason prompt_ids real_ids generated_ids opponent_logp_real opponent_logp_generated"
    assert set(expected.split()) <= columns
    assert load_model(run / "iter1" / "policy", torch.float32, torch.device("cpu"))
    assert load_tokenizer(run / "iter1" / "policy").chat_template
    assert played.stages() == {"generate": 2, "score": 2, "train": 2, "evaluate": 4, "sft": 1}
    for word in ("report: ", "trained model: ", "peak memory", "iter1"):
        assert word in played.first.stdout
    manifest = json.loads((run / "iter1" / "manifest.json").read_text())
    assert manifest["opponent"]["label"] == "iter0" and manifest["replay"] == ["iter0"]


def test_iterations_start_with_margin_0(played):
    rows = [row for row in played.metrics() if row["stage"] == "train"]
    for iteration in (0, 1):
        first = next(row for row in rows if row["iter"] == iteration)
        assert first["step"] == 0
        assert first["loss"] == pytest.approx(0.6931, abs=0.01)
        assert first["rewards/margins"] == pytest.approx(0, abs=0.02)
    keys = "loss rewards/real rewards/generated rewards/margins rewards/accuracies logps/real logps/generated grad_norm"
    assert set(f"{keys} learning_rate tokens_per_second pairs_per_second".split()) <= set(rows[0])


def test_replayed_pairs(played):
    """Iteration 1 trains on its own pairs and iteration 0's, all with log-probs of iteration 0's policy."""
    current, logps = read_pairs(played.folder / "run" / "iter1" / "pairs.parquet")
    earlier, earlier_logps = read_pairs(played.folder / "run" / "iter0" / "pairs.parquet")
    by_id = {pair.id: (pair, earlier_logps["opponent"]["generated"][index]) for index, pair in enumerate(earlier)}
    assert {pair.iter for pair in current} == {0, 1}
    opponent = load_model(played.folder / "run" / "iter0" / "policy", torch.float32, torch.device("cpu"))
    replayed = [index for index, pair in enumerate(current) if pair.iter == 0]
    for index in replayed[:6]:
        pair = current[index]
        old_pair, old_logp = by_id[pair.id]
        assert pair.generated_ids == old_pair.generated_ids
        stored = {name: values[index].item() for name, values in logps["opponent"].items()}
        assert stored["generated"] != old_logp
        real, generated = reference_logps(opponent, Continuations(pair.prompt_ids, (pair.real_ids, pair.generated_ids)))
        assert stored["real"] == pytest.approx(real.sum().item(), abs=2)
        assert stored["generated"] == pytest.approx(generated.sum().item(), abs=2)


def test_ids_are_those_sampled(played):
    tokenizer = load_tokenizer(played.folder / "run" / "iter0" / "policy")
    for pair in pairs_in(played.folder / "run" / "iter0" / "pairs.parquet"):
        assert tokenizer.decode(pair.generated_ids, skip_special_tokens=True) == pair.generated
        assert pair.real_ids[-1] == tokenizer.eos_token_id and pair.real_ids.count(tokenizer.eos_token_id) == 1
        assert (pair.generated_ids[-1] == tokenizer.eos_token_id) == (pair.finish_reason == "stop")
        text = tokenizer.decode(pair.prompt_ids)
        assert text.startswith("### Instruction: ") and text.endswith("### Response: ") and pair.prompt in text
        assert pair.generated_ids != pair.real_ids and pair.generated.strip()


def test_second_run_reuses_everything(played):
    before, rows = played.stages(), played.metrics()
    game = json.loads((played.folder / "run" / "game.json").read_text())
    repeated = played.play("schedule.replay=previous")
    assert "nothing was computed again" in repeated.stdout
    assert played.stages() == before
    assert played.metrics() == rows  # the file is replaced: no row appears twice
    repeated_game = json.loads((played.folder / "run" / "game.json").read_text())
    assert repeated_game["seconds"] == game["seconds"] and repeated_game["peak_memory_gib"] == game["peak_memory_gib"]


def test_iter_2_continues_after_iter_1(played):
    before = played.stages()
    played.play("schedule.replay=previous", "iter=2", run="longer")
    assert played.stages() - before == {"generate": 1, "score": 1, "train": 1, "evaluate": 1}
    assert (played.folder / "longer" / "iter2" / "policy").is_dir()


def test_sweep_over_beta_shares_stages(played):
    before = played.stages()
    played.play("-m", "iter=0", "loss.beta=0.2,0.5", f"hydra.sweep.dir={played.folder}/sweep")
    assert played.stages() - before == {"train": 2, "evaluate": 2}


def test_same_bits_in_a_new_interpreter(played, place):
    """A game has the same bits in a new interpreter, which is not forked from the server and has another hash seed."""
    done = subprocess.run(
        [sys.executable, "run.py", *place.words("schedule.replay=previous")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == played.first.stderr
    for name in ("iter0", "iter1"):
        first, second = (load_file(p.folder / "run" / name / "policy" / "model.safetensors") for p in (played, place))
        assert all(torch.equal(first[key], second[key]) for key in first)
        pairs = [pq.read_table(p.folder / "run" / name / "pairs.parquet") for p in (played, place)]
        assert pairs[0].equals(pairs[1])


def test_moved_model_is_recognised(played, tmp_path):
    model = next((played.folder / "cache").glob("tiny-*[0-9]"))
    moved = tmp_path / "elsewhere"
    shutil.copytree(model, moved)
    before = played.stages()
    words = ["iter=0", "schedule.replay=previous", f"model.path={moved}"]
    played.play(*words, run="moved")
    assert played.stages() == before
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    played.play(*words, run="changed")
    assert played.stages() - before == {"generate": 1, "score": 1, "train": 1, "evaluate": 3, "sft": 1}


def test_context_too_short(played, place):
    done = place.play("data.max_length=4000", "generation.max_new_tokens=3000", status=1)
    assert "do not fit the model's context of 1024" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_shorter_game_removes_iterations(played, tmp_path):
    run = tmp_path / "run"
    words = ["schedule.replay=previous", f"hydra.run.dir={run}"]
    played.play(*words)
    played.play(*words, "iter=0")
    assert (run / "iter0" / "policy").is_dir() and not (run / "iter1").exists()


def test_game_of_sft_alone(played):
    done = played.play("schedule.iterations=0", run="sft-alone")
    assert f"trained model: {played.folder}/sft-alone/sft/policy" in done.stdout


def test_stop_while_waiting_keeps_the_lock(tmp_path, monkeypatch):
    """A run that is stopped while another run holds its folder leaves the other's lock and folder alone."""

    @contextmanager
    def hold_lock(path, *_):
        path.touch()  # by the other run
        raise Interrupted(signal.SIGINT)
        yield

    monkeypatch.setattr(run_folder, "hold_lock", hold_lock)
    with pytest.raises(Interrupted), run_folder.open_run(load("experiment=smoke"), tmp_path / "run", None):
        pass
    assert (tmp_path / "run" / ".lock").exists()


def test_files_of_the_user_stay(played, tmp_path):
    run = tmp_path / "run"
    words = ["schedule.replay=previous", f"hydra.run.dir={run}"]
    played.play(*words)
    note = run / "iter1" / "policy" / "README.md"
    note.write_text("mine")
    played.play(*words)
    assert note.read_text() == "mine" and (run / "iter1" / "policy" / "model.safetensors").is_file()
    played.play(*words, "iter=0")
    assert [path.name for path in (run / "iter1").rglob("*") if path.is_file()] == ["README.md"]


def test_unwritable_store(tmp_path, place):
    (tmp_path / "file").write_text("")
    done = place.play(f"store.path={tmp_path}/file/store", status=1)
    assert str(tmp_path / "file") in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_held_out_prompts_are_not_trained_on(played):
    trained = {pair.prompt for t in (0, 1) for pair in pairs_in(played.folder / "run" / f"iter{t}" / "pairs.parquet")}
    for folder in (played.folder / "store" / "evaluate").glob("*/held_out.parquet"):
        assert not trained & {pair.prompt for pair in pairs_in(folder)}


def test_local_chat_data_and_model(played, tmp_path, place):
    record = '{"messages": [{"role": "user", "content": "Say %d."}, {"role": "assistant", "content": "Yes: %d."}]}\n'
    (tmp_path / "chat.jsonl").write_text("".join(record % (i, i) for i in range(20)))
    model = next((played.folder / "cache").glob("tiny-*[0-9]"))
    place.play(f"model.path={model}", "data=local", f"data.path={tmp_path}/chat.jsonl", "data.held_out=4", "iter=0")
    (answers_file,) = (tmp_path / "store" / "generate").glob("*/answers.parquet")
    answers = {answer.id: answer.text for answer in read_parquet(Answer, answers_file)}
    assert len(answers) == 16
    pairs = pairs_in(tmp_path / "run" / "iter0" / "pairs.parquet")
    generated = {pair.id: pair.generated for pair in pairs}
    # Answers that are empty or equal to the human's make no pair; which ones depends on the processor's rounding.
    assert generated == {id: text for id, text in answers.items() if text.strip() and id in generated}
    assert all(
        not answers[id].strip() or re.fullmatch(r"Yes: \d+\.", answers[id]) for id in answers.keys() - generated.keys()
    )
    assert len(pairs) > 8 and all(pair.real == f"Yes: {pair.prompt[4:-1]}." for pair in pairs)


def test_rejected_answers_are_played(played, tmp_path, place):
    record = '{"prompt": "Say %d.", "chosen": "Yes: %d.", "rejected": "No: %d."}\n'
    (tmp_path / "pairs.jsonl").write_text("".join(record % (i, i, i) for i in range(20)))
    model = next((played.folder / "cache").glob("tiny-*[0-9]"))
    data = ["data=local", f"data.path={tmp_path}/pairs.jsonl", "data.held_out=4", "data.generated=file"]
    done = place.play(f"model.path={model}", *data, "iter=0")
    pairs = pairs_in(tmp_path / "run" / "iter0" / "pairs.parquet")
    assert len(pairs) == 16 and all(pair.generated == pair.real.replace("Yes", "No") for pair in pairs)
    assert all(pair.finish_reason == "stop" and pair.generated_ids[-1] == pair.real_ids[-1] for pair in pairs)
    assert done.stdout.count("the chosen (or real) one is the human answer") == 1


def test_all_answers_empty(played, tmp_path, place):
    """A game without pairs ends. With a final norm of 0 all logits are equal, and greedy answers are one special token."""
    model = next((played.folder / "cache").glob("tiny-*[0-9]"))
    mute = tmp_path / "mute"
    shutil.copytree(model, mute)
    weights = load_file(mute / "model.safetensors")
    weights["model.norm.weight"] *= 0
    save_file(weights, mute / "model.safetensors", metadata={"format": "pt"})
    words = [f"model.path={mute}", "schedule.sft_epochs=0", "generation=greedy"]
    done = place.play(*words, status=1)
    assert "no pair is left" in done.stderr and "24 empty" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    rows = place.metrics()
    assert rows[-1]["stage"] == "generate"  # what was computed is kept


def test_disk_too_small(played, tmp_path, place):
    last = shutil.disk_usage(tmp_path).free // 250_000  # a tiny policy is larger than that
    done = place.play(f"iter={last}", status=1)
    assert f"GiB are free, but {last + 2} policies" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_disk_fills_up(tmp_path, place):
    """With file sizes limited to 200 kB the policy cannot be written, and the game ends. Finished stages stay."""
    limit = "import resource, runpy, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv[0] = 'run.py'; runpy.run_path('run.py', run_name='__main__')"
    words = [
        "experiment=smoke",
        "tracking.wandb=disabled",
        f"cache.path={tmp_path}/cache",
        f"store.path={tmp_path}/store",
    ]
    tiny.make_tiny_model(tmp_path / "model")
    words += [f"model.path={tmp_path}/model", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run([sys.executable, "-c", limit, *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no space left" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert place.stages() == {"evaluate": 1}


def test_exit_status_after_signal(place):
    killed, interrupted = place.start("loss.beta=0.2", run="killed"), place.start(run="interrupted")
    while not (place.folder / "interrupted" / "metrics.jsonl").exists():
        assert interrupted.poll() is None, interrupted.wait()
        time.sleep(0.02)
    killed.kill()
    interrupted.kill(signal.SIGINT)
    assert killed.wait(60).returncode == -signal.SIGKILL
    done = interrupted.wait(60)
    assert done.returncode > 0
    assert "run the same command to continue" in done.stderr and len(done.stderr.splitlines()) == 1


def test_server_failure_is_reported(tmp_path):
    """The error contains the output of the failed server."""
    (tmp_path / "hydra.py").write_text("raise ImportError('broken on purpose')")
    games = Games(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken on purpose"):
                games.start("--help")
    games.close()


@pytest.mark.parametrize("link", ["hinge", "exponential", "correlation"])
def test_link(played, link):
    played.play("iter=0", f"loss={link}", run=link)
    assert played.metrics(link)[-1]["stage"] == "evaluate"


def test_adamw_padded_checkpointing(played):
    words = ["optimizer=adamw", "engine.layout=padded", "engine.precision=fp32"]
    played.play("iter=0", *words, "engine.gradient_checkpointing=true", "evaluation=none", run="other")
    first = next(row for row in played.metrics("other") if row["stage"] == "train")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_evaluate_a_policy(played):
    words = ["stage=evaluate", f"model.path={played.folder}/run/iter1/policy"]
    refused = played.play(*words, status=1)
    assert "run holds another game (" in refused.stderr and "stage=game, not evaluate" in refused.stderr
    done = played.play(*words, run="measured")
    evaluated = json.loads((played.folder / "measured" / "game.json").read_text())
    game = json.loads((played.folder / "run" / "game.json").read_text())
    (row,), expected = evaluated["evaluations"], game["evaluations"][-1]
    assert row["policy"] == "iter1/policy" and evaluated["iterations"] == []
    for name in ("nll_per_token", "human_likelier", "length_auc", "rouge_l", "model_length", "n"):
        assert row[name] == expected[name], name
    assert "likelier" in done.stdout and (played.folder / "measured" / "report.md").is_file()
    assert not (played.folder / "measured" / "iter0").exists()


def test_template_is_copied_to_policies(played, tmp_path):
    """A changed template with the same weights leads to new policies, which contain a copy of it."""
    model = tmp_path / "model"
    shutil.copytree(next((played.folder / "cache").glob("tiny-*[0-9]")), model)
    template = model / "chat_template.jinja"
    template.write_text("{# mine #}" + template.read_text())
    played.play("iter=0", "schedule.replay=previous", f"model.path={model}", f"hydra.run.dir={tmp_path}/run")
    assert (tmp_path / "run" / "iter0" / "policy" / "chat_template.jinja").read_text() == template.read_text()


def test_evaluate_two_policies(played):
    words = [f"model.path={played.folder}/run/iter1/policy", f"evaluation.against={played.folder}/run/iter0/policy"]
    done = played.play("stage=evaluate", *words, run="against")
    evaluated = json.loads((played.folder / "against" / "game.json").read_text())
    expected = json.loads((played.folder / "run" / "game.json").read_text())["evaluations"][-1]
    assert [row["policy"] for row in evaluated["evaluations"]] == ["iter0/policy", "iter1/policy"]
    # The margin of iteration 1 over its opponent, computed in other rows, is equal up to rounding.
    assert evaluated["evaluations"][1]["margin"] == pytest.approx(expected["margin"], abs=1e-3)
    assert "iter1/policy against iter0/policy, n=8: " in done.stdout
    same = [words[0], f"evaluation.against={played.folder}/run/iter1/policy"]
    assert "no difference seen" in played.play("stage=evaluate", *same, run="itself").stdout


def test_trained_prompts_are_not_measured(played):
    """Prompts that the policy was trained on are not measured, even if another seed holds them out."""
    policy = f"model.path={played.folder}/run/iter1/policy"
    done = played.play("stage=evaluate", policy, "seed=5", run="elsewhere")
    assert re.search(r"\d+ examples are not held out: the model was trained on their prompts", done.stdout)
    trained = {pair.prompt for t in (0, 1) for pair in pairs_in(played.folder / "run" / f"iter{t}" / "pairs.parquet")}
    stages = json.loads((played.folder / "elsewhere" / "stages.json").read_text())["stages"]
    measured = {
        pair.prompt for stage in stages for pair in pairs_in(played.folder / "store" / stage / "held_out.parquet")
    }
    assert len(measured) == 8 and not trained & measured
    done = played.play("stage=evaluate", policy, "seed=5", "data.held_out=24", "data.size=24", run="more")
    held_out = int(re.search(r"(\d+) held-out examples", done.stdout)[1])
    assert held_out == 24  # the set has 48, of which 24 were trained on


def test_exact_match(played, tmp_path):
    words = ["data=task", "data.path=builtin:sum", "data.size=60", "data.held_out=10", "iter=0"]
    played.play(*words, f"hydra.run.dir={tmp_path}/sum")
    game = json.loads((tmp_path / "sum" / "game.json").read_text())
    assert all(0 <= row["exact_match"] <= 1 for row in game["evaluations"])
    assert "right answers" in (tmp_path / "sum" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=evaluate", "evaluation=none"], "needs evaluation.enabled=true"),
        (["stage=measure"], "must be 'game' or 'evaluate'"),
        (["evaluation.against=somewhere"], "evaluation.against=somewhere: has no effect with stage=game"),
        (["stage=evaluate", "evaluation.against=/nowhere/at/all"], "no such folder"),
        (["evaluation.embedder=/nowhere/at/all"], "no embedding model can be loaded"),
        (["data=task", "data.path=builtin:chess"], "there are sort, sum, reverse"),
    ],
)
def test_invalid_evaluation_settings(played, words, message, tmp_path):
    done = played.play(*words, f"hydra.run.dir={tmp_path}/run", status=1)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_files_of_the_user_are_left_alone(played, tmp_path):
    """Files of the user stay in a folder that no run has written, and in a run's folder."""
    project = tmp_path / "project"
    for name in ("sft/policy/model.safetensors", "iter7/pairs.parquet", "iter7/notes.txt"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("mine")
    done = played.play("iter=0", f"hydra.run.dir={project}", status=1)
    assert (
        "project/sft was not written by a run, and this run would overwrite it: give another hydra.run.dir."
        in done.stderr
    )
    shutil.rmtree(project / "sft")
    shutil.move(project / "iter7", tmp_path / "iter7")
    played.play("iter=0", f"hydra.run.dir={project}")
    shutil.move(tmp_path / "iter7", project / "iter7")
    played.play("iter=0", f"hydra.run.dir={project}")
    assert sorted(path.name for path in (project / "iter7").iterdir()) == ["notes.txt", "pairs.parquet"]


@pytest.mark.parametrize("name", ["report.md", "best/notes.txt", "stages.json", "config.yaml", "iter7/x", "wandb.txt"])
def test_folder_of_a_user(played, tmp_path, name):
    file = tmp_path / "project" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    played.play("iter=0", f"hydra.run.dir={tmp_path}/project", status=0 if name == "wandb.txt" else 1)
    assert file.read_text() == "mine"


def test_another_game_in_the_folder(played, tmp_path):
    """A longer game with the same settings continues in the folder; other settings are refused and change no file."""

    def content() -> dict:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    folder = f"hydra.run.dir={tmp_path}/run"
    played.play("schedule.replay=previous", "iter=0", folder)
    before = content()
    for words in (["loss.beta=0.2"], ["model.path=/nowhere"], ["stage=evaluate"], ["seed=1", "plan=false"]):
        done = played.play("schedule.replay=previous", "iter=0", *words, folder, status=1)
        assert f"{tmp_path}/run holds another game (" in done.stderr and len(done.stderr.splitlines()) == 1
        assert content() == before
    (tmp_path / "run" / "stages.json").write_text("{")
    played.play("schedule.replay=previous", "iter=1", "checkpoint.minutes=1", folder)
    assert (tmp_path / "run" / "iter1").is_dir() and json.loads((tmp_path / "run" / "stages.json").read_text())


PLANTED = {"PLANTED": "sk-planted-0123", "SPIN_JUDGE_KEY": "judge-key-0123", "WANDB_API_KEY": "0123456789abcdef" * 2}


def test_secrets_are_in_no_file(played, tmp_path):
    """Secrets in several settings do not appear in the run's files, W&B's files, the store, or errors."""

    def has_secret(data: bytes) -> bool:
        return any(value.encode() in data for value in PLANTED.values())

    words = ["iter=0", f"hydra.run.dir={tmp_path}/run", f"store.path={tmp_path}/store", "tracking.wandb=offline"]
    keys = ("name", "model.name", "data.name", "generation.python", "evaluation.judge_model", "evaluation.name")
    words += [f"{key}=${{oc.env:PLANTED}}" for key in keys]
    done = played.games.play(*played.words(*words), env=PLANTED)
    assert done.returncode == 0 and not has_secret((done.stdout + done.stderr).encode())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert list(tmp_path.rglob("*.wandb")) and [path for path in files if has_secret(path.read_bytes())] == []
    assert "judge_model: ${oc.env:PLANTED}\n" in (tmp_path / "run" / "config.yaml").read_text()
    for word in ("loss.beta=${oc.env:PLANTED}", "model.path=${oc.env:PLANTED}"):
        done = played.games.play(*played.words(word, "plan=true", run="new"), env=PLANTED)
        assert done.returncode == 1 and "oc.env:PLANTED" in done.stderr
        assert not has_secret((done.stdout + done.stderr).encode())


@pytest.mark.parametrize(
    "code",
    [
        "import os, sys; os.close(0); os.close(1); sys.stdin = sys.__stdin__ = sys.stdout = sys.__stdout__ = None",
        "import sys; sys.stdout.reconfigure(encoding='ascii')",
        "import os; os.environ['MPLBACKEND'] = 'module://nowhere.backend'",
        "import os; os.environ.pop('HOME', None); os.environ['TMPDIR'] = '/nowhere'",
    ],
    ids=["closed", "ascii", "notebook", "homeless"],
)
def test_surroundings(played, code):
    done = played.games.start(*played.words("schedule.replay=previous"), code=code).wait()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_read_only_store_of_another_user(played, tmp_path):
    """A run works for a user without name and home directory, who may read everything and write to one folder."""
    tmp_path.chmod(0o777)
    capability = ["+dac_read_search"] * 2
    user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    user += [f"--{kind}-caps={value}" for kind, value in zip(("inh", "ambient"), capability, strict=True)]
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME")}

    def play(*words: str) -> subprocess.CompletedProcess:
        words = played.words("schedule.replay=previous", f"hydra.run.dir={tmp_path}/run", *words)
        command = [*user, sys.executable, "run.py", *words]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)

    done = play()
    assert done.returncode == 0 and "nothing was computed again" in done.stdout, done.stderr
    for word in ("cache.path=~/x", "seed=1"):
        done = play(word, f"hydra.run.dir={tmp_path}/{word[:4]}")
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "there is no home directory" in play("cache.path=~/x").stderr


def test_umask(played, tmp_path):
    words = played.words("iter=0", f"hydra.run.dir={tmp_path}/run", f"store.path={tmp_path}/store")
    assert played.games.start(*words, "evaluation=none", code="import os; os.umask(0o077)").wait().returncode == 0
    files = [*(tmp_path / "store").rglob("*.safetensors"), *(tmp_path / "store").rglob("*.json")]
    assert files and {path.stat().st_mode & 0o077 for path in files} == {0}


def test_error_leaves_no_folder(played, tmp_path):
    for words in (
        ["model.path=/nowhere"],
        ["data=local", "data.path=/nowhere.jsonl"],
        ["loss.beta=-1"],
        ["evaluation.select=x"],
    ):
        for place in ("new", "parent/new"):
            played.play(*words, f"hydra.run.dir={tmp_path}/{place}", status=1)
        assert list(tmp_path.iterdir()) == [], words
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    played.play("model.path=/nowhere/at/all", f"hydra.run.dir={tmp_path}/new", status=1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["notes.txt"]
