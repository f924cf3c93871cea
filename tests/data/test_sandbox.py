"""Untrusted chat templates: the same text each time or a one-line error, within limits on time and memory."""

import os
import resource
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from spin.config.schema import DataConfig
from spin.data import sandbox, templates
from spin.data.examples import load_dataset
from spin.data.messages import Exchange
from spin.data.templates import ChatTemplate, Split, render_chat
from spin.models import tiny
from spin.runtime.bounded import Bounded, Exceeded
from spin.runtime.errors import UserError

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
LOOPS = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
HOSTILE = {
    "nested loops": (LOOPS, "takes more than 5 s"),
    "nested loops that write": (LOOPS.replace("{% e", "xxxxxxxxx{% e"), "takes more than 5 s|needs more than 512 MiB"),
    "a huge power": ("{{ 7 ** (10 ** 9) }}", "takes more than 5 s|needs more than 512 MiB"),
    "a long text": ("{{ 'a' * 10**10 }}", "needs more than 512 MiB"),
    "a text that fits in memory": ("{{ 'a' * 10**8 }}", "100,000,000 characters"),
    "a padded text": ("{{ '%99999999999d' % 3 }}", "needs more than 512 MiB|refuses messages"),
    "a long list": ("{{ [0] * 10**10 }}", "needs more than 512 MiB"),
    "doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "512 MiB",
    ),
    "a macro that calls itself": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "takes more than 5 s",
    ),
    "many brackets": ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "recursion|crashes"),
    "an include": ("{% include '/etc/passwd' %}", "no loader"),
    "an import": ("{% import '/etc/passwd' as x %}", "no loader"),
    "a parent": ("{% extends '/etc/passwd' %}", "no loader"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "globals": ("{{ raise_exception.__globals__['os'].system('touch EVIL') }}", "unsafe|undefined"),
    "globals of a cycler": ("{{ cycler.__init__.__globals__.os.system('touch EVIL') }}", "unsafe|undefined"),
    "an attribute filter": ("{{ (''|attr('__class__'))|attr('__mro__') }}", "unsafe|undefined|leaves the answer out"),
    "a format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe|leaves the answer out"),
    "a change of the messages": ("{% set _ = messages.append({'role': 'user'}) %}" + PLAIN, "unsafe"),
    "a change of a message": ("{% set _ = messages[0].update({'content': 'x'}) %}" + PLAIN, "unsafe"),
    "random numbers": (PLAIN + "{{ range(99)|random }}", "uses random numbers"),
    "random words": (PLAIN + "{{ lipsum() }}", "uses random numbers"),
    "addresses": (PLAIN + "{{ raise_exception }}", "prints the address"),
    "addresses of methods": (PLAIN + "{{ messages.index|string }}", "prints the address"),
    "an error of its own": ("{{ raise_exception('no\nnever\x1b[31m') }}", r"no never\\x1b"),
    "no template": ("{% for %}", "refuses messages"),
    "a division": ("{{ 1 / 0 }}", "division by zero"),
}  # fmt: skip


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


def children() -> int:
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


SLOW = ("nested loops that write", "a huge power", "a macro that calls itself twice")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in HOSTILE]
)
def test_hostile_template(tokenizer, name, tmp_path):
    source, expected = HOSTILE[name]
    tokenizer.chat_template = source.replace("EVIL", str(tmp_path / "touched"))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=expected) as error:
        ChatTemplate(tokenizer)
    message = str(error.value)
    assert message.startswith("data.template=chat: the tokenizer's chat template") and "set data.template" in message
    assert message.isprintable() and len(message) < 1000
    assert time.monotonic() - started < 100  # on a busy machine: the child's limit of 5 s is processor time
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert not (tmp_path / "touched").exists()
    tokenizer.chat_template = PLAIN  # the next template is not affected
    assert ChatTemplate(tokenizer).prompt([{"role": "user", "content": "Hi"}]) == "<user>Hi</s><assistant>"


def test_endless_for_system_messages(tokenizer):
    """A template that takes too long for system messages is used without them."""
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}" + LOOPS + "{% endif %}" + PLAIN
    assert not ChatTemplate(tokenizer).takes_system


def test_limits_end_the_run_early(tokenizer, tmp_path):
    """A conversation that exceeds the time limit ends the run; one that the template refuses is counted."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "short", "completion": "yes"}\n{"prompt": "a trap", "completion": "yes"}\n')
    tokenizer.chat_template = PLAIN + "{% if 'trap' in messages[0].content %}" + LOOPS + "{% endif %}"
    with pytest.raises(UserError, match="takes more than 5 s"):
        load_dataset(DataConfig.from_defaults(path=str(path), template="chat"), tokenizer, {1}, 0, tmp_path)
    tokenizer.chat_template = PLAIN + "{% if 'trap' in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    dataset = load_dataset(DataConfig.from_defaults(path=str(path), template="chat"), tokenizer, {1}, 0, tmp_path)
    assert dataset.counts == {"read": 2, "kept": 1, "refused by the template": 1}


def test_slow_conversations():
    """Many conversations together exceed the limit although each is far below it."""
    child = Bounded(lambda seconds: burn(seconds), seconds=1, each=0.02)
    assert child.map([0.001] * 300) == [[True, ""]] * 300
    assert child.map([0.3] * 2) == [[True, ""]] * 2
    with pytest.raises(Exceeded, match="takes more than 1 s"):
        child.map([0.3] * 20)


def burn(seconds: float) -> str:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return ""


def test_date_is_fixed(tokenizer):
    """A template that prints the date in the system prompt, like Llama 3's, always prints the same date."""
    date = "{% if not date_string is defined %}{% set date_string = strftime_now(F) %}{% endif %}Today: {{ date_string }}. "
    for form, printed in (("%d %b %Y", "01 Jan 2026"), ("%Y-%m-%d %H:%M:%S.%f", "2026-01-01 00:00:00.000000")):
        tokenizer.chat_template = date.replace("F", repr(form)) + PLAIN
        chat = ChatTemplate(tokenizer)
        assert chat.prompt([{"role": "user", "content": "Hi"}]).startswith(f"Today: {printed}. <user>")
        assert "the chat template prints the date; it is 01 Jan 2026 here" in " ".join(chat.notes([1]))
    chat = ChatTemplate(tokenizer, {"date_string": "26 Jul 2024"})
    assert chat.prompt([{"role": "user", "content": "Hi"}]).startswith("Today: 26 Jul 2024. ")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert f"Today: {datetime.now().year}" in rendered  # the library in this process is unchanged


def test_addresses_in_the_data(tokenizer):
    tokenizer.chat_template = PLAIN
    text = "<function f at 0x7f00aa55> and 'quotes\" at 0x1"
    assert text in render_chat(tokenizer, [{"role": "user", "content": text}])


@pytest.mark.parametrize("text", ["\ud800", "é\0\x1b", "日本 🦉", "x" * 300_000])
def test_any_text(tokenizer, text):
    tokenizer.chat_template = PLAIN
    answer = {"role": "assistant", "content": "yes"}
    [split] = ChatTemplate(tokenizer).splits([Exchange([{"role": "user", "content": text}], answer)])
    assert split == Split(f"<user>{text}</s><assistant>", "yes</s>")


def test_same_as_transformers(tokenizer):
    """Variables, tools, several templates and values outside JSON are rendered as by transformers."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"day": datetime(2020, 1, 1), "n": (1, 2)}}}
    messages = [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Hm."},
    ]
    body = (
        "{{ bos_token }}{{ tools|tojson }}{{ messages|tojson(indent=1) }}{{ x }}{{ add_generation_prompt }}{% break %}"
    )
    body = "{% for m in messages %}" + body + "{% endfor %}{% generation %}{{ eos_token }}{% endgeneration %}"
    tokenizer.chat_template = {"default": body, "tool_use": "With tools: " + body}
    for options in ({}, {"tools": [call]}, {"x": 3.5}, {"x": {"y": [None]}, "add_generation_prompt": True}):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert render_chat(tokenizer, messages, **options) == expected and len(expected) > 100


def test_child_process(tokenizer):
    """The child holds no files of this process open; a forked process starts its own; a killed child is replaced."""
    tokenizer.chat_template = PLAIN
    sandbox._child.close()
    before = children()
    reader, writer = os.pipe()
    render_chat(tokenizer, [templates.QUESTION])
    assert children() == before + 1
    os.close(writer)
    assert os.read(reader, 1) == b""  # the child does not hold the other end
    os.close(reader)
    child_pid = sandbox._child.child
    if (pid := os.fork()) == 0:
        render_chat(tokenizer, [templates.QUESTION])
        os._exit(sandbox._child.child == child_pid)
    assert os.waitpid(pid, 0)[1] == 0
    assert render_chat(tokenizer, [templates.QUESTION]) and sandbox._child.child == child_pid
    os.kill(child_pid, signal.SIGKILL)  # as an out-of-memory killer does
    with pytest.raises(UserError, match=r"crashes \(SIGKILL"):
        render_chat(tokenizer, [templates.QUESTION])
    assert render_chat(tokenizer, [templates.QUESTION])


def test_ends_with_its_parent(tmp_path):
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        child = Bounded(lambda _: str(os.getpid()))
        os.write(writer, child.map([0])[0][1].encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    grandchild = int(os.read(reader, 20))
    for _ in range(100):
        status = Path(f"/proc/{grandchild}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child outlives its parent")
