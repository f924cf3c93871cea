"""Tests of the benchmarks: scores against log-probs and answers that are computed here, and one-line errors."""

import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from spin.config.hydra import load
from spin.evaluation.external import harness
from spin.evaluation.external.harness import PAPER, Task, check_tasks, identity, parse_tasks
from spin.models.load import load_model, load_tokenizer
from spin.runtime.errors import UserError
from spin.runtime.signals import Interrupted
from tests.games import ROOT

TASKS = ROOT / "tests" / "tasks"
LEADERBOARD_CONFIG = load("evaluation=open_llm_leaderboard").evaluation
LEADERBOARD_TASKS = LEADERBOARD_CONFIG.harness
LEADERBOARD = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu")
evaluator = pytest.importorskip("lm_eval.evaluator")


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Skip the harness's description of the machine, which takes seconds per run and is not used."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)


def settings(include=TASKS, limit=None, batch_size=5):
    changes = {"harness_include": str(include), "harness_limit": limit, "harness_batch_size": batch_size}
    return LEADERBOARD_CONFIG.model_copy(update=changes)


def run_tasks(folder, entries, include=TASKS, limit=None, batch_size=5, dtype=torch.float32, seed=0, lines=None):
    say = (lambda line: None) if lines is None else lines.append
    model, tokenizer = load_model(folder, dtype, torch.device("cpu")), load_tokenizer(folder)
    options = settings(include, limit, batch_size)
    tasks = [task for entry in entries for task in parse_tasks([entry])]
    return [harness.run_task(task, model, tokenizer, options, seed, say) for task in tasks]


def records(name: str, folder: Path = TASKS) -> list[dict]:
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def question(doc: dict) -> str:
    return f"Q: {doc['question']}\nA:"


class Reference:
    """Log-probs in float64 and greedy answers by the model's own forward, one text at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer = load_tokenizer(folder)

    @torch.no_grad()
    def logp(self, prompt: str, answer: str) -> float:
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer)]
        logits = self.model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
        return float(sum(row.log_softmax(-1)[token] for row, token in zip(logits.double(), ids[1], strict=True)))

    @torch.no_grad()
    def greedy(self, prompt: str, max_tokens: int) -> str:
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        generated: list[int] = []
        while len(generated) < max_tokens and "\n" not in self.tokenizer.decode(generated):
            best = self.model(torch.tensor([ids + generated])).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "a tie that fp32 may break in another way"
            if best.indices[0] == self.tokenizer.eos_token_id:
                break
            generated.append(int(best.indices[0]))
        return self.tokenizer.decode(generated).split("\n")[0]


def prompts(docs: list[dict], shots: int, seed: int) -> list[str]:
    """Return each question after `shots` answered ones, drawn separately per question, in the harness's format."""
    rng, pool = random.Random(seed), records("choice_train")
    drawn = [rng.sample(pool, shots) for _ in docs]
    answered = ["".join(f"{question(e)} {e['choices'][e['answer']]}\n\n" for e in examples) for examples in drawn]
    return [examples_text + question(doc) for examples_text, doc in zip(answered, docs, strict=True)]


def shares_correct(reference: Reference, docs: list[dict], shots: int, seed: int) -> dict[str, float]:
    """Return acc by the log-prob of " " + choice, acc_norm by the log-prob per character, and acc_bytes per byte."""
    correct: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for prompt, doc in zip(prompts(docs, shots, seed), docs, strict=True):
        logps = np.array([reference.logp(prompt, f" {choice}") for choice in doc["choices"]])
        lengths = {
            "acc": np.ones(4),
            "acc_norm": np.array([len(choice) for choice in doc["choices"]]),
            "acc_bytes": np.array([len(choice.encode()) for choice in doc["choices"]]),
        }
        for metric, length in lengths.items():
            ranked = np.sort(logps / length)
            assert ranked[-1] - ranked[-2] > 1e-4, "a tie that fp32 may break in another way"
            correct[metric].append(int((logps / length).argmax()) == doc["answer"])
    return {metric: float(np.mean(values)) for metric, values in correct.items()}


@pytest.fixture(scope="module")
def policy(tiny_folder, tmp_path_factory):
    """The tiny model with large random weights, so that the text before a question changes the answers."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("policies") / "policy")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(policy):
    return Reference(policy)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shots", "seed"), [(0, 0), (3, 0), (3, 7)])
def test_accuracies(policy, reference, shots, seed):
    expected = shares_correct(reference, records("choice_test"), shots, seed)
    assert len(set(expected.values())) > 1 and 0 < min(expected.values()) < max(expected.values()) < 1  # it can fail
    rows = run_tasks(policy, [f"spin_choice:{shots}:{metric}" for metric in expected], seed=seed)
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(expected)
    for row in rows:
        share = row["value"]
        assert row["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 23))
        assert (row["task"], row["shots"], row["n"], row["version"]) == ("spin_choice", shots, 24, "1.5")


def test_precision_of_log_probs(policy, reference):
    docs = records("choice_test")
    true = [f" {doc['choices'][doc['answer']]}" for doc in docs]
    expected = np.mean([reference.logp(*pair) for pair in zip(prompts(docs, 2, 0), true, strict=True)])
    errors = [
        abs(run_tasks(policy, ["spin_logps:2:logp"], dtype=dtype)[0]["value"] / expected - 1)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    assert errors[0] < 1e-12 < errors[1] < 1e-5 < errors[2] < 1e-2


def test_bf16_sums_are_not_rounded(tiny_folder, tmp_path):
    """Log-probs are not summed in bf16, whose step near -66 is 0.5: choices would tie, and the first would be selected."""
    include = shutil.copytree(TASKS, tmp_path / "tasks")
    reference, rng, docs = Reference(tiny_folder, torch.bfloat16), random.Random(0), []
    while len(docs) < 16:
        choices = ["".join(rng.choices("abcdefghijklmnop", k=11)) for _ in range(4)]
        doc = {"question": "which?", "choices": choices}
        logps = [reference.logp(question(doc), f" {choice}") for choice in choices]
        if sorted(logps)[-1] - sorted(logps)[-2] > 0.1:  # in a batch the bits of a row may differ
            docs.append(doc | {"answer": int(np.argmax(logps))})
    (include / "data" / "choice_test.jsonl").write_text("\n".join(map(json.dumps, docs)))
    assert run_tasks(tiny_folder, ["spin_choice:0:acc"], include, dtype=torch.bfloat16)[0]["value"] == 1


def test_generated_answers(policy, reference, tmp_path):
    include = shutil.copytree(TASKS, tmp_path / "tasks")
    docs = records("generate")
    answers = [reference.greedy(question(doc), 8) for doc in docs]
    letters = [(re.findall("[A-Za-z]", text) or [""])[0] for text in answers]
    # Half of the true answers are the model's, a quarter are its first letters, a quarter are neither.
    true = [(answers[i], answers[i], letters[i], "neither")[i % 4] for i in range(len(docs))]
    lines = [json.dumps({**doc, "answer": answer}) for doc, answer in zip(docs, true, strict=True)]
    (include / "data" / "generate.jsonl").write_text("\n".join(lines) + "\n")
    entries = ["spin_generate:0:exact_match:whole", "spin_generate:0:exact_match:letter"]
    whole_row, letter_row = run_tasks(policy, entries, include)
    assert whole_row["value"] == np.mean([a == b for a, b in zip(answers, true, strict=True)]) >= 0.5
    assert letter_row["value"] == np.mean([a == b for a, b in zip(letters, true, strict=True)]) > 0
    assert whole_row["version"] == "0" and whole_row["metric"] == "exact_match:whole"
    assert whole_row["value"] != letter_row["value"]


def test_group_mean(policy, reference):
    group, first, second = run_tasks(policy, ["spin_group:0:acc", "spin_choice:0:acc", "spin_swapped:0:acc"])
    assert second["value"] == pytest.approx(shares_correct(reference, records("choice_train"), 0, 0)["acc"])
    assert group["n"] == first["n"] + second["n"] == 31 and group["version"] == "3"
    assert group["value"] == pytest.approx((24 * first["value"] + 7 * second["value"]) / 31)
    assert group["stderr"] > 0


def test_limit(policy, reference):
    row, group = run_tasks(policy, ["spin_choice:2:acc", "spin_group:0:acc"], limit=5)
    assert row["n"] == 5 and group["n"] == 10
    assert row["value"] == pytest.approx(shares_correct(reference, records("choice_test")[:5], 2, 0)["acc"])


def test_repeatable(policy):
    single = run_tasks(policy, ["spin_choice:3:acc_norm"])
    random.seed(5)
    torch.manual_seed(5)
    combined = run_tasks(policy, ["spin_generate:1:exact_match:whole", "spin_choice:3:acc_norm"], batch_size=2)
    assert combined[1:] == single


def test_truncated_prompts(policy, tmp_path, caplog):
    messages: list[str] = []
    run_tasks(policy, ["spin_choice:0:acc", "spin_choice:7:acc"], lines=messages)
    assert messages == []  # 7 examples and a question are below 1024 bytes
    short = shutil.copytree(policy, tmp_path / "short")
    settings = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 128}
    (short / "config.json").write_text(json.dumps(settings))
    run_tasks(short, ["spin_choice:0:acc", "spin_choice:5:acc"], lines=messages)
    assert [line for line in messages if "cut" in line] == [
        "note: spin_choice, 5 shots: prompts were cut from the left to fit the model's context"
    ]
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]  # reported by `say` only


# --- unchanged process state and files --------------------------------------------------------------------------------


def states():
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tolist(), numbers[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("stopped", [False, True])
def test_restores_process_state(policy, stopped):
    log = logging.getLogger("lm_eval")
    before = states(), log.level, log.propagate, list(log.handlers), sys.dont_write_bytecode
    if stopped:
        with pytest.raises(Interrupted):
            run_tasks(policy, ["spin_stopped:0:acc"])
    else:
        run_tasks(policy, ["spin_choice:2:acc", "spin_generate:1:exact_match:letter"])
    assert (states(), log.level, log.propagate, list(log.handlers), sys.dont_write_bytecode) == before


def test_writes_and_logs_nothing(policy, tmp_path):
    """Nothing is written or logged. Data files are relative to their task's file, and `include` may be relative, too."""
    include = shutil.copytree(TASKS, tmp_path / "mine" / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "temporary").mkdir()
    script = f"""
import torch
from pathlib import Path
from spin.config.hydra import load
from spin.evaluation.external.harness import check_tasks, parse_tasks, run_task
from spin.models.load import load_model, load_tokenizer
words = ["evaluation.harness_include=tasks", "evaluation.harness_limit=3", "evaluation.harness_batch_size=2"]
settings = load(*words).evaluation
tasks = parse_tasks(["spin_choice:0:acc", "spin_swapped:0:acc", "spin_generate:0:exact_match:whole"])
check_tasks(tasks, "tasks")
folder = Path({str(policy)!r})
model = load_model(folder, torch.float32, torch.device("cpu"))
for task in tasks:
    row = run_task(task, model, load_tokenizer(folder), settings, 0, print)
    print(row["task"], row["n"])
"""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    paths = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)}
    unset = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "LMEVAL_LOG_LEVEL", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | paths
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=include.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["spin_choice 3", "spin_swapped 3", "spin_generate 3"]
    assert not re.search("INFO|WARN", done.stderr, re.IGNORECASE), done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_changed_data(policy, tmp_path):
    include = shutil.copytree(TASKS, tmp_path / "tasks")
    data = include / "data" / "choice_test.jsonl"
    run_tasks(policy, ["spin_choice:0:acc"], include)
    times = data.stat()
    lines = data.read_text("utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:10]), "utf-8")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run_tasks(policy, ["spin_choice:0:acc"], include)[0]["n"] == 10


# --- errors, each in one line -----------------------------------------------------------------------------------------


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize(
    "entry",
    ["", "arc", "arc:5", "arc:five:acc", "arc:-1:acc", "arc:²:acc", ":5:acc", "arc:5:", "arc:5:acc:", "a:1:b:c:d", 7],
)
def test_malformed_entry(entry):
    with pytest.raises(UserError) as error:
        parse_tasks([entry])
    assert "task:shots:metric" in one_line(error)


def test_repeated_task():
    with pytest.raises(UserError) as error:
        parse_tasks(["gsm8k:5:exact_match:strict-match", "arc_easy:5:acc", "gsm8k:5:exact_match:flexible-extract"])
    assert "gsm8k is named twice" in one_line(error)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("arc_chalenge:25:acc_norm", "arc_challenge"),
        ("xqzkwv" * 5 + ":0:acc", "lm_eval ls tasks"),
        ("spin_choise:0:acc", "spin_choice"),
        ("arc_challenge:25:exact_match", "it has acc:none, acc_norm:none."),
        ("gsm8k:5:exact_match", "it has exact_match:strict-match, exact_match:flexible-extract."),
        ("gsm8k:5:exact_match:strict", "it has exact_match:strict-match, exact_match:flexible-extract."),
        ("mmlu:5:acc_norm", "mmlu has no metric acc_norm; it has acc:none."),
        ("ai2_arc:0:acc", "name its tasks: arc_challenge, arc_easy"),
        ("truthfulqa_mc2:5:acc", "truthfulqa_mc2:0:acc"),
        ("spin_group:2:acc", "spin_swapped is defined without examples"),
        ("humaneval:0:pass_at_k", "runs code"),
        ("wikitext:0:word_perplexity", "lower values of word_perplexity are better"),
        ("simple_cooccurrence_bias:0:likelihood_diff", "lower values of likelihood_diff are better"),
    ],
)
def test_check_refuses(entry, part):
    with pytest.raises(UserError) as error:
        check_tasks(parse_tasks([entry]), str(TASKS))
    assert part in one_line(error)


def test_known_tasks_pass():
    check_tasks(parse_tasks(LEADERBOARD_TASKS), None)
    check_tasks(parse_tasks(["spin_group:0:acc", "spin_generate:0:exact_match:letter"]), str(TASKS))


def test_missing_include(tmp_path):
    task, folder = Task("spin_choice", 0, "acc"), str(tmp_path / "nowhere")
    for refuse in (lambda: check_tasks([task], folder), lambda: identity(task, folder)):
        with pytest.raises(UserError) as error:
            refuse()
        assert "nowhere: no such folder" in one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        "task: mine\n  dataset_path: [",
        "- mine",
        "task: mine\nmetric_list: [acc]",
        "task: mine\noutput_type: guess",
        "group: mine\ntask: [mine]\naggregate_metric_list: [{metric: acc}]",
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\nmetric_list: [{metric: unheard_of}]",
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\nprocess_docs: !function nowhere.at_all",
    ],
)
def test_broken_task_file(policy, tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)

    def check_and_run():
        check_tasks([Task("mine", 0, "acc")], str(tmp_path))
        run_tasks(policy, ["mine:0:acc"], tmp_path)

    with pytest.raises(UserError) as error:
        check_and_run()
    assert "mine" in one_line(error)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("arc_challenge:25:acc_norm", ("arc_challenge", "allenai/ai2_arc", "HF_HUB_OFFLINE")),
        ("mmlu:5:acc", ("mmlu", "cais/mmlu")),
        ("spin_lost:0:acc", ("spin_lost", "nowhere.jsonl")),
        ("spin_choice:8:acc", ("spin_choice", "Sample larger than population")),
        ("spin_memory:0:acc", ("spin_memory", "evaluation.harness_batch_size=5")),
    ],
)
def test_run_refuses(policy, entry, parts):
    check_tasks(parse_tasks([entry]), str(TASKS))
    with pytest.raises(UserError) as error:
        run_tasks(policy, [entry], limit=1)
    text = one_line(error)
    assert all(part in text for part in parts), text


def test_missing_or_other_version(tmp_path):
    """If lm_eval is missing, or has another version, the error names the version to install."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.lower().startswith("lm_eval"):
            (packages / path.name).symlink_to(path)
    old_version = tmp_path / "other" / "lm_eval-0.4.0.dist-info"
    old_version.mkdir(parents=True)
    (old_version / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.4.0\n")
    script = f"""
import sys
from spin.evaluation.external.harness import check_tasks, identity, parse_tasks
tasks = parse_tasks(["arc_easy:0:acc"])
for more in ([], [{str(old_version.parent)!r}]):
    sys.path += more
    for refuse in (lambda: check_tasks(tasks, None), lambda: identity(tasks[0], None)):
        try:
            refuse()
        except ValueError as error:
            print(error)
"""
    places = {"PYTHONPATH": f"{ROOT}:{packages}"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], env=os.environ | places, capture_output=True, text=True, check=True
    )
    missing_at_check, missing_at_identity, other_at_check, other_at_identity = done.stdout.splitlines()
    assert missing_at_check == missing_at_identity and other_at_check == other_at_identity
    assert "not installed" in missing_at_check and "0.4.0" in other_at_check
    assert all("pip install lm-eval==0.4.13" in line for line in (missing_at_check, other_at_check))


# --- keys, the paper's table, the configuration -----------------------------------------------------------------------


def test_identity(tmp_path):
    include = shutil.copytree(TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    [task] = parse_tasks(["spin_choice:0:acc"])
    first = identity(task, str(include))
    assert first == json.loads(json.dumps(first)) == identity(task, str(shutil.copytree(include, tmp_path / "copy")))
    (include / "__pycache__").mkdir()
    (include / "__pycache__" / "functions.pyc").write_bytes(b"anything")
    assert identity(task, str(include)) == first

    identities = [first, identity(task, None)]
    identities += [identity(Task("spin_choice", *changed), str(include)) for changed in ((1, "acc"), (0, "acc_norm"))]
    with (include / "data" / "choice_test.jsonl").open("a") as file:
        file.write("\n")
    identities.append(identity(task, str(include)))
    (include / "spin_choice.yaml").rename(include / "other.yaml")
    identities.append(identity(task, str(include)))
    assert len({json.dumps(content) for content in identities}) == len(identities)


def test_paper_averages():
    assert list(PAPER) == ["sft", "iter0", "iter1", "iter2", "iter3"]
    for row in PAPER.values():
        assert list(row) == [*LEADERBOARD_TASKS, "average"]
        *scores, average = row.values()
        assert abs(np.mean(scores) - average) <= 0.005 + 1e-9


def test_leaderboard_configuration():
    assert [task.task for task in parse_tasks(LEADERBOARD_TASKS)] == list(LEADERBOARD)
    assert [task.shots for task in parse_tasks(LEADERBOARD_TASKS)] == [25, 0, 5, 5, 10, 5]
    config = LEADERBOARD_CONFIG
    assert (config.harness_include, config.harness_limit, config.harness_batch_size) == (None, None, 8)
