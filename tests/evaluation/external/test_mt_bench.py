"""MT-Bench: FastChat's files in and out, both turns from a real model, grades from a real server."""

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
from spin.evaluation.external.judges import LocalJudge, RewardModel
from spin.evaluation.external.mt_bench import (
    TEMPERATURES,
    Question,
    answer,
    judge_answers,
    mt_bench_score,
    parse_rating,
    read_questions,
    write,
)
from spin.generation.sampling import generate_answers
from spin.models.load import load_model, load_tokenizer, stop_ids
from spin.runtime.errors import UserError
from spin.runtime.shards import ResumableShards
from tests.evaluation.external.test_judges import make_reward, one_line, serve  # noqa: F401

CATEGORIES = "writing roleplay extraction math coding reasoning stem humanities".split()
RECORDS = [
    {"question_id": 81 + i, "category": category, "turns": [f"First of {category}?", f"Second, as to {category}?"]}
    for i, category in enumerate(CATEGORIES)
]
RECORDS[2]["reference"] = ["not for judging", "nor this"]
RECORDS[3]["reference"] = ["It is 42 {exactly}.", ""]
RECORDS[5]["reference"] = ["Uncertain.", "No."]


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def question_file(tmp_path):
    (tmp_path / "question.jsonl").write_text(lines(RECORDS))
    return tmp_path / "question.jsonl"


QUESTIONS = [
    Question(r["question_id"], r["category"], tuple(r["turns"]), tuple(r["reference"]) if "reference" in r else None)
    for r in RECORDS
]


@pytest.fixture(scope="module")
def player(tiny_folder):
    """The tiny model, drawn anew with larger weights: else it ends its greedy answers before they begin."""
    tokenizer = load_tokenizer(tiny_folder)
    model = load_model(tiny_folder, torch.float32, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
    return model, tokenizer, stop_ids(tiny_folder, tokenizer)


def played(player, questions=QUESTIONS, template="chat", seed=0, tokens=12, **options) -> list[dict]:
    model, tokenizer, stops = player
    generation = options.pop("generation", GenerationConfig.from_defaults(batch_size=4))
    return answer(model, tokenizer, questions, template, stops, generation, tokens, seed, **options)


def turns(rows) -> list[list[str]]:
    return [row["choices"][0]["turns"] for row in rows]


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_are_read_as_fastchat_writes_them(question_file):
    assert read_questions(question_file) == QUESTIONS == read_questions(str(question_file))
    question_file.write_text("\ufeff" + lines(RECORDS).replace("\n", "\r\n") + "\n  \n", "utf-8")
    assert read_questions(question_file) == QUESTIONS
    odd = [{**RECORDS[0], "reference": None}, {**RECORDS[1], "question_id": "r-1", "reference": [], "more": 1}]
    question_file.write_text(lines(odd))
    assert [(q.id, q.reference) for q in read_questions(question_file)] == [(81, None), ("r-1", None)]


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (b"{", ":3: not a line of JSON"),
        (b"\xff\xfe", ":3: not a line of JSON"),
        (b"[" * 100_000, ":3: not a line of JSON"),
        (b"9" * 5000, ":3: not a line of JSON"),
        (b"[]", ":3: a question is a JSON object, this is a list"),
        (b"{}", ":3: question_id must be"),
        ({"question_id": True}, ":3: question_id must be"),
        ({"question_id": 1.5}, ":3: question_id must be"),
        ({"question_id": " "}, ":3: question_id must be"),
        ({"question_id": 81}, ":3: question_id 81 is there twice"),
        ({"question_id": "82"}, ":3: question_id 82 is there twice"),
        ({"category": 3}, ":3: category must be a text"),
        ({"turns": "What?"}, ":3: turns must be a list of two texts"),
        ({"turns": ["What?"]}, ":3: turns must be a list of two texts"),
        ({"turns": ["a", "b", "c"]}, ":3: turns must be a list of two texts"),
        ({"turns": ["a", " "]}, ":3: turns must be a list of two texts"),
        ({"turns": ["a", None]}, ":3: turns must be a list of two texts"),
        ({"turns": ["a", "\ud83d"]}, ":3: turns must be a list of two texts"),
        ({"reference": ["a"]}, ":3: reference must be a list of two texts"),
        ({"reference": "ab"}, ":3: reference must be a list of two texts"),
        ({"reference": {"a": 1, "b": 2}}, ":3: reference must be a list of two texts"),
    ],
)
def test_a_file_of_other_questions_is_one_line_with_its_number(question_file, spoilt, says):
    if isinstance(spoilt, dict):
        spoilt = json.dumps({**RECORDS[2], **spoilt}).encode()
    question_file.write_bytes(lines(RECORDS[:2]).encode() + spoilt + b"\n")
    with pytest.raises(UserError, match=says) as caught:
        read_questions(question_file)
    assert "FastChat" in one_line(caught.value)


@pytest.mark.parametrize("path", [None, "", "no/such.jsonl", "a\0b", "x" * 5000, "/tmp", "/dev/null", "~nobody-here/q"])
def test_a_file_that_is_not_there_is_one_line_with_where_to_get_it(path):
    with pytest.raises(UserError, match=r"evaluation\.questions=.*llm_judge/data/mt_bench/question\.jsonl") as caught:
        read_questions(path)
    assert one_line(caught.value)


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no question in it"):
        read_questions(tmp_path / "q.jsonl")


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_rows_as_fastchat_has_them(player, tmp_path):
    rows = played(player, model_id="iter1")
    file = write(rows, tmp_path / "mt_bench")
    assert file == tmp_path / "mt_bench" / "model_answer" / "iter1.jsonl"
    read = {}
    for line in file.read_text("ascii").splitlines():  # as its load_model_answers reads
        row = json.loads(line)
        read[row["question_id"]] = row
    assert list(read) == [question.id for question in QUESTIONS]
    for row in read.values():
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "iter1" and re.fullmatch(r"\w{22}", row["answer_id"]) and row["tstamp"] == 0.0
        [choice] = row["choices"]
        assert list(choice) == ["index", "turns"] and choice["index"] == 0
        first, second = choice["turns"]
        assert isinstance(first, str) and isinstance(second, str) and first == first.strip()
    assert len({row["answer_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", ["org/model", "", "../x", ".hidden", "a\nb", "x" * 300])
def test_a_model_id_that_names_no_file_is_refused(player, tmp_path, name):
    rows = [{"question_id": 1, "answer_id": "a", "model_id": name, "choices": [], "tstamp": 0.0}]
    with pytest.raises(UserError, match="can't name a file") as caught:
        write(rows, tmp_path)
    assert one_line(caught.value)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(player, tmp_path):
    first, again, other = played(player), played(player), played(player, seed=1)
    assert write(first, tmp_path / "a").read_bytes() == write(again, tmp_path / "b").read_bytes()
    for question, one, two in zip(QUESTIONS, turns(first), turns(other), strict=True):
        assert all(one), question.category  # no empty answers, which would all be the same
        if TEMPERATURES.get(question.category) != 0.1:  # greedy or nearly so
            assert (one == two) == (TEMPERATURES.get(question.category) == 0), question.category
    assert all(a["answer_id"] != b["answer_id"] for a, b in zip(first[:2], other[:2], strict=True))


def test_each_question_has_a_stream_of_its_own_whatever_stands_around_it(player):
    whole = played(player)
    assert played(player, QUESTIONS[::-1]) == whole[::-1]
    assert [played(player, [question])[0] for question in QUESTIONS] == whole
    twins = [replace(QUESTIONS[0], id=1), replace(QUESTIONS[0], id=2, turns=QUESTIONS[0].turns[:1] * 2)]
    (a, _), (b, c) = turns(played(player, twins))
    assert a != b and b != c


@pytest.mark.parametrize("template", ["chat", "paper", "Q: {prompt}\nA: "])
def test_the_second_turn_sees_the_first_answer_in_the_one_template_at_fastchats_temperatures(player, template):
    """Each answer once more, by itself, from messages written out here."""
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
    # What self-play samples with does not count, but for the size of a batch.
    generation = GenerationConfig.from_defaults(temperature=3.0, top_p=0.1, batch_size=3)
    rows = played(player, questions, template, generation=generation)
    for question, (first, second) in zip(questions, turns(rows), strict=True):
        history = [{"role": "user", "content": question.turns[0]}]
        for number, found in ((1, first), (2, second)):
            [(text, ids)] = encode_prompts(tokenizer, [history], template)
            assert number == 1 or (first in text and question.turns[1] in text)
            one = {
                "id": f"{question.id}/{number}",
                "prompt": text,
                "prompt_ids": tuple(ids),
                "real": "",
                "real_ids": (),
            }
            temperature = expected.get(question.category, 0.7)
            again = again_of(model, tokenizer, one, temperature, stops)
            assert found == again.replace("<|start|>", "").replace("<|end|>", "").strip(), (question, number)
            history += [{"role": "assistant", "content": found}, {"role": "user", "content": question.turns[1]}]


def again_of(model, tokenizer, example, temperature, stops) -> str:
    from spin.data.examples import Example
    from spin.evaluation.external.mt_bench import _seed

    config = GenerationConfig.from_defaults(temperature=temperature, batch_size=1)
    [found] = generate_answers(model, tokenizer, [Example(**example)], 1, config, 12, stops, _seed(0))
    return found.text


def test_a_control_token_that_the_model_spells_is_not_one_in_the_second_prompt(player, tiny_folder):
    model, _, stops = player
    [(first, _)] = turns(played(player, QUESTIONS[2:3]))
    word = next(a + b for a, b in pairwise(first) if (a + b).isascii())
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    assert tokenizer(word)["input_ids"] == [len(tokenizer) - 1]  # an id that the model does not have
    [(again, second)] = turns(played((model, tokenizer, stops), QUESTIONS[2:3]))
    assert again == first.replace(word, "").strip() and second


def test_a_prompt_without_room_is_not_cut_but_named(player):
    said, done = [], []
    long = replace(QUESTIONS[4], id="long", turns=("x" * 1100, "And?"))
    tight = replace(QUESTIONS[5], id="tight", turns=("y" * 970, "And what then, what then, what then?"))
    rows = played(player, [long, tight, QUESTIONS[0]], tokens=100, say=said.append, advance=done.append)
    (a, b), (c, d), other = turns(rows)
    assert (a, b, d) == ("ERROR", "ERROR", "ERROR") and c not in ("", "ERROR") and "ERROR" not in other
    assert sum(done) == 6
    assert len(said) == 2 and "3 of 6 prompts have no room" in said[0] and "context ends at 1024" in said[0]
    assert re.search(r"\(question/turn: long/1, long/2, tight/2\)", said[0])
    assert "1 of 6 prompts have their answer cut" in said[1] and "tight/1" in said[1]
    said.clear()
    assert played(player, say=said.append) and said == []


def test_answers_that_were_kept_are_not_given_again(player, tmp_path):
    whole, done = played(player), []

    def keep(part):
        return ResumableShards(tmp_path / part, print)

    def stop(answers):
        done.append(answers)
        if sum(done) >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        played(player, keep=keep, advance=stop)
    assert 12 <= sum(done) < 16
    again = []
    assert played(player, keep=keep, advance=again.append) == whole
    assert 0 < sum(again) <= 16 - 8


# --- grades -----------------------------------------------------------------------------------------------------------


ROWS = [
    {
        "question_id": q.id,
        "answer_id": f"{i}",
        "model_id": "iter7",
        "choices": [{"index": 0, "turns": [f"one {'a' * i}", f"two {{b}} {i}"]}],
        "tstamp": 0.0,
    }
    for i, q in enumerate(QUESTIONS)
]


def by_length(prompt: str) -> str:
    """10 less the number of letters a in the first answer; no rating for second turns of stem."""
    if "as to stem" in prompt:
        return "I can't say."
    letters = re.search("\none (a*)\n", prompt)[1]
    return f"Well. Rating: [[{10 - len(letters)}]]"


def test_both_turns_are_rated_and_the_rating_is_the_judges(serve):  # noqa: F811
    server, said, done = serve(by_length), [], []
    verdicts = judge_answers(ROWS, QUESTIONS, server.judge(), said.append, advance=done.append)
    assert [(one["question_id"], one["turn"]) for one in verdicts] == [(81 + i, t) for i in range(8) for t in (1, 2)]
    for one in verdicts:
        i = one["question_id"] - 81
        assert one["score"] == (None if (i, one["turn"]) == (6, 2) else 10 - i)
        assert one["model"] == "iter7" and one["category"] == CATEGORIES[i] and one["judgment"].strip()
    assert said == [
        "MT-Bench: 1 of 16 verdicts hold no rating that can be read, and are left out (question/turn: 87/2)"
    ]
    assert sum(done) == 16 and len(server.seen) == 16


def test_a_judge_sees_the_conversation_the_reference_where_it_counts_and_no_name(serve):  # noqa: F811
    server = serve(by_length)
    judge_answers(ROWS, QUESTIONS, server.judge(), lambda text: None)
    prompts = dict(zip([(q.category, turn) for q in QUESTIONS for turn in (1, 2)], server.prompts, strict=True))
    for (category, turn), prompt in prompts.items():
        question = next(q for q in QUESTIONS if q.category == category)
        answers = ROWS[question.id - 81]["choices"][0]["turns"]
        for number in (0, 1):
            assert (question.turns[number] in prompt) == (f"\n{answers[number]}\n" in prompt) == (number < turn)
        assert ("second answer" in prompt) == (turn == 2) and "[[5]]" in prompt and "iter7" not in prompt
        assert ("Reference answer" in prompt) == (category in ("math", "reasoning")), category
        assert ("is a reference" in prompt) == (category in ("math", "reasoning"))
    assert "It is 42 {exactly}." in prompts["math", 1] and "It is 42 {exactly}." in prompts["math", 2]
    assert prompts["math", 2].count("=== Reference answer ===") == 1  # the second is empty
    assert "Uncertain." in prompts["reasoning", 2] and "\nNo.\n" in prompts["reasoning", 2]
    assert "No." not in prompts["reasoning", 1] and "not for judging" not in prompts["extraction", 1]


def test_the_score_is_the_mean_of_what_was_rated(serve):  # noqa: F811
    verdicts = judge_answers(ROWS, QUESTIONS, serve(by_length).judge(), lambda text: None)
    found = mt_bench_score(verdicts, 500, 0)
    first, second = [10 - i for i in range(8)], [10 - i for i in range(8) if i != 6]
    assert found["first_turn"] == np.mean(first) and found["second_turn"] == pytest.approx(np.mean(second))
    assert found["score"] == pytest.approx(np.mean([*first, *second]))
    assert found["by_category"] == {category: 10 - i for i, category in enumerate(CATEGORIES)}
    assert (found["n"], found["verdicts"], found["unparsed"]) == (8, 16, 1)
    for name in ("score", "first_turn", "second_turn"):
        low, high = found[f"{name}_interval"]
        assert 3 <= low < found[name] < high <= 10
    assert found == mt_bench_score(verdicts, 500, 0) and json.loads(json.dumps(found)) == found


def test_the_interval_is_over_questions_not_over_turns():
    """Two turns that always agree are no more to go by than one."""
    rng = np.random.default_rng(0)
    scores = rng.integers(1, 11, 50)
    both = [
        {"question_id": i, "category": "x", "turn": turn, "score": float(score)}
        for i, score in enumerate(scores)
        for turn in (1, 2)
    ]
    found = mt_bench_score(both, 500, 0)
    assert found["score_interval"] == found["first_turn_interval"] == found["second_turn_interval"]
    low, high = found["score_interval"]
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 50**0.5, rel=0.15)


def test_no_rating_at_all_is_no_score(tiny_folder, tmp_path):
    judge = LocalJudge(tiny_folder)  # random, and too short for these prompts
    said = []
    found = mt_bench_score(judge_answers(ROWS[:2], QUESTIONS, judge, said.append, max_new_tokens=4))
    assert found["unparsed"] == 4 and said
    for name in ("score", "score_interval", "first_turn", "second_turn"):
        assert found[name] is None
    assert found["by_category"] == {"writing": None, "roleplay": None}


def test_a_reward_model_can_not_rate(tmp_path):
    make_reward(tmp_path / "model")
    with pytest.raises(UserError, match="gives no ratings") as caught:
        judge_answers(ROWS, QUESTIONS, RewardModel(tmp_path / "model"))
    assert one_line(caught.value)


def test_grading_that_is_stopped_asks_nobody_twice(serve, tmp_path):  # noqa: F811
    server = serve(by_length)
    whole = judge_answers(ROWS, QUESTIONS, server.judge(), lambda text: None)
    server.seen.clear()
    server.faults = [None] * 11 + [(401, {}, b"")]
    kept = ResumableShards(tmp_path / "verdicts", print)
    with pytest.raises(UserError):
        judge_answers(ROWS, QUESTIONS, server.judge(), lambda text: None, keep=kept)
    assert judge_answers(ROWS, QUESTIONS, server.judge(), lambda text: None, keep=kept) == whole
    assert len(server.seen) == 12 + 8


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[[ 10 ]]", 10),
        ("[[1]]", 1),
        ("[[6]], I repeat: [[6.0]]", 6),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[0.9]]", None),
        ("[[-5]]", None),
        ("[[10.1]]", None),
        ("first [[9]], second [[4]]", None),
        ("[[11]] [[7]]", None),
        ("[7]", None),
        ("7/10", None),
        ("[[7/10]]", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_a_rating_is_read_and_never_guessed(reply, rating):
    assert parse_rating(reply) == rating


def test_settings_of_the_option():
    settings = load("evaluation=mt_bench").evaluation
    assert settings.name == "mt_bench" and settings.enabled and settings.judge_timeout == 60
    assert settings.questions is settings.judge is settings.judge_model is None
