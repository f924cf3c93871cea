"""Tests of generation with vLLM's CPU build, which `make vllm` installs once. They take minutes (marked slow).

A random Llama plays games. Answers of the embedded model are compared with the project's own decoding token by token.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.generation.answers import Answer, AnswerRequest
from spin.generation.sampling import generate_answers
from spin.generation.vllm import WORKER, check_vllm, generate_with_vllm
from spin.models import tiny
from spin.models.load import load_policy, load_tokenizer, stop_ids
from spin.pipeline.context import prepare_run
from spin.runtime.errors import UserError
from spin.runtime.tables import read_parquet
from spin.runtime.tracking import Tracker
from tests.config.test_schema import load
from tests.games import Place
from tests.models.test_adapters import adapted, base_or_self

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
CPU, SETTINGS = torch.device("cpu"), GenerationConfig.from_defaults(engine="vllm", python=str(PYTHON))
GREEDY = SETTINGS.model_copy(update={"temperature": 0.0})

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module", autouse=True)
def installed():
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ARGS"))}
    done = subprocess.run(["make", "vllm"], cwd=ROOT, capture_output=True, text=True, timeout=1400, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The tiny model with heads of size 32, because vLLM's attention on a CPU does not support size 16."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.make_tiny_model(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(folder, head_dim=32, initializer_range=0.3, tie_word_embeddings=False)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A run of the embedded model with 32 prompts of its data, of which no stage is played."""
    folder = tmp_path_factory.mktemp("smollm2")
    config = load("data.size=32", "data.held_out=2", "data.validation=0", f"store.path={folder}/store")
    return prepare_run(config, folder, Tracker(folder, name="", config={}, wandb="disabled"))


def ids(answers) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


def own_answers(policy, examples, new, stops, dtype=torch.float32) -> list[tuple[int, ...]]:
    """Return the greedy answers of the project's own decoding."""
    model, tokenizer = load_policy(policy, dtype, CPU), load_tokenizer(policy.tokenizer)
    return ids(generate_answers(model, AnswerRequest(tokenizer, examples, GREEDY, new, stops, 0)))


def next_logps(model, example, answer) -> torch.Tensor:
    """Return the model's log-probs at temperature 1, [tokens of the answer, vocabulary]."""
    with torch.no_grad():
        logits = model(torch.tensor([[*example.prompt_ids, *answer]])).logits[0, len(example.prompt_ids) - 1 : -1]
    return logits.double().log_softmax(-1)


def test_greedy(smollm2, tmp_path):
    run = smollm2
    request = AnswerRequest(run.tokenizer, run.data.train, GREEDY, 24, run.stop_ids, 0)
    answers = ids(generate_with_vllm(run.start, torch.float32, tmp_path, request))
    assert len(answers) >= 32 and answers == own_answers(run.start, run.data.train, 24, run.stop_ids)


def test_greedy_bf16(smollm2, tmp_path):
    """Some answers are equal in spite of rounding. Prints (pytest -s) how many, and where the others first differ."""
    run = smollm2
    request = AnswerRequest(run.tokenizer, run.data.train, GREEDY, 24, run.stop_ids, 0)
    answers = ids(generate_with_vllm(run.start, torch.bfloat16, tmp_path, request))
    expected = own_answers(run.start, run.data.train, 24, run.stop_ids, torch.bfloat16)
    differences = sorted(
        next((n for n, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
        for pair in zip(answers, expected, strict=True)
        if pair[0] != pair[1]
    )
    print(
        f"\nbf16: {len(answers) - len(differences)} of {len(answers)} answers are equal; the rest differ after {differences} tokens"
    )
    assert len(differences) < len(answers)


def test_sampled(smollm2, tmp_path):
    """The negative log-prob of a sampled token minus its expectation, the entropy, has mean 0 and a known variance."""
    run, model = smollm2, load_policy(smollm2.start, torch.float32, CPU)
    request = AnswerRequest(run.tokenizer, run.data.train, SETTINGS, 24, run.stop_ids, 0)
    answers = generate_with_vllm(run.start, torch.float32, tmp_path, request)
    excess = variance = 0.0
    for example, answer in zip(run.data.train, answers, strict=True):
        logps = next_logps(model, example, answer.ids)
        entropy = -(logps.exp() * logps).sum(-1)
        excess += float((-logps[range(len(answer.ids)), list(answer.ids)] - entropy).sum())
        variance += float(((logps.exp() * logps**2).sum(-1) - entropy**2).sum())
    assert abs(excess) < 3.5 * variance**0.5, (excess, variance**0.5)
    assert len({answer.ids for answer in answers}) == len(answers)


def test_adapter_and_stop_tokens(llama, smollm2, tmp_path):
    """Generation with an adapter stops at the given tokens, not at those of the model's folder."""
    policy = adapted(llama, tmp_path / "adapter")
    tokenizer = load_tokenizer(llama)
    ends = stop_ids(llama, tokenizer)
    examples = [
        Example(example.id, "", tuple(token % 258 for token in example.prompt_ids), "", ())
        for example in smollm2.data.train
    ]
    stops = {7, 30, 60}
    request = AnswerRequest(tokenizer, examples, GREEDY, 40, stops, 0, shard_size=9)
    answers = ids(generate_with_vllm(policy, torch.float32, tmp_path, request))
    assert answers == own_answers(policy, examples, 40, stops)
    assert answers != own_answers(base_or_self(llama), examples, 40, stops)
    assert any(ends & set(answer) for answer in answers) and any(answer[-1] in stops for answer in answers)


def test_more_prompts_than_fit_a_pass(llama, tmp_path):
    """More prompts than vLLM reads in one pass are answered repeatably; a prompt read in parts once crashed its engine."""
    tokenizer, stops = load_tokenizer(llama), stop_ids(llama, load_tokenizer(llama))
    examples = [Example(f"p{i}", "", tuple(3 + (i + k) % 200 for k in range(120)), "", ()) for i in range(80)]
    sampled = SETTINGS.model_copy(update={"temperature": 1.0})
    policy = base_or_self(llama)
    request = AnswerRequest(tokenizer, examples, sampled, 8, stops, 0)
    first, second = (ids(generate_with_vllm(policy, torch.float32, tmp_path, request)) for _ in range(2))
    assert len(first) == 80 and len({*first}) > 70 and first == second


def words(model) -> list[str]:
    return [
        model if isinstance(model, str) else f"model.path={model}",
        "schedule.sft_epochs=0",
        "engine.precision=fp32",
        "data.size=16",
    ]


def vllm_words(model) -> list[str]:
    return [*words(model), "generation=vllm", f"generation.python={PYTHON}", "generation.temperature=0"]


def play_both(games, folder, model, *more) -> str:
    """Play a game with vLLM and one without, assert that all answers are equal, and return the output of the first."""
    stored, printed = [], []
    for name, settings in (("vllm", vllm_words(model)), ("ours", [*words(model), "generation=greedy"])):
        place = Place(folder / name, games)
        place.folder.mkdir(exist_ok=True)
        done = place.start(*settings, *more).wait(1200)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
        stored.append(
            sorted(ids(read_parquet(Answer, p)) for p in place.folder.glob("store/generate/*/answers.parquet"))
        )
    assert stored[0] == stored[1] and stored[0]
    return printed[0]


def test_game_of_the_embedded_model(games, tmp_path):
    """An iteration with vLLM, which also answers the held-out prompts, has the evaluations of one without."""
    play_both(games, tmp_path, "model=smollm2", "iter=0", "generation.max_new_tokens=24", "evaluation.bootstrap=50")
    games = [json.loads((tmp_path / name / "run" / "game.json").read_text()) for name in ("vllm", "ours")]
    assert games[0]["evaluations"] == games[1]["evaluations"] and len(games[0]["evaluations"]) == 2


def test_game_with_adapters(games, llama, tmp_path):
    """vLLM loads the opponent of the second iteration, an adapter, on its base model."""
    play_both(games, tmp_path, llama, "model.adapter=lora", "optimizer.lr=0.01", "iter=1", "evaluation=none")


def group_of(pid: int, wait: float) -> list[int]:
    """Return the processes, except zombies, that remain of a process group after at most `wait` seconds."""
    end = time.monotonic() + wait
    while True:
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == pid and state != "Z":
                members.append(int(path.parent.name))
        if not members or time.monotonic() > end:
            return sorted(members)
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_and_wait(place, llama, env=None):
    """Start a game and wait until vLLM has stored two more shards. Return the game and vLLM's process group."""

    def stored() -> int:
        return len(list(place.folder.glob("store/generate/*/*/answers/0*")))

    before, game = (
        stored(),
        place.start(*vllm_words(llama), "checkpoint.shard_size=2", "iter=0", "evaluation=none", env=env),
    )
    while stored() < before + 2:
        assert game.poll() is None, game.err.read_text()
        time.sleep(0.05)
    (group,) = [pid for pid in children(game.pid) if WORKER.name in Path(f"/proc/{pid}/cmdline").read_text()]
    return game, group


def test_kills(games, llama, tmp_path):
    """If vLLM's process or the game's is killed, no process remains, and a repeated game has the answers of one without."""
    place = Place(tmp_path / "vllm", games)
    place.folder.mkdir()
    game, group = start_and_wait(place, llama)
    os.kill(children(group)[0], signal.SIGKILL)
    done = game.wait()
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "vLLM was killed" in done.stderr and f"{place.folder}/run/vllm-0.log" in done.stderr
    assert group_of(group, wait=0) == []

    # The engine runs in separate processes, as on GPUs.
    game, group = start_and_wait(place, llama, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert len(group_of(group, wait=0)) >= 4  # a watcher, a client, the engine and its worker
    game.kill()
    assert group_of(group, wait=5) == []

    assert "resuming, " in play_both(games, tmp_path, llama, "checkpoint.shard_size=2", "iter=0", "evaluation=none")


def test_interface_is_checked(llama, monkeypatch):
    """Arguments that the installed vLLM does not have, as after a rename, are reported."""
    start = base_or_self(llama)
    check_vllm(SETTINGS, start, 8)
    monkeypatch.setattr("spin.generation.vllm.lora_arguments", lambda policy: {"lora_name": "", "lora_local_path": ""})
    with pytest.raises(UserError, match=r"has no LoRARequest\(lora_local_path=\): python -m venv"):
        check_vllm(SETTINGS, start, 8)


def test_error_is_the_first(tiny_folder, llama, smollm2, tmp_path):
    """The first error is reported, although two engine processes and this one fail after the process that raised it."""
    settings = SETTINGS.model_copy(update={"tensor_parallel": 2})
    request = AnswerRequest(None, smollm2.data.train[:1], settings, 8, {1}, 0)
    with pytest.raises(UserError, match="RuntimeError: Unsupported CPU attention configuration: head_dim=16") as error:
        generate_with_vllm(base_or_self(tiny_folder), torch.float32, tmp_path, request)
    assert "\n" not in str(error.value) and str(tmp_path / "vllm-0.log") in str(error.value)
