"""Chat templates like those of current models: the ids of prompt, answer and end match the rendered template."""

import copy
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from spin.config.schema import DataConfig
from spin.data.examples import load_dataset
from spin.data.templates import ChatTemplate, end_of_turn
from tests.data.test_examples import byte_level, sentencepiece  # noqa: F401

FOLDER = Path(__file__).parent / "templates"
EOS, THINKS, NO_THOUGHT = "<|endoftext|>", ["<think>", "</think>"], "<think>\n\n</think>\n\n"
# Template, the tokens that it writes, the token that ends an answer (EOS is that of the tokenizer), and options.
FAMILIES = {
    "chatml": ("chatml", ["<|im_start|>"], "<|im_end|>", {}),
    "llama2": ("llama2", [], "</s>", {}),
    "llama2 of bytes": ("llama2", [], EOS, {}),
    "llama3": ("llama3", ["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", {}),
    "mistral": ("mistral", [], "</s>", {}),
    "gemma": ("gemma", ["<start_of_turn>"], "<end_of_turn>", {}),
    "qwen3": ("qwen3", ["<|im_start|>", *THINKS], "<|im_end|>", {}),
    "qwen3 without thoughts": ("qwen3", ["<|im_start|>", *THINKS], "<|im_end|>", {"enable_thinking": False}),
    "qwen3 with thoughts in pieces": ("qwen3", ["<|im_start|>"], "<|im_end|>", {}),
    "r1": ("r1", ["<|User|>", "<|Assistant|>", *THINKS], EOS, {}),
    "phi": ("phi", ["<|system|>", "<|user|>", "<|assistant|>"], "<|end|>", {}),
    "olmo": ("olmo", [], EOS, {}),
    "granite": ("granite", ["<|start_of_role|>", "<|end_of_role|>"], "<|end_of_text|>", {}),
    "gpt-oss": ("gptoss", ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"], "<|return|>", {}),
    "smollm3": ("smollm", ["<|im_start|>", *THINKS], "<|im_end|>", {}),
    "smollm3 without thoughts": ("smollm", ["<|im_start|>", *THINKS], "<|im_end|>", {"enable_thinking": False}),
    "cohere": ("cohere", ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"], "<|END_OF_TURN_TOKEN|>", {}),
    "vicuna": ("vicuna", [], EOS, {}),
    "zephyr": ("zephyr", [], "</s>", {}),
}  # fmt: skip
REFUSE_SYSTEM = ("mistral", "gemma")
USER, HUMAN, MODEL = ["Name a tree.", "And one more?"], ["An oak is one.", "A birch."], ["<odd> ", "9 trees\nof it"]


def tokenizer_of(family, byte_level, sentencepiece):  # noqa: F811
    name, tokens, end, options = FAMILIES[family]
    base = sentencepiece if end == "</s>" else byte_level
    eos = "</s>" if end == "</s>" else EOS
    raw = Tokenizer.from_str(base.backend_tokenizer.to_str())
    template = (FOLDER / f"{name}.jinja").read_text().rstrip("\n")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos, chat_template=template)
    tokenizer.add_tokens([AddedToken(token, special=token not in THINKS) for token in (*tokens, end)])
    return tokenizer, options


@pytest.fixture
def family(request, byte_level, sentencepiece):  # noqa: F811
    return tokenizer_of(request.param, byte_level, sentencepiece)


every_family = pytest.mark.parametrize("family", FAMILIES, indirect=True)


def talk(answers, system=None):
    turns = [{"role": "system", "content": system}] * bool(system)
    for question, answer in zip(USER, answers, strict=False):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def load(tmp_path, tokenizer, options, rows, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes: list[str] = []
    config = DataConfig.from_defaults(path=str(path), template="chat", template_options=options, **changes)
    dataset = load_dataset(config, tokenizer, {tokenizer.eos_token_id}, 0, tmp_path, say=notes.append)
    counts = dict(dataset.counts)
    assert counts.pop("read") == sum(counts.values())
    return dataset, notes


def rendered_ids(tokenizer, options, messages, end):
    """Return the ids of the rendered conversation, up to the token that ends its last answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    while ids[-1] != end or ids[-2] == end:  # Phi's template adds one more token
        ids.pop()
    return ids


def end_token(tokenizer, options):
    return end_of_turn(tokenizer, ChatTemplate(tokenizer, options))


@every_family
@pytest.mark.parametrize("turns", [1, 2])
def test_prompt_answer_and_end(family, tmp_path, turns):
    tokenizer, options = family
    end = end_token(tokenizer, options)
    dataset, _ = load(tmp_path, *family, [{"messages": talk(HUMAN[:turns])}], turns="all")
    assert len(dataset.train) == turns
    for example in dataset.train:
        number = HUMAN.index(example.real)
        ids = rendered_ids(*family, talk(HUMAN[: number + 1]), end)
        assert list(example.prompt_ids + example.real_ids) == ids
        assert example.real_ids.count(end) == 1
        # With a generated answer instead of the human one, the prompt is the same.
        for answer in MODEL:
            ids = rendered_ids(*family, talk([*HUMAN[:number], answer.strip()]), end)
            assert tuple(ids[: len(example.prompt_ids)]) == example.prompt_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_end(name, byte_level, sentencepiece):  # noqa: F811
    tokenizer, options = tokenizer_of(name, byte_level, sentencepiece)
    assert tokenizer.convert_ids_to_tokens(end_token(tokenizer, options)) == FAMILIES[name][2]


@pytest.mark.parametrize("family", ["qwen3", "qwen3 without thoughts", "qwen3 with thoughts in pieces"], indirect=True)
def test_empty_thought_is_in_the_prompt(family, tmp_path):
    dataset, notes = load(tmp_path, *family, [{"messages": talk(HUMAN[:1])}])
    assert family[0].decode(dataset.train[0].prompt_ids).endswith(f"assistant\n{NO_THOUGHT}")
    assert family[0].decode(dataset.train[0].real_ids) == "An oak is one.<|im_end|>"
    assert any("part of the prompt" in line for line in notes) == (not family[1])
    assert any("ends answers with <|im_end|>, so that generation stops there" in line for line in notes)


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
@pytest.mark.parametrize("inline", [True, False])
def test_thoughts_are_learnt(family, tmp_path, inline):
    messages = talk(HUMAN[:1])
    if inline:
        messages[-1]["content"] = "<think>\nTrees.\n</think>\n\nAn oak is one."
    else:
        messages[-1]["reasoning_content"] = "Trees."
    [example] = load(tmp_path, *family, [{"messages": messages}])[0].train
    tokenizer = family[0]
    assert (
        list(example.prompt_ids) == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    )
    assert tokenizer.decode(example.real_ids) == "<think>\nTrees.\n</think>\n\nAn oak is one.<|im_end|>"
    rows = [{"messages": messages}, {"messages": talk(["A fir."])}]
    dataset, _ = load(tmp_path, tokenizer, {"enable_thinking": False}, rows)
    assert dataset.counts == {"read": 2, "kept": 1, "thought that the template has no place for": 1}


@pytest.mark.parametrize("family", ["gpt-oss"], indirect=True)
def test_thought_in_a_channel(family, tmp_path):
    messages = [*talk(HUMAN[:1])[:1], {"role": "assistant", "content": HUMAN[0], "thinking": "Trees."}]
    rows = [{"messages": messages}, {"messages": talk(["A fir."])}]
    dataset, _ = load(tmp_path, *family, rows)
    texts = {tuple(family[0].decode(ids) for ids in (row.prompt_ids, row.real_ids)) for row in dataset.train}
    prompt = "<|start|>user<|message|>Name a tree.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>"
    assert texts == {
        (prompt, f"<|channel|>analysis<|message|>Trees.<|end|><|start|>assistant{final}An oak is one.<|return|>"),
        (prompt + final, "A fir.<|return|>"),
    }


@pytest.mark.parametrize("family", ["smollm3"], indirect=True)
def test_system_message_disables_thoughts(family, tmp_path):
    rows = [{"messages": talk(HUMAN[:1], "Be kind. /no_think")}, {"messages": talk(["A fir."])}]
    dataset, _ = load(tmp_path, *family, rows)
    prompt_ends = {row.real: family[0].decode(row.prompt_ids).split("assistant\n")[1] for row in dataset.train}
    assert prompt_ends == {HUMAN[0]: "<think>\n\n</think>\n", "A fir.": ""}


@pytest.mark.parametrize("family", ["chatml", "qwen3"], indirect=True)
def test_unsupported_thought_is_noted(family, tmp_path):
    row = {"messages": [*talk(HUMAN[:1])[:1], {"role": "assistant", "content": HUMAN[0], "thinking": "Trees."}]}
    dataset, notes = load(tmp_path, *family, [row])
    is_learnt = "Trees." in family[0].decode(dataset.train[0].real_ids)
    assert is_learnt == ("<think>" in family[0].chat_template)
    assert len([line for line in notes if "no place for reasoning_content" in line]) == (not is_learnt)


@pytest.mark.parametrize("family", ["r1"], indirect=True)
def test_opened_thought(family, tmp_path):
    dataset, notes = load(tmp_path, *family, [{"messages": talk(HUMAN[:1])}])
    assert family[0].decode(dataset.train[0].prompt_ids).endswith("<|Assistant|>")
    assert len([line for line in notes if "ends a prompt with '<think>" in line and "data.template" in line]) == 1
    rows = [{"messages": talk(["<think>\nTrees.\n</think>\n\nAn oak is one."])}, {"messages": talk(HUMAN[:1])}]
    dataset, _ = load(tmp_path, *family, rows)
    assert dataset.counts == {"read": 2, "kept": 1, "thought that the template has no place for": 1}


@every_family
def test_system(family, tmp_path, request):
    tokenizer, _ = family
    name = request.node.callspec.params["family"]
    rows = [{"messages": talk(HUMAN[:1], "Be kind.")}, {"messages": talk(["A fir."])}]
    dataset, notes = load(tmp_path, *family, rows)
    assert dataset.counts == {"read": 2, "kept": 2}
    [example] = [example for example in dataset.train if example.real == HUMAN[0]]
    assert "Be kind." in tokenizer.decode(example.prompt_ids)
    assert len([line for line in notes if "takes no system message" in line]) == (name in REFUSE_SYSTEM)


@pytest.mark.parametrize("family", ["gemma"], indirect=True)
def test_refused_messages(family, tmp_path):
    rows = [
        {"messages": [{"role": "assistant", "content": "Welcome."}, *talk(HUMAN[:1])]},
        {"messages": talk(["A fir."])},
    ]
    dataset, notes = load(tmp_path, *family, rows)
    assert dataset.counts == {"read": 2, "kept": 1, "refused by the template": 1}
    assert len([line for line in notes if "user and model take turns" in line]) == 1


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_tools_are_rendered(family, tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "tree"}'}}
    messages = [
        {"role": "user", "content": USER[0]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "oak"},
        {"role": "assistant", "content": HUMAN[0]},
    ]
    tools = [{"type": "function", "function": {"name": "find"}}]
    dataset, _ = load(tmp_path, *family, [{"messages": messages, "tools": tools}], turns="all")
    assert dataset.counts == {"read": 2, "kept": 1, "tool call": 1}
    text = family[0].decode(dataset.train[0].prompt_ids)
    for part in ('Tools:\n{"type"', '{"name": "find", "arguments": {"what": "tree"}}', "<tool_response>\noak"):
        assert part in text
    # Mistral's and Kimi's templates require the ids of calls.
    with_ids = copy.deepcopy(family[0])
    with_ids.chat_template += (
        "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].id or raise_exception('no id') }}{% endfor %}"
    )
    dataset, _ = load(tmp_path, with_ids, {}, [{"messages": messages, "tools": tools}, {"messages": talk(HUMAN)}])
    assert dataset.counts == {"read": 2, "kept": 2}
    # If the template does not support tools, such answers are dropped and counted.
    plain = copy.deepcopy(family[0])
    plain.chat_template = (FOLDER / "chatml.jinja").read_text()
    dataset, _ = load(
        tmp_path, plain, {}, [{"messages": messages, "tools": tools}, {"messages": talk(HUMAN)}], turns="all"
    )
    assert dataset.counts == {"read": 4, "kept": 2, "tool call": 2}


@pytest.mark.parametrize("template", ["{prompt}", "paper"])
def test_text_template_keeps_spaces(byte_level, tmp_path, template):  # noqa: F811
    rows = [
        {"prompt": "def f():\n", "completion": "    return 1\n"},
        {"prompt": "Called", "completion": " the Owl.<|im_end|>"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(DataConfig.from_defaults(path=str(path), template=template), byte_level, {2}, 0, tmp_path)
    texts = {byte_level.decode(example.prompt_ids + example.real_ids[:-1]) for example in dataset.train}
    if template == "{prompt}":
        assert texts == {"def f():\n    return 1\n", "Called the Owl."}
    assert {example.real for example in dataset.train} == {"    return 1\n", " the Owl."}


def test_end_is_not_a_token(sentencepiece, tmp_path):  # noqa: F811
    tokenizer = copy.deepcopy(sentencepiece)
    tokenizer.chat_template = (FOLDER / "chatml.jinja").read_text()
    dataset, notes = load(tmp_path, tokenizer, {}, [{"messages": talk(HUMAN[:1])}])
    assert tokenizer.decode(dataset.train[0].real_ids) == "An oak is one.<|im_end|></s>"
    assert any("'<|im_end|>', which is no token" in line for line in notes)
