"""Conversations from records of many formats: columns, roles, interruptions and tools; counts that add up."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.config.schema import DataConfig
from spin.data.counts import Counts
from spin.data.examples import load_dataset
from spin.data.formats import exchanges
from spin.data.messages import ROLES
from spin.data.sources import find_source
from spin.models import tiny
from spin.runtime.errors import UserError


def read(*rows, tools=False, **changes):
    """Return the exchanges as lists of (role, text), the counts without `read`, which is checked, and the notes."""
    counts, notes = Counts(), []
    config = DataConfig.from_defaults(path="rows.jsonl", **changes)
    answers = list(exchanges(rows, config, counts, tools, notes.append))
    assert counts.pop("read", 0) == len(answers) + counts.total()
    return [texts([*exchange.messages, exchange.answer]) for exchange in answers], dict(counts), notes


def texts(messages):
    return [(message["role"], message["content"]) for message in messages]


def chat(*turns, **columns):
    return {
        "messages": [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns],
        **columns,
    }


ASK, TELL = ("user", "Name a tree."), ("assistant", "Oak.")
CALL = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(("developer", "Be brief."), ASK, TELL), [("system", "Be brief."), ASK, TELL]),
        (chat(("Human", "Name a tree."), ("model", "Oak.")), [ASK, TELL]),
        (chat(("system", None), ASK, TELL), [ASK, TELL]),
        (chat(("user", "Hello."), ASK, TELL), [("user", "Hello.\n\nName a tree."), TELL]),
        (chat(("assistant", "Welcome."), ASK, TELL), [("assistant", "Welcome."), ASK, TELL]),
        (chat(("user", [{"type": "text", "text": "Name a tree.", "image": None}]), ("assistant", ["Oak."])), [ASK, TELL]),
        ({"messages": json.dumps(chat(ASK, TELL)["messages"])}, [ASK, TELL]),
        ({"messages": [json.dumps(turn) for turn in chat(ASK, TELL)["messages"]]}, [ASK, TELL]),
        ({"conversation": [{"speaker": "user", "text": "Name a tree."}, {"speaker": "bot", "text": "Oak."}]}, [ASK, TELL]),
        ({"prompt": json.dumps([{"role": "user", "content": "Name a tree."}]), "completion": "Oak."}, [ASK, TELL]),
        ({"prompt": '["a"]', "completion": "Oak."}, [("user", '["a"]'), TELL]),
        ({"instruction": "Add.", "context": "1, 2", "response": "3"}, [("user", "Add.\n\n1, 2"), ("assistant", "3")]),
        (
            {"instruction": "More?", "input": "", "output": "Yes.", "system": "Be kind.", "history": [["A", "B"]]},
            [("system", "Be kind."), ("user", "A"), ("assistant", "B"), ("user", "More?"), ("assistant", "Yes.")],
        ),
        (chat(ASK, TELL, system="Be kind."), [("system", "Be kind."), ASK, TELL]),
        (chat(("system", "Mine."), ASK, TELL, system="Be kind."), [("system", "Mine."), ASK, TELL]),
        ({"id": "desk_7", "conversations": chat(ASK, TELL)["messages"]}, [ASK, TELL]),
        ({"prompt": "Name a tree.", "chosen": "Oak.", "rejected": "Pike."}, [ASK, TELL]),
        ({"question": "Name a tree.", "system": "S", "chosen": "Oak.", "rejected": "Eel."}, [("system", "S"), ASK, TELL]),
        ({"input": "Name a tree.", "chosen": "Oak.", "rejected": "Pike."}, [ASK, TELL]),
        (
            {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"},
            [("user", "Add.\n\n1, 2"), ("assistant", "3")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Name a tree."}],
                "chosen": {"from": "gpt", "value": "Oak."},
                "rejected": {"from": "gpt", "value": "Pike."},
            },
            [ASK, TELL],
        ),
        (
            {"chosen": "\n\nHuman: Name a tree.\n\nAssistant: Oak.", "rejected": "\n\nHuman: Name a tree.\n\nAssistant: Eel."},
            [ASK, TELL],
        ),
        (
            {"prompt": "\n\nHuman: A\n\nAssistant: B\n\nHuman: Name a tree.\n\nAssistant:", "completion": "Oak."},
            [("user", "A"), ("assistant", "B"), ASK, TELL],
        ),
        ({"prompt": "Human: is one a kind of ape?", "completion": "Yes."}, [("user", "Human: is one a kind of ape?"), ("assistant", "Yes.")]),
        ({"conversation": [{"input": "Name a tree.", "output": "Oak."}]}, [ASK, TELL]),
        ({"conversation": [{"assistant": "Oak.", "human": "Name a tree."}]}, [ASK, TELL]),
        ({"conversations": ["Name a tree.", "Oak."]}, [ASK, TELL]),
        ({"contents": [{"role": "user", "parts": [{"text": "Name a tree."}]}, {"role": "model", "parts": [{"text": "Oak."}]}]}, [ASK, TELL]),
        ({"messages": [{"sender": "user", "message": "Name a tree."}, {"sender": "agent", "message": "Oak."}]}, [ASK, TELL]),
        ({"question": "Add 1 and 2.", "answer": 3}, [("user", "Add 1 and 2."), ("assistant", "3")]),
        ({"query": "Name a tree.", "output": "Oak."}, [ASK, TELL]),
        ({"question": "Name it.", "context": "A tree.", "answer": "Oak."}, [("user", "Name it.\n\nA tree."), TELL]),
        ({"input": "Name a tree.", "output": "Oak."}, [ASK, TELL]),
        ({"input": "Add.", "context": "1, 2", "output": "3"}, [("user", "Add.\n\n1, 2"), ("assistant", "3")]),
        ({"instruction": "Add.", "input": "", "context": ["1", "2"], "output": "3"}, [("user", "Add.\n\n1\n2"), ("assistant", "3")]),
        ({"question": " Name a tree. ", "input": "A", "context": "B", "answer": "Oak."}, [("user", "Name a tree.\n\nA\n\nB"), TELL]),
        (chat(ASK, TELL, system=[{"type": "text", "text": "Be kind."}]), [("system", "Be kind."), ASK, TELL]),
        ({"instruction": "A", "output": "B", "history": {"user": "C", "assistant": "D"}}, [("user", "C"), ("assistant", "D"), ("user", "A"), ("assistant", "B")]),
        ({"problem": "Name a tree.", "solution": "Oak.", "answer": "O"}, [ASK, TELL]),
        ({"prompt": "Route?", "completion": '{"from": "Bonn", "to": "Ulm"}'}, [("user", "Route?"), ("assistant", '{"from": "Bonn", "to": "Ulm"}')]),
        ({"prompt": "JSON?", "completion": '{"answer": 42}'}, [("user", "JSON?"), ("assistant", '{"answer": 42}')]),
        ({"instruction": "A", "output": "B", "history": [{"user": "C", "assistant": "D"}]}, [("user", "C"), ("assistant", "D"), ("user", "A"), ("assistant", "B")]),
        ({"real": chat(ASK, TELL)["messages"], "generated": chat(ASK, ("assistant", "Pike."))["messages"]}, [ASK, TELL]),
    ],
)  # fmt: skip
def test_shapes(row, expected):
    assert read(row)[:2] == ([expected], {})


def test_each_record_has_its_format():
    rows = [chat(ASK, TELL), {"prompt": "Name a tree.", "response": "Fir.", "messages": None}, {"a": 1}]
    conversations, counts, _ = read(*rows)
    assert [turns[-1][1] for turns in conversations] == ["Oak.", "Fir."] and counts == {"unknown columns": 1}
    with pytest.raises(UserError, match="no known format has a"):
        read({"a": 1}, {"b": 2})


def test_unread_columns():
    rows = [chat(ASK, TELL, id=1, source="x", score=None), chat(ASK, TELL, source="y", topic="z")]
    assert read(*rows)[2] == ["note: columns of the data that are not read: source, topic"]
    row = chat(ASK, TELL, tools=TOOLS)
    assert read(row)[2] == ["note: columns of the data that are not read: tools"] and read(row, tools=True)[2] == []


def test_history_is_not_a_list():
    row = {"prompt": "Name a tree.", "response": "Oak.", "history": "They met at noon."}
    assert read(row)[:2] == ([], {"history that is no list": 1})
    assert read({**row, "history": ["A", "B"]})[0] == [[("user", "A"), ("assistant", "B"), ASK, TELL]]
    for history in ([["A", "B"], ["C", None]], {"topic": "Rome"}):
        assert read({**row, "history": history})[:2] == ([], {"message without a role": 1})
    conversations, _, notes = read(chat(ASK, TELL, history="of Rome"))  # it may be a topic
    assert conversations == [[ASK, TELL]] and notes == ["note: columns of the data that are not read: history"]


def test_chosen_answer_is_noted_once():
    rows = [{"prompt": "Name a tree.", "chosen": text, "rejected": "Pike."} for text in ("Oak.", "Fir.")]
    assert read(*rows)[2] == ["note: of two answers, the chosen (or real) one is the human answer"]


def test_answers_after_a_break():
    turns = [ASK, TELL, ("assistant", "Another one?"), ("user", "Yes."), ("assistant", "Birch.")]
    conversations, counts, _ = read(chat(*turns), turns="all")
    assert [answer[-1][1] for answer in conversations] == ["Oak.\n\nAnother one?", "Birch."] and counts == {}
    conversations, counts, _ = read(chat(*turns[:2], ("narrator", "Night falls."), *turns[3:]), turns="all")
    assert len(conversations) == 1 and counts == {"role narrator": 1}
    assert read(chat(("user", [{"type": "image"}]), TELL))[1] == {"content that is no text": 1}
    assert read(chat({"content": "Hi"}, TELL))[1] == {"message without a role": 1}
    assert read(chat(ASK, ("system", "Be brief."), TELL))[1] == {"no user's message right before the answer": 1}


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"training": False}])
def test_answers_excluded_from_training(flag):
    turns = [ASK, {"role": "assistant", "content": "Pike.", **flag}, ("user", "No."), TELL]
    expected = [ASK, ("assistant", "Pike."), ("user", "No."), TELL]
    assert read(chat(*turns))[:2] == ([expected], {})
    assert read(chat(*turns), turns="all")[:2] == ([expected], {"not to be learnt": 1})
    assert read(chat(*turns[:2]))[:2] == ([], {"not to be learnt": 1})


def test_answer_labelled_bad():
    rows = [{"prompt": "Name a tree.", "completion": text, "label": text == "Oak."} for text in ("Oak.", "Pike.")]
    assert read(*rows) == ([[ASK, TELL]], {"not to be learnt": 1}, [])


def test_rejected_answer_to_another_prompt():
    pairs = {"Name a tree.": "Eel.", "Name a fish.": "Carp."}
    rows = [
        {"chosen": chat(ASK, TELL)["messages"], "rejected": chat(("user", question), ("assistant", text))["messages"]}
        for question, text in pairs.items()
    ]
    rows.append({**rows[0], "rejected": [*rows[0]["rejected"], *rows[1]["rejected"]]})
    rows.append({"prompt": "Name a tree.", "chosen": "Oak.", "rejected": rows[0]["rejected"]})
    assert read(*rows, generated="file")[:2] == ([[ASK, TELL]] * 2, {"rejected answer: after another prompt": 2})
    assert read(*rows)[:2] == ([[ASK, TELL]] * 4, {})


@pytest.mark.parametrize("turns", ["first", "all"])
def test_tools(turns):
    row = chat(ASK, CALL, {"role": "tool", "content": "Oak"}, TELL, tools=TOOLS)
    answers = 2 if turns == "all" else 1
    assert read(row, turns=turns)[:2] == ([], {"tool call": answers})  # the template does not support tools
    assert read({**row, "tools": None}, turns=turns, tools=True)[:2] == ([], {"tool call": answers})
    for column in (TOOLS, json.dumps(TOOLS)):
        conversations, counts, _ = read({**row, "tools": column}, turns=turns, tools=True)
        assert conversations == [[ASK, ("assistant", "Let me look."), ("tool", "Oak"), TELL]]
        assert counts == ({"tool call": 1} if turns == "all" else {})
    messages = [
        ("human", "Name a tree."),
        ("function_call", '{"name": "f", "arguments": {}}'),
        ("observation", "Oak"),
        ("gpt", "Oak."),
    ]
    row = {"conversations": [{"from": role, "value": text} for role, text in messages], "tools": json.dumps(TOOLS)}
    assert read(row, tools=True)[0] == [[ASK, ("assistant", ""), ("tool", "Oak"), TELL]]


TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from([*ROLES, "narrator"]) | st.none(),
        "content": st.sampled_from(["a", "b", "", None, 3, ["x"], [3]]),
    },
    optional={"weight": st.sampled_from([0, 1]), "train": st.booleans(), "tool_calls": st.just(CALL["tool_calls"])},
)
ROW = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(TURN | st.none(), max_size=8), "prompt": st.lists(TURN, max_size=3) | st.just("P"),
                  "response": st.lists(TURN, max_size=2) | st.sampled_from(["R", 2, math.nan, "\n\nHuman: a\n\nAssistant: b"]), "tools": st.sampled_from([None, TOOLS]),
                  "history": st.lists(st.just(["q", "a"]) | TURN, max_size=2), "rejected": st.just("N") | st.lists(TURN, max_size=3), "chosen": st.just("Y") | st.lists(TURN, max_size=3),
                  "label": st.booleans(), "question": st.lists(st.just("Q") | st.just({"input": "a", "output": "b"}), max_size=2)}
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(ROW, max_size=4), st.sampled_from(["first", "all"]), st.booleans(), st.sampled_from(["model", "file"]))
def test_counts_add_up(rows, turns, tools, generated):
    try:
        conversations, counts, _ = read(*rows, turns=turns, tools=tools, generated=generated)  # `read` checks the sum
    except UserError:
        return
    if turns == "first":
        assert len(conversations) + sum(counts.values()) == len(rows)
    for exchange in conversations:
        assert exchange[-1][0] == "assistant" and any(role == "user" for role, _ in exchange[:-1])
        assert exchange[-2][0] in ("user", "tool")


@pytest.mark.parametrize("template", ["{prompt} ", "chat"])
def test_rejected_answers(tmp_path, template):
    rows = [
        {"prompt": question, "chosen": "Oak.", "rejected": rejected}
        for question, rejected in (("A", "Pike. "), ("B", None), ("C", "x" * 99))
    ]
    rows.append(
        {
            "real": chat(("user", "D"), TELL)["messages"],
            "generated": chat(("user", "D"), ("assistant", "Eel."))["messages"],
        }
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny.tokenizer()
    limits = {"max_response_length": 40, "template": template, "generated": "file"}
    dataset = load_dataset(DataConfig.from_defaults(path=str(path), **limits), tokenizer, {0}, 0, tmp_path)
    reasons = {"rejected answer: empty": 1, "rejected answer: answer too long": 1}
    assert dataset.counts == {"read": 4, "kept": 2, **reasons}
    end = tokenizer.eos_token
    space = " " if template != "chat" else ""
    assert {tokenizer.decode(example.rejected) for example in dataset.train} == {f"Pike.{space}{end}", f"Eel.{end}"}
    assert {tokenizer.decode(example.real_ids) for example in dataset.train} == {f"Oak.{end}"}


def test_json_records_by_id(tmp_path):
    record = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    (tmp_path / "by_id.json").write_text(json.dumps({"a": record, "b": record}))
    config = DataConfig.from_defaults(path=str(tmp_path / "by_id.json"))
    assert list(find_source(config, tmp_path).read(Counts())) == [record, record]
    (tmp_path / "by_id.json").write_text(json.dumps({"messages": record["messages"]}))
    with pytest.raises(UserError, match="holds no records"):
        list(find_source(config, tmp_path).read(Counts()))
