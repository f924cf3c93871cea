"""Tests of MT-Bench: FastChat's files, both turns of a real model's answers, and grades by a real server."""

import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from spin.config.hydra import load
from spin.config.schema import GenerationConfig
from spin.data.templates import encode_prompts
from spin.evaluation.external.mt_bench import (
    TEMPERATURES,
    Question,
    answer_questions,
    grade_answers,
    mt_bench_score,
    parse_rating,
    read_grading,
    read_questions,
    write_answers,
)
from spin.generation.answers import AnswerRequest
from spin.generation.sampling import generate_answers
from spin.models.load import load_model, load_tokenizer, stop_ids
from spin.runtime.errors import UserError
from spin.runtime.shards import ResumableShards
from tests.evaluation.external.test_judges import one_line, serve  # noqa: F401

CONFIG = load()
CATEGORIES = "writing roleplay extraction math coding reasoning stem humanities".split()
RECORDS = [
    {"question_id": 81 + i, "category": category, "turns": [f"First of {category}?", f"Second, as to {category}?"]}
    for i, category in enumerate(CATEGORIES)
]
# In FastChat's layout; the prompts contain every field.
PROMPTS = [
    {
        "name": f"single{math}-v1{turns}",
        "system_prompt": f"system{math}{turns}",
        "prompt_template": template
        + (" R1={ref_answer_1}" if math else "")
        + (" R2={ref_answer_2}" if math and turns else ""),
    }
    for math in ("", "-math")
    for turns, template in (
        ("", "Q={question} A=\n{answer}\n"),
        ("-multi-turn", "{question_1}\n{answer_1}\n{question_2}\n{answer_2}\n"),
    )
]
REFERENCES = [
    {"question_id": 84 + i, "choices": [{"index": 0, "turns": [f"first reference {i} {{x}}", f"second reference {i}"]}]}
    for i in range(3)
]


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def question_file(tmp_path):
    folder = tmp_path / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    (folder / "question.jsonl").write_text(lines(RECORDS))
    (folder / "reference_answer" / "gpt-4.jsonl").write_text(lines(REFERENCES))
    (folder.parent / "judge_prompts.jsonl").write_text(lines([*PROMPTS, {"name": "pair-v2"}]))
    return folder / "question.jsonl"


QUESTIONS = [Question(r["question_id"], r["category"], tuple(r["turns"])) for r in RECORDS]
GRADING = {
    "prompts": {prompt["name"]: prompt for prompt in PROMPTS},
    "references": {str(r["question_id"]): r["choices"][0]["turns"] for r in REFERENCES},
}


@pytest.fixture(scope="module")
def player(tiny_folder):
    """The tiny model with larger random weights, because with its own weights greedy answers are empty."""
    tokenizer = load_tokenizer(tiny_folder)
    model = load_model(tiny_folder, torch.float32, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
    return model, tokenizer, stop_ids(tiny_folder, tokenizer)


def play(player, questions=QUESTIONS, template="chat", seed=0, tokens=12, batch_size=4, **options) -> list[dict]:
    model, tokenizer, stops = player
    # The sampling settings of self-play have no effect, except for the batch size.
    generation = {"temperature": 3.0, "top_p": 0.1, "batch_size": batch_size, "max_new_tokens": tokens}
    changes = {"data": {"template": template}, "generation": generation}
    sections = {name: getattr(CONFIG, name).model_copy(update=changed) for name, changed in changes.items()}
    config = CONFIG.model_copy(update={**sections, "seed": seed})
    return answer_questions(model, tokenizer, questions, config, stops, **options)


def turns(rows) -> list[list[str]]:
    return [row["choices"][0]["turns"] for row in rows]


# --- questions --------------------------------------------------------------------------------------------------------


def test_read_questions(question_file):
    assert read_questions(str(question_file)) == QUESTIONS
    question_file.write_text("\ufeff" + lines(RECORDS).replace("\n", "\r\n") + "\n  \n", "utf-8")
    assert read_questions(str(question_file)) == QUESTIONS


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"{", "can't be read"),
        (b"\xff\xfe", "can't be read"),
        (b"[]", "record 3 is not a question"),
        (b"{}", "record 3 is not a question"),
        ({"turns": ["What?"]}, "record 3 is not a question"),
        ({"turns": ["a", None]}, "record 3 is not a question"),
        ({"question_id": "82"}, "same question_id"),
    ],
)
def test_malformed_questions(question_file, record, message):
    if isinstance(record, dict):
        record = json.dumps({**RECORDS[2], **record}).encode()
    question_file.write_bytes(lines(RECORDS[:2]).encode() + record + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        read_questions(str(question_file))
    assert "FastChat" in one_line(caught.value)


@pytest.mark.parametrize("path", [None, "no/such.jsonl", "a\0b", "x" * 5000, "/tmp", "~nobody-here/q"])
def test_missing_questions(path, question_file, monkeypatch):
    monkeypatch.chdir(question_file.parent)  # its question.jsonl is not read unless it is named
    with pytest.raises(UserError, match=r"evaluation\.questions.*mt_bench/question\.jsonl") as caught:
        read_questions(path)
    assert one_line(caught.value)


def test_read_grading(question_file):
    assert read_grading(str(question_file), QUESTIONS) == GRADING
    (question_file.parent / "reference_answer" / "gpt-4.jsonl").write_text(lines(REFERENCES[:2]))
    with pytest.raises(UserError, match=r"reference answer.*86.*FastChat") as caught:
        read_grading(str(question_file), QUESTIONS)
    assert one_line(caught.value)
    (question_file.parents[1] / "judge_prompts.jsonl").unlink()
    with pytest.raises(UserError, match="judge_prompts"):
        read_grading(str(question_file), QUESTIONS)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_in_fastchats_layout(player, tmp_path):
    rows = play(player)
    file = write_answers(rows, "iter1", tmp_path / "mt_bench")
    assert file == tmp_path / "mt_bench" / "model_answer" / "iter1.jsonl"
    row_by_id = {}
    for line in file.read_text("ascii").splitlines():  # like FastChat's load_model_answers
        row = json.loads(line)
        row_by_id[row["question_id"]] = row
    assert list(row_by_id) == [question.id for question in QUESTIONS]
    for row in row_by_id.values():
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "iter1" and re.fullmatch(r"\w{22}", row["answer_id"]) and row["tstamp"] == 0.0
        [choice] = row["choices"]
        assert list(choice) == ["index", "turns"] and choice["index"] == 0
        first, second = choice["turns"]
        assert isinstance(first, str) and isinstance(second, str) and first == first.strip()
    assert len({row["answer_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", ["org/model", "my run/iter1", "../x"])
def test_model_id_is_a_file_name(tmp_path, name):
    file = write_answers([{"question_id": 1}], name, tmp_path)
    assert file.parent == tmp_path / "model_answer" and json.loads(file.read_text())["model_id"] == file.stem


def test_seed(player):
    first, repeated, reseeded = play(player), play(player), play(player, seed=1)
    assert first == repeated
    for question, answers, others in zip(QUESTIONS, turns(first), turns(reseeded), strict=True):
        assert all(answers), question.category  # empty answers would all be equal
        if TEMPERATURES.get(question.category) != 0.1:  # at 0.1, nearly greedy, answers may be equal or not
            assert (answers == others) == (TEMPERATURES.get(question.category) == 0), question.category
    assert all(a["answer_id"] != b["answer_id"] for a, b in zip(first[:2], reseeded[:2], strict=True))


def test_independence_of_questions(player):
    together = play(player)
    assert play(player, QUESTIONS[::-1]) == together[::-1]
    assert [play(player, [question])[0] for question in QUESTIONS] == together
    twins = [replace(QUESTIONS[0], id=1), replace(QUESTIONS[0], id=2, turns=QUESTIONS[0].turns[:1] * 2)]
    (a, _), (b, c) = turns(play(player, twins))
    assert a != b and b != c


@pytest.mark.parametrize("template", ["chat", "paper", "Q: {prompt}\nA: "])
def test_turns_and_temperatures(player, template):
    """Each answer equals one that is generated separately, from messages that are written out here."""
    model, tokenizer, stops = player
    expected = {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }
    questions = [*QUESTIONS, replace(QUESTIONS[0], id="own", category="of my own")]
    rows = play(player, questions, template, batch_size=3)
    for question, (first, second) in zip(questions, turns(rows), strict=True):
        history = [{"role": "user", "content": question.turns[0]}]
        for number, reply in ((1, first), (2, second)):
            [(text, ids)] = encode_prompts(tokenizer, [history], template)
            assert number == 1 or (first in text and question.turns[1] in text)
            example = {
                "id": f"{question.id}/{number}",
                "prompt": text,
                "prompt_ids": tuple(ids),
                "real": "",
                "real_ids": (),
            }
            temperature = expected.get(question.category, 0.7)
            separate = answer_alone(model, tokenizer, example, temperature, stops)
            assert reply == separate.replace("<|start|>", "").replace("<|end|>", "").strip(), (question, number)
            history += [{"role": "assistant", "content": reply}, {"role": "user", "content": question.turns[1]}]


def answer_alone(model, tokenizer, example, temperature, stops) -> str:
    from spin.data.examples import Example

    config = GenerationConfig.from_defaults(temperature=temperature, batch_size=1)
    seed = int.from_bytes(hashlib.sha256(b"0:mt_bench").digest()[:4], "big")
    [reply] = generate_answers(model, AnswerRequest(tokenizer, [Example(**example)], config, 12, stops, seed))
    return reply.text


def test_spelt_control_token(player, tiny_folder):
    model, _, stops = player
    [(first, _)] = turns(play(player, QUESTIONS[2:3]))
    word = next(a + b for a, b in pairwise(first) if (a + b).isascii())
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    assert tokenizer(word)["input_ids"] == [len(tokenizer) - 1]  # an id that the model does not have
    [(filtered, second)] = turns(play((model, tokenizer, stops), QUESTIONS[2:3]))
    assert filtered == first.replace(word, "").strip() and second


def test_short_context(player):
    messages, progress = [], []
    long = replace(QUESTIONS[4], id="long", turns=("x" * 1100, "And?"))
    tight = replace(QUESTIONS[5], id="tight", turns=("y" * 970, "And what then, what then, what then?"))
    rows = play(player, [long, tight, QUESTIONS[0]], tokens=100, say=messages.append, advance=progress.append)
    (a, b), (c, d), normal = turns(rows)
    assert (a, b, d) == ("ERROR", "ERROR", "ERROR") and c not in ("", "ERROR") and "ERROR" not in normal
    [line] = messages
    assert "context of 1024 tokens" in line and line.endswith("question/turn long/1, tight/1, long/2, tight/2")
    messages.clear()
    assert play(player, say=messages.append) and messages == []


def test_resume_answers(player, tmp_path):
    expected, progress = play(player), []

    def keep(part):
        return ResumableShards(tmp_path / part, print)

    def stop(answers):
        progress.append(answers)
        if sum(progress) >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(player, keep=keep, advance=stop)
    assert 12 <= sum(progress) < 16
    resumed = []
    assert play(player, keep=keep, advance=resumed.append) == expected
    assert 0 < sum(resumed) <= 16 - 8


# --- grades -----------------------------------------------------------------------------------------------------------


ROWS = [
    {"question_id": q.id, "answer_id": f"{i}", "choices": [{"turns": [f"one {'a' * i}", f"two {{b}} {i}"]}]}
    for i, q in enumerate(QUESTIONS)
]


def by_length(prompt: str) -> str:
    """Rate an answer 10 minus the number of letters a in the first turn; give second turns of stem no rating."""
    if "as to stem" in prompt:
        return "I can't say."
    letters = re.search("\none (a*)\n", prompt)[1]
    return f"Well. Rating: [[{10 - len(letters)}]]"


def grade(judge, **options) -> list[dict]:
    return grade_answers(ROWS, QUESTIONS, GRADING, judge, **options)


def test_grades(serve):  # noqa: F811
    server, progress = serve(by_length), []
    judgments = grade(server.judge(), advance=progress.append)
    assert [(judgment["question_id"], judgment["turn"]) for judgment in judgments] == [
        (str(81 + i), t) for i in range(8) for t in (1, 2)
    ]
    for judgment in judgments:
        i = int(judgment["question_id"]) - 81
        assert judgment["score"] == (-1 if (i, judgment["turn"]) == (6, 2) else 10 - i)
        assert judgment["category"] == CATEGORIES[i] and judgment["judgment"].strip()
    assert sum(progress) == 16 and len(server.seen) == 16


def test_grading_prompts(serve):  # noqa: F811
    server = serve(by_length)
    grade(server.judge())
    requests = [body["messages"] for _, _, _, body in server.seen]
    for (q, row), pair in zip(
        zip(QUESTIONS, ROWS, strict=True), zip(requests[::2], requests[1::2], strict=True), strict=True
    ):
        (first, second), answers = q.turns, row["choices"][0]["turns"]
        math = "-math" if q.category in ("math", "reasoning", "coding") else ""
        r = GRADING["references"].get(str(q.id))
        single = f"Q={first} A=\n{answers[0]}\n" + (f" R1={r[0]}" if math else "")
        multi = f"{first}\n{answers[0]}\n{second}\n{answers[1]}\n" + (f" R1={r[0]} R2={r[1]}" if math else "")
        for messages, content, turns in zip(pair, (single, multi), ("", "-multi-turn"), strict=True):
            system = {"role": "system", "content": f"system{math}{turns}"}
            assert messages == [system, {"role": "user", "content": content}]


def test_score(serve):  # noqa: F811
    judgments = grade(serve(by_length).judge())
    score = mt_bench_score(judgments, 500, 0)
    first, second = [10 - i for i in range(8)], [10 - i for i in range(8) if i != 6]
    assert score["first_turn"] == np.mean(first) and score["second_turn"] == pytest.approx(np.mean(second))
    assert score["score"] == pytest.approx(np.mean([*first, *second]))
    assert score["by_category"] == {category: 10 - i for i, category in enumerate(CATEGORIES)}
    assert (score["n"], score["verdicts"], score["unparsed"]) == (8, 16, 1)
    for name in ("score", "first_turn", "second_turn"):
        low, high = score[f"{name}_interval"]
        assert 3 <= low < score[name] < high <= 10
    assert score == mt_bench_score(judgments, 500, 0) and json.loads(json.dumps(score)) == score


def test_interval_over_questions():
    """Intervals are over questions: a second turn whose scores equal those of the first does not narrow them."""
    rng = np.random.default_rng(0)
    scores = rng.integers(1, 11, 50)
    judgments = [
        {"question_id": i, "category": "x", "turn": turn, "score": float(score)}
        for i, score in enumerate(scores)
        for turn in (1, 2)
    ]
    score = mt_bench_score(judgments, 500, 0)
    assert score["score_interval"] == score["first_turn_interval"] == score["second_turn_interval"]
    low, high = score["score_interval"]
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 50**0.5, rel=0.15)


def test_no_rating():
    score = mt_bench_score(grade(lambda messages: "Good."))
    assert score["unparsed"] == 16
    for name in ("score", "score_interval", "first_turn", "second_turn"):
        assert score[name] is None
    assert score["by_category"] == dict.fromkeys(CATEGORIES)


def test_resume_grading(serve, tmp_path):  # noqa: F811
    server = serve(by_length)
    expected = grade(server.judge())
    server.seen.clear()
    server.faults = [None] * 11 + [(401, {}, b"")]
    shards = ResumableShards(tmp_path / "verdicts", print)
    with pytest.raises(UserError):
        grade(server.judge(), keep=shards)
    assert grade(server.judge(), keep=shards) == expected
    assert len(server.seen) == 12 + 8


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[[10]]", 10),
        ("[[1]]", 1),
        ("first [[9]], second [[4]]", 9),
        ("[7]", 7),
        ("[3] of [[8]]", 8),
        ("[[11]]", -1),
        ("[[0]]", -1),
        ("7/10", -1),
        ("[[rating]]", -1),
        ("", -1),
    ],
)
def test_parse_rating(reply, rating):
    assert parse_rating(reply) == rating
