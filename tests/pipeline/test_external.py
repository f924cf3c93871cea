"""Tests of benchmarks, MT-Bench and a judge's preference in a game, and of the names of two measured policies."""

import json
import shutil
import threading
from contextlib import suppress
from unittest.mock import MagicMock

import pytest

from spin.config.hydra import run_folder
from spin.evaluation.external import judges
from spin.pipeline.context import distinct_labels
from spin.pipeline.external import Compare
from tests.engines.test_deepspeed import GAME, errors, play_ranks, torchrun
from tests.evaluation.external.test_judges import longer, serve  # noqa: F401 (a fixture: a judge behind a real address)
from tests.games import Place

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line on the sea.", "Make it shorter."]},
    {"question_id": 101, "category": "math", "turns": ["What is 2+2?", "And twice that?"]},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, games):
    return Place(tmp_path_factory.mktemp("external"), games)


def test_benchmarks(place):
    words = ["evaluation=open_llm_leaderboard", "iter=0", "evaluation.harness_include=tests/tasks"]
    words += [
        "evaluation.harness=[spin_choice:2:acc_norm,spin_generate:0:exact_match:whole]",
        "evaluation.harness_limit=6",
    ]
    place.play(*words)
    game = json.loads((place.folder / "run" / "game.json").read_text())
    assert [row["policy"] for row in game["external"]] == ["start", "sft", "iter0"]
    for row in game["external"]:
        assert [(task["task"], task["n"]) for task in row["harness"]] == [("spin_choice", 6), ("spin_generate", 6)]
        assert all(0 <= task["value"] <= 1 for task in row["harness"])
    page = (place.folder / "run" / "report.md").read_text()
    assert "## Benchmarks" in page and "spin\\_choice, 2 shots, acc\\_norm" in page and "(n=6)" in page
    assert {row["stage"] for row in place.metrics()} >= {"harness", "evaluate", "train"}
    assert place.stages()["harness"] == 6
    repeated = place.play(*words)
    assert "nothing was computed again" in repeated.stdout
    assert "harness   iter 0  reuse" in place.play(*words, "plan=true").stdout


def question_file(folder, records=QUESTIONS):
    """Write a file of questions, and beside it the files that FastChat's judge needs. Return its path."""
    questions = folder / "data" / "mt_bench" / "question.jsonl"
    (questions.parent / "reference_answer").mkdir(parents=True)
    reference = {"question_id": 101, "choices": [{"index": 0, "turns": ["4", "8"]}]}
    kinds = [f"single{math}-v1{turns}" for math in ("", "-math") for turns in ("", "-multi-turn")]
    prompts = [{"name": kind, "system_prompt": "Rate.", "prompt_template": "[[rating]]"} for kind in kinds]
    for path, rows in (
        (questions, records),
        (questions.parent / "reference_answer" / "gpt-4.jsonl", [reference]),
        (questions.parents[1] / "judge_prompts.jsonl", prompts),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions


def judge_reply(prompt: str) -> str:
    """Return the reply of a judge that prefers longer answers and rates every answer 7."""
    return longer(prompt) if "=== Answer 1 ===" in prompt else "Good. Rating: [[7]]"


def judge_words(server, questions, *words: str) -> list[str]:
    """Return the settings of MT-Bench and of a judge behind `server`."""
    words = [*words, "evaluation=mt_bench", f"evaluation.questions={questions}", "evaluation.judge_model=longer"]
    return [*words, f"evaluation.judge={server.address}", "generation.max_new_tokens=24"]


def test_judge(place, serve):  # noqa: F811
    server = serve(judge_reply)
    words = judge_words(server, question_file(place.folder), "iter=0")
    done = place.play(*words, run="judged")
    game = json.loads((place.folder / "judged" / "game.json").read_text())
    start, sft, last = game["external"]
    assert start["mt_bench"]["score"] == sft["mt_bench"]["score"] == last["mt_bench"]["score"] == 7
    assert start["comparison"] is None and sft["comparison"] is None  # they have no opponent
    comparison = last["comparison"]
    assert comparison["n"] == 8 and comparison["names"] == ["iter0", "sft"] and comparison["inconsistent"] in (0, None)
    assert comparison["finding"] in " ".join(done.stdout.split())  # a long one is wrapped
    answers = sorted((place.folder / "judged" / "mt_bench" / "model_answer").glob("*.jsonl"))
    assert [path.stem for path in answers] == ["smoke-iter0", "smoke-sft", "smoke-start"]
    rows = [json.loads(line) for line in answers[0].read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 101] and rows[0]["model_id"] == "smoke-iter0"
    page = (place.folder / "judged" / "report.md").read_text()
    assert "## MT-Bench" in page and "## A judge's preference" in page
    requests = [body["messages"][-1]["content"] for _, _, _, body in server.seen]
    assert requests and not any(name in text for text in requests for name in ("sft", "iter0"))  # blind
    assert "nothing was computed again" in place.play(*words, run="judged").stdout
    assert len(server.seen) == len(requests)  # no request is sent twice


def test_judge_prompt_is_an_input(monkeypatch):
    stage, needs = Compare(0, *[MagicMock()] * 3), [MagicMock()] * 4
    monkeypatch.setattr(judges, "identity", lambda *setting: "judge")
    inputs = stage.inputs(*needs)
    assert stage.inputs(*needs) == inputs
    monkeypatch.setattr(judges, "PAIR", judges.PAIR + " Be strict.")
    assert stage.inputs(*needs) != inputs


MORE = [*QUESTIONS, *({"question_id": i, "category": "writing", "turns": ["a", "b"]} for i in range(5))]
JSON = {"Content-Type": "application/json"}
ONCE = {"x-should-retry": "false"}  # the client does not retry


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    """A played game without judges, and a file of questions whose verdicts fill more than one shard."""
    place = Place(tmp_path_factory.mktemp("played"), games)
    place.play("iter=0", "generation.max_new_tokens=24")
    return place, question_file(place.folder, MORE)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((401, JSON, b"{}"), "set SPIN_JUDGE_KEY"),
        ((404, JSON, {"error": {"message": "no such model"}}), "asked for longer"),
        ((200, {}, b"<html>hello</html>"), "has /v1 at the end of its address"),
        ((500, ONCE, b"oh"), "HTTP 500"),
    ],
)
def test_judge_is_asked_before_long_work(played, serve, tmp_path, fault, message):  # noqa: F811
    place, questions = played
    server = serve(judge_reply)
    server.faults = [fault]
    words = judge_words(server, questions, f"store.path={tmp_path}/store", f"hydra.run.dir={tmp_path}/run")
    done = place.play(*words, status=1)
    [line] = done.stderr.splitlines()
    assert message in line and line.startswith(f"error: evaluation.judge={server.address}")
    assert len(server.seen) == 1 and not list((tmp_path / "store").glob("*/*/manifest.json"))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([(200, JSON, b"{")] * 5, "no chat completion"),
        pytest.param([(500, ONCE, b"oh")] * 5, "HTTP 500", marks=pytest.mark.slow),
        pytest.param([(302, {"Location": "http://127.0.0.1:1/"}, b"")] * 5, "HTTP 302", marks=pytest.mark.slow),
        pytest.param([(401, JSON, b"{}")], "set SPIN_JUDGE_KEY", marks=pytest.mark.slow),
    ],
)
def test_game_goes_on_without_a_judge(played, serve, faults, message):  # noqa: F811
    """If the verdicts on the start's answers fail after a shard, those on the SFT policy's and the comparison follow."""
    place, questions = played

    def rule(prompt: str) -> str:
        if not server.faults:
            pages.append((place.folder / run / "report.html").read_text())
        return judge_reply(prompt)

    pages, server = [], serve(rule)
    server.faults = [None] * (1 + 8) + faults
    words = judge_words(server, questions, "iter=0")
    run = f"judged-{server.server.server_port}"
    done = place.play(*words, run=run, status=1)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: no result of MT-Bench of start: evaluation.judge={server.address}: ")
    assert message in line and "run the same command again" in line
    assert "MT-Bench of start: given up, the game continues" in done.stdout
    assert sum("[[rating]]" in prompt for prompt in server.prompts) == 8 + len(faults) + 14 + 14
    assert "Missing: MT-Bench of start" in pages[0] and "Remaining after this stage: generate of iter 0" in pages[0]
    game = json.loads((place.folder / run / "game.json").read_text())
    assert list(game["given_up"]) == ["MT-Bench of start"]
    start, sft, last = game["external"]
    assert start["mt_bench"] is None and sft["mt_bench"]["score"] == last["mt_bench"]["score"] == 7
    assert last["comparison"]["n"] == 8
    for name in ("report.md", "report.html"):
        assert "Missing: MT-Bench of start" in (place.folder / run / name).read_text(), name

    count = len(server.seen)
    assert "mt_bench  start   resume" in place.play(*words, "plan=true", run=run).stdout
    assert len(server.seen) == count
    done = place.play(*words, run=run)
    assert len(server.seen) == count + 1 + 6 and "1 stages played" in done.stdout
    game = json.loads((place.folder / run / "game.json").read_text())
    assert game["given_up"] == {} and game["external"][0]["mt_bench"]["score"] == 7
    assert "Missing" not in (place.folder / run / "report.md").read_text()
    place.play(*words, run=run)
    assert len(server.seen) == count + 1 + 6  # a finished game sends no request


def test_bad_first_replies(played, serve):  # noqa: F811
    place, questions = played
    server = serve(judge_reply)
    server.faults = [None] + [(200, JSON, b"{")] * 4
    place.play(*judge_words(server, questions, "iter=0"), run="judged4")
    graded = json.loads((place.folder / "judged4" / "game.json").read_text())["external"][0]["mt_bench"]
    assert graded["unparsed"] == 4 and graded["score"] == 7


@pytest.mark.slow
def test_server_that_goes_away(played, serve):  # noqa: F811
    place, questions = played

    def rule(prompt: str) -> str:
        if len(server.seen) == 4:
            server.server.shutdown()
            server.server.server_close()
        return judge_reply(prompt)

    server = serve(rule)
    model = f"model.path={place.folder}/run/iter0/policy"
    done = place.play(*judge_words(server, questions, model, "stage=evaluate"), run="gone", status=1)
    [line] = done.stderr.splitlines()
    assert "is the server up?; run the same command again" in line and len(server.seen) == 4


@pytest.mark.slow
def test_two_ranks(place, serve):  # noqa: F811
    """Two processes, first without a judge and then with one, have the results of one process. Both send requests."""
    barrier = threading.Barrier(2)

    def rule(prompt: str) -> str:
        if "[[rating]]" in prompt and not broken:  # the first request waits for another
            with suppress(threading.BrokenBarrierError):
                barrier.wait(30)
            broken.append(barrier.broken)
        return judge_reply(prompt)

    broken, server = [], serve(rule)
    words = [
        *GAME,
        *judge_words(server, question_file(place.folder / "ranks", MORE), "iter=0", "schedule.sft_epochs=0"),
    ]
    words += ["evaluation.harness=[spin_choice:1:acc_norm,spin_generate:0:exact_match:whole]"]
    words += ["evaluation.harness_include=tests/tasks", f"store.path={place.folder}/ranks/store"]
    server.faults = [None] + [(401, JSON, b"{}")] * 20
    done = torchrun(2, "run.py", *place.words(*words, run="ranks/run"))
    assert done.returncode == 1 and len(errors(done)) == 1, done.stdout + done.stderr
    names = ["MT-Bench of start", "MT-Bench of iter0", "judge iter0 against start"]
    assert f"no result of {', '.join(names)}: " in errors(done)[0]
    assert [f"{name}: given up" in done.stdout for name in names] == [True] * 3
    server.faults = []
    done = play_ranks(place, *words, run="ranks/run")
    assert "3 stages played" in done.stdout and broken == [False, False]
    stages = {path.parent.parent.name for path in (place.folder / "ranks" / "store").glob("*/*/manifest.json")}
    assert stages >= {"train", "evaluate", "harness", "mt_bench", "compare"}

    external = shutil.ignore_patterns("harness", "mt_bench", "compare")
    shutil.copytree(place.folder / "ranks" / "store", place.folder / "alone" / "store", ignore=external)
    words = [word.replace(f"{place.folder}/ranks/store", f"{place.folder}/alone/store") for word in words]
    done = place.play(*words, run="alone/run")
    assert "7 stages played" in done.stdout  # two tasks and MT-Bench for two policies, and the comparison
    ranks, alone = (json.loads((place.folder / run / "run" / "game.json").read_text()) for run in ("ranks", "alone"))
    assert ranks["external"] == alone["external"] and len(alone["external"]) == 2
    rows = [sorted((place.folder / run / "run" / "mt_bench").rglob("*.jsonl")) for run in ("ranks", "alone")]
    assert [path.read_text() for path in rows[0]] == [path.read_text() for path in rows[1]] and len(rows[1]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation=mt_bench"], "evaluation.questions must be set"),
        (["evaluation.questions=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["evaluation.judge=/nowhere"], "must be an address"),
        (["evaluation.harness=[arc_challenge]"], "must be task:shots:metric"),
        (["evaluation.harness=[no_such_task:0:acc]"], "there is no task no_such_task"),
        (["evaluation.harness=[spin_choice:0:acc]", "evaluation.harness_include=/nowhere"], "no such folder"),
        (["evaluation.harness_limit=0"], "must be greater than or equal to 1"),
    ],
)
def test_missing_parts(place, words, message, tmp_path):
    done = place.play(*words, f"store.path={tmp_path}/store", f"hydra.run.dir={tmp_path}/run", status=1)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["outputs/a/iter1/policy"], ["iter1/policy"]),
        (["outputs/a/iter0/policy", "outputs/a/iter1/policy"], ["iter0/policy", "iter1/policy"]),
        (["outputs/a/iter1/policy", "outputs/b/iter1/policy"], ["a/iter1/policy", "b/iter1/policy"]),
        (["x/b-c", "x-b/c"], ["x/b-c", "x-b/c-2"]),  # equal as names of files
        (["model", "model"], ["model", "model-2"]),
    ],
)
def test_distinct_labels(paths, labels):
    assert distinct_labels(paths) == labels


def test_evaluation_folder():
    """Policies of the same name from two runs are measured in two folders, each always in the same one."""
    a, b = "model.path=outputs/a/iter1/policy", "model.path=outputs/b/iter1/policy"
    names = [run_folder("spin", "evaluate", ["stage=evaluate", word]) for word in (a, b, a)]
    assert names[0] == names[2] != names[1] and all(name.startswith("spin-evaluation") for name in names)


def test_evaluate_policies_of_one_name(place):
    """Measures, samples and MT-Bench answers of iter0/policy of two runs are kept separate."""
    questions = place.folder / "question.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for run, seed in (("one", 0), ("two", 1)):
        place.play("iter=0", f"seed={seed}", "evaluation=none", run=run)
    words = [f"model.path={place.folder}/one/iter0/policy", f"evaluation.against={place.folder}/two/iter0/policy"]
    words += [
        "stage=evaluate",
        "evaluation=mt_bench",
        f"evaluation.questions={questions}",
        "generation.max_new_tokens=8",
    ]
    place.play(*words, run="both")
    game = json.loads((place.folder / "both" / "game.json").read_text())
    assert [row["policy"] for row in game["evaluations"]] == ["two/iter0/policy", "one/iter0/policy"]
    assert all(len(sample["answers"]) == 2 for sample in game["samples"])
    assert len(list((place.folder / "both" / "mt_bench" / "model_answer").glob("*.jsonl"))) == 2
