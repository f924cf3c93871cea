"""Benchmarks, MT-Bench and a judge's preference within a game; names of two measured policies."""

import json

import pytest

from spin.config.hydra import run_folder
from spin.pipeline.context import distinct_labels
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
        assert [(one["task"], one["n"]) for one in row["harness"]] == [("spin_choice", 6), ("spin_generate", 6)]
        assert all(0 <= one["value"] <= 1 for one in row["harness"])
    page = (place.folder / "run" / "report.md").read_text()
    assert "## Benchmarks" in page and "spin\\_choice, 2 shots, acc\\_norm" in page and "(n=6)" in page
    assert {row["stage"] for row in place.metrics()} >= {"harness", "evaluate", "train"}
    assert place.stages()["harness"] == 6
    again = place.play(*words)
    assert "nothing was computed again" in again.stdout
    assert "harness   iter 0  reuse" in place.play(*words, "plan=true").stdout


def test_judge(place, serve):  # noqa: F811
    """A judge who likes longer answers, and gives everything a 7, behind an address that speaks the protocol."""
    questions = place.folder / "data" / "mt_bench" / "question.jsonl"
    (questions.parent / "reference_answer").mkdir(parents=True)
    reference = {"question_id": 101, "choices": [{"index": 0, "turns": ["4", "8"]}]}
    kinds = [f"single{math}-v1{turns}" for math in ("", "-math") for turns in ("", "-multi-turn")]
    prompts = [{"name": kind, "system_prompt": "Rate.", "prompt_template": "[[rating]]"} for kind in kinds]
    for path, rows in (
        (questions, QUESTIONS),
        (questions.parent / "reference_answer" / "gpt-4.jsonl", [reference]),
        (questions.parents[1] / "judge_prompts.jsonl", prompts),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rule(prompt: str) -> str:
        return longer(prompt) if "=== Answer 1 ===" in prompt else "Good. Rating: [[7]]"

    server = serve(rule)
    words = ["evaluation=mt_bench", f"evaluation.questions={questions}", f"evaluation.judge={server.address}", "iter=0"]
    words += ["evaluation.judge_model=longer", "generation.max_new_tokens=24"]
    done = place.play(*words, run="judged")
    game = json.loads((place.folder / "judged" / "game.json").read_text())
    start, sft, last = game["external"]
    assert start["mt_bench"]["score"] == sft["mt_bench"]["score"] == last["mt_bench"]["score"] == 7
    assert start["comparison"] is None and sft["comparison"] is None  # nobody before them in the game
    found = last["comparison"]
    assert found["n"] == 8 and found["names"] == ["iter0", "sft"] and found["inconsistent"] in (0, None)
    assert found["finding"] in " ".join(done.stdout.split())  # a long one is wrapped
    answers = sorted((place.folder / "judged" / "mt_bench" / "model_answer").glob("*.jsonl"))
    assert [path.stem for path in answers] == ["smoke-iter0", "smoke-sft", "smoke-start"]
    rows = [json.loads(line) for line in answers[0].read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 101] and rows[0]["model_id"] == "smoke-iter0"
    page = (place.folder / "judged" / "report.md").read_text()
    assert "## MT-Bench" in page and "## A judge's preference" in page
    asked = [body["messages"][-1]["content"] for _, _, _, body in server.seen]
    assert asked and not any(name in text for text in asked for name in ("sft", "iter0"))  # blind
    assert "nothing was computed again" in place.play(*words, run="judged").stdout
    assert len(server.seen) == len(asked)  # nobody is asked twice


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluation=mt_bench"], "question.jsonl"),
        (["evaluation.questions=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["evaluation.judge=/nowhere"], "must be an address"),
        (["evaluation.harness=[arc_challenge]"], "must be task:shots:metric"),
        (["evaluation.harness=[no_such_task:0:acc]"], "the harness knows no task no_such_task"),
        (["evaluation.harness=[spin_choice:0:acc]", "evaluation.harness_include=/nowhere"], "no such folder"),
        (["evaluation.harness_limit=0"], "must be greater than or equal to 1"),
    ],
)
def test_missing_parts_stop_the_game_early(place, words, says, tmp_path):
    done = place.play(*words, f"store.path={tmp_path}/store", f"hydra.run.dir={tmp_path}/run", status=1)
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
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
    """Policies of one name from two runs are measured in two folders, and a policy always in the same."""
    a, b = "model.path=outputs/a/iter1/policy", "model.path=outputs/b/iter1/policy"
    names = [run_folder("spin", "evaluate", ["stage=evaluate", word]) for word in (a, b, a)]
    assert names[0] == names[2] != names[1] and all(name.startswith("spin-evaluation") for name in names)


def test_evaluate_policies_of_one_name(place):
    """Measures, samples and MT-Bench answers of two runs' iter0/policy lie side by side."""
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
