"""Tests of judges, behind a real server and as local models, and of the comparison of two policies."""

import contextlib
import gzip
import json
import re
import resource
import shutil
import socketserver
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import binomtest

from spin.evaluation.external import judges, mt_bench
from spin.evaluation.external.judges import ApiJudge, compare, finding, open_judge
from spin.evaluation.measures import bootstrap_draws, interval
from spin.models.load import load_model, load_tokenizer
from spin.runtime.errors import UserError
from spin.runtime.shards import ResumableShards

SECRET = "sk-very-secret-0123456789"
QUESTION = [{"role": "user", "content": "Which?"}]


class Server:
    """A local OpenAI-compatible server. It replies `rule(prompt)`, but to the first requests with `faults`, one each."""

    def __init__(self, rule=lambda prompt: "[[1]]"):
        self.rule, self.faults, self.seen, self.times = rule, [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # only a followed redirect sends it
                outer.seen.append(("GET", self.path, dict(self.headers), {}))
                self.send_error(404)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.seen.append(("POST", self.path, headers, body))
                outer.times.append(time.monotonic())
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "hang":
                    time.sleep(1.5)
                    return
                if fault == "reset":
                    self.connection.close()
                    return
                status, headers, reply = fault or (200, {}, None)
                if reply is None:
                    text = outer.rule(body["messages"][-1]["content"])
                    message = {"role": "assistant", "content": text}
                    reply = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
                    headers = {"Content-Type": "application/json"}
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def judge(self, timeout=5, retries=2) -> ApiJudge:
        return ApiJudge(self.address, "the-model", timeout, retries)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for _, _, _, body in self.seen]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SPIN_JUDGE_KEY", raising=False)
    servers = []

    def start(rule=lambda prompt: "[[1]]") -> Server:
        servers.append(Server(rule))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def answers_in(prompt: str) -> tuple[str, str]:
    """Return the two answers in a judge's prompt, in the order of the prompt."""
    first, second = (
        re.search(f"=== Answer {i} ===\n(.*?)\n=== End of answer {i} ===", prompt, re.S)[1] for i in (1, 2)
    )
    return first, second


def longer(prompt: str) -> str:
    first, second = map(len, map(str, answers_in(prompt)))
    return "Long is good. " + ("[[tie]]" if first == second else "[[1]]" if first > second else "[[2]]")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and SECRET not in text and len(text) < 700
    return text


def open_here(setting, model=None):
    return open_judge(str(setting), model, 5, torch.float32, torch.device("cpu"))


JSON = {"Content-Type": "application/json"}

# --- behind an address ------------------------------------------------------------------------------------------------


def test_request(serve, monkeypatch, capfd):
    server = serve(lambda prompt: f"You said {prompt} [[1]]")
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET + "\n")
    assert server.judge()(QUESTION) == "You said Which? [[1]]"
    [(method, path, headers, body)] = server.seen
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert body == {"model": "the-model", "messages": QUESTION, "temperature": 0, "max_tokens": 2048}
    assert headers["authorization"] == f"Bearer {SECRET}"
    assert sum(SECRET in value for value in [path, json.dumps(body), *headers.values()]) == 1
    assert SECRET not in repr(server.judge()) and capfd.readouterr() == ("", "")


def test_openai_key_is_not_sent(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = serve()
    assert server.judge()(QUESTION) == "[[1]]"
    assert not any(SECRET in value for value in server.seen[0][2].values())


@pytest.mark.parametrize("fault", [(429, {}, b"busy"), (503, {}, b"busy"), "hang", "reset"])
def test_retries(serve, fault):
    server = serve()
    server.faults = [fault]
    assert server.judge(timeout=0.5)(QUESTION) == "[[1]]"
    assert len(server.seen) == 2


def test_retries_end(serve):
    server = serve()
    server.faults = [(429, {}, b"slow down")] * 9
    with pytest.raises(UserError, match=r"HTTP 429.*slow down") as caught:
        server.judge(retries=1)(QUESTION)
    assert len(server.seen) == 2 and one_line(caught.value)
    server.faults = ["hang"]
    with pytest.raises(UserError, match=r"no answer in 0.2 s \(evaluation.judge_timeout\)"):
        server.judge(timeout=0.2, retries=0)(QUESTION)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/v1", "http://no-such-host.invalid/v1"])
def test_no_server(address):
    with pytest.raises(UserError, match="is the server up") as caught:
        ApiJudge(address, "m", 5, retries=0)(QUESTION)
    assert one_line(caught.value)


@pytest.mark.parametrize(
    ("reply", "headers"),
    [
        (b"<html>hello</html>", {"Content-Type": "text/html"}),
        (b"", JSON),
        (b"[]", JSON),
        (b"{", JSON),
        (b'{"choices": []}', JSON),
        (b'{"choices": [{"message": null}]}', JSON),
    ],
)
def test_reply_that_is_no_completion(serve, reply, headers):
    server = serve()
    server.faults = [(200, headers, reply)]
    with pytest.raises(UserError, match="no chat completion") as caught:
        server.judge()(QUESTION)
    assert one_line(caught.value) and len(server.seen) == 1


def test_reply_without_text(serve):
    server = serve()
    server.faults = [(200, JSON, {"choices": [{"message": {"content": None}}]})]
    assert server.judge()(QUESTION) == ""


@pytest.mark.parametrize("status", [401, 403, 400, 404, 500])
def test_error_without_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET)
    server = serve()
    server.faults = [(status, JSON, {"error": {"message": f"no model\nhere {SECRET}"}})] * 9
    with pytest.raises(
        UserError, match="set SPIN_JUDGE_KEY" if status in (401, 403) else "the-model.*no model"
    ) as caught:
        server.judge(retries=0)(QUESTION)
    assert one_line(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_refused_conversation(serve):
    """A status 400 after successful replies concerns one conversation, whose reply is then empty."""
    server = serve()
    judge = server.judge()
    judge(QUESTION)
    server.faults = [(400, JSON, {"error": {"message": "maximum context length"}})]
    assert judge(QUESTION) == "" and judge(QUESTION) == "[[1]]"


@pytest.mark.parametrize("status", [302, 307])
def test_redirect_without_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET)
    server, target = serve(), serve()
    server.faults = [(status, {"Location": f"{target.address}/chat/completions"}, b"")]
    with contextlib.suppress(UserError):
        server.judge(retries=0)(QUESTION)
    assert not any(SECRET in json.dumps(request) for request in target.seen)


@pytest.mark.parametrize("key", [f"{SECRET}\nX: 1", f"{SECRET}é", f"{SECRET}\x7f"])
def test_malformed_key(monkeypatch, key):
    monkeypatch.setenv("SPIN_JUDGE_KEY", key)
    with pytest.raises(UserError, match="SPIN_JUDGE_KEY contains characters") as caught:
        ApiJudge("http://host/v1", "m", 5)
    assert one_line(caught.value)


# --- a judge's identity -----------------------------------------------------------------------------------------------


def test_identity(tiny_folder, tmp_path):
    assert judges.identity("https://host/v1/", "m") == "https://host/v1 m"
    shutil.copytree(tiny_folder, tmp_path / "copy")
    assert judges.identity(str(tmp_path / "copy"), None) == judges.identity(str(tiny_folder), None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gpt-4", "must be an address"),
        ("/no/such", "must be an address"),
        ("ftp://host", "an address is http://host:port/v1"),
        ("http://", "an address is http://host:port/v1"),
        (f"http://user:{SECRET}@host/v1", "an address is http://host:port/v1"),
        (f"https://host/v1?key={SECRET}", "an address is http://host:port/v1"),
        ("http://host/v1", "judge_model must name"),
    ],
)
def test_no_judge(setting, message):
    for refuse in (open_here, lambda setting: judges.identity(setting, None)):
        with pytest.raises(UserError, match=message) as caught:
            refuse(setting)
        assert one_line(caught.value)


def test_missing_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai=="):
        judges.identity("http://host/v1", "m")


# --- local judges -----------------------------------------------------------------------------------------------------


def test_local_judge_is_greedy(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "MAX_TOKENS", 20)
    folder = shutil.copytree(tiny_folder, tmp_path / "judge")
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    reply = open_here(folder)(QUESTION)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model.generation_config = tf.GenerationConfig()
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 1, "pad_token_id": 1}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert reply == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) and reply


def test_conversation_too_long_for_local_judge(tiny_folder):
    judge = open_here(tiny_folder)
    assert judge([{"role": "user", "content": "x" * 2000}]) == ""
    judge([{"role": "user", "content": "x" * 990}])  # as much as fits


# --- comparisons ------------------------------------------------------------------------------------------------------

PROMPTS = [f"Question {i}?" for i in range(40)]
LONG = [f"a long answer to {i} that goes on" for i in range(40)]
SHORT = [f"short {i}" for i in range(40)]


def test_better_policy_wins(serve):
    server = serve(longer)
    mixed = [LONG[i] if i % 4 else "no" for i in range(40)]  # longer than SHORT in 30 of 40
    comparison = compare(PROMPTS, mixed, SHORT, server.judge(), 0)
    assert comparison["outcomes"] == ["win" if i % 4 else "loss" for i in range(40)]
    assert (comparison["n"], comparison["unparsed"], comparison["inconsistent"]) == (40, 0, 0)
    assert (comparison["wins"], comparison["ties"], comparison["losses"], comparison["win_rate"]) == (
        0.75,
        0,
        0.25,
        0.75,
    )
    assert comparison["p_value"] == pytest.approx(binomtest(30, 40).pvalue)
    low, high = comparison["win_rate_interval"]
    assert 0.55 < low < 0.7 < 0.8 < high < 0.95
    assert finding(comparison, "iter1", "sft").startswith("iter1 is preferred to sft: win rate 0.75 [0.")
    first_two = [answers_in(prompt) for prompt in server.prompts[:2]]
    assert first_two == [("no", "short 0"), ("short 0", "no")]  # both orders
    assert len(server.seen) == 80
    for prompt, question in zip(server.prompts, [q for q in PROMPTS for _ in range(2)], strict=True):
        assert f"\n{question}\n" in prompt
    for text in ("iter1", "sft", "policy", "opponent", "model"):
        assert not any(text in prompt.lower() for prompt in server.prompts), text
    swapped = compare(PROMPTS, SHORT, mixed, server.judge(), 0)
    assert finding(swapped, "sft", "iter1").startswith("iter1 is preferred to sft")


@pytest.mark.parametrize("place", ["1", "2"])
def test_position_bias_is_a_tie(serve, place):
    server = serve(lambda prompt: f"It is [[{place}]]")
    comparison = compare(PROMPTS, LONG, SHORT, server.judge(), 0)
    assert set(comparison["outcomes"]) == {"tie"} and comparison["inconsistent"] == 1 and comparison["p_value"] == 1
    assert finding(comparison, "a", "b").startswith("no difference seen") and comparison["win_rate_interval"] == [
        0.5,
        0.5,
    ]


def test_equal_answers_are_not_judged(serve):
    server = serve(longer)
    comparison = compare(PROMPTS, LONG, LONG, server.judge(), 0)
    assert server.seen == [] and comparison["ties"] == 1 and comparison["inconsistent"] is None
    assert finding(comparison, "a", "b").startswith("no difference seen between a and b")


def test_no_difference(serve):
    rng = np.random.default_rng(0)
    a, b = (["x" * int(length) for length in rng.integers(1, 50, 40)] for _ in range(2))
    comparison = compare(PROMPTS, a, b, serve(longer).judge(), 0)
    low, high = comparison["win_rate_interval"]
    assert (
        low < 0.5 < high
        and finding(comparison, "a", "b").startswith("no difference seen")
        and comparison["p_value"] > 0.05
    )


def test_unparsed_verdicts(serve):
    def rule(prompt):  # no verdict for one order of every third question
        i = int(re.search(r"Question (\d+)", prompt)[1])
        return "Hard to say." if i % 3 == 0 and answers_in(prompt)[0] == LONG[i] else longer(prompt)

    comparison = compare(PROMPTS, LONG, SHORT, serve(rule).judge(), 0)
    assert comparison["outcomes"] == ["unparsed" if i % 3 == 0 else "win" for i in range(40)]
    assert (comparison["n"], comparison["unparsed"], comparison["wins"], comparison["inconsistent"]) == (26, 14, 1, 0)
    failed = compare(PROMPTS, LONG, SHORT, serve(lambda prompt: "Hm.").judge(), 0)
    assert (failed["n"], failed["unparsed"], failed["win_rate"], failed["win_rate_interval"]) == (0, 40, None, None)
    assert finding(failed, "a", "b") == "no verdict between a and b: none of the 40 verdicts can be read."


def test_few_prompts(serve):
    comparison = compare(PROMPTS[:4], LONG[:4], SHORT[:4], serve(longer).judge(), 0)
    assert comparison["win_rate_interval"] == [1, 1] and comparison["p_value"] == 0.125
    assert finding(comparison, "a", "b").startswith("no difference seen")


def test_inconsistent_tie(serve):
    server = serve(lambda prompt: "[[tie]]" if answers_in(prompt)[0].startswith("short") else "[[1]]")
    comparison = compare(PROMPTS, LONG, SHORT, server.judge(), 0)
    assert comparison["ties"] == 1 and comparison["inconsistent"] == 1


def test_resume_after_failure(serve, tmp_path):
    server = serve(longer)
    expected = compare(PROMPTS, LONG, SHORT, server.judge(), 0)
    server.seen.clear()
    server.faults = [None] * 37 + [(404, {}, b"gone")]
    shards, progress = ResumableShards(tmp_path / "verdicts", print), []
    with pytest.raises(UserError):
        compare(PROMPTS, LONG, SHORT, server.judge(), 0, keep=shards, advance=progress.append)
    assert len(server.seen) == 38 and sum(progress) == 18
    comparison = compare(PROMPTS, LONG, SHORT, server.judge(), 0, keep=shards, advance=progress.append)
    assert comparison == expected and len(server.seen) == 38 + 80 - 32  # two shards of eight prompts are stored
    assert sum(progress) == 18 + 24


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("So [[1]]", "1"),
        ("[[ 2 ]].", "2"),
        ("[[TIE]]", "tie"),
        ("[[Answer 2]]", "2"),
        ("[[1]] I say: [[1]]", "1"),
        ("not [[1]] but [[2]]", "unparsed"),
        ("[1]", "unparsed"),
        ("[[3]]", "unparsed"),
        ("[[12]]", "unparsed"),
        ("answer 1", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_verdict(reply, verdict):
    assert judges._verdict(lambda messages: reply, "q", "a", "b") == verdict


def test_interval_coverage():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        points = rng.choice([0, 0.5, 1], size=60, p=[0.3, 0.2, 0.5])
        low, high = interval(points[bootstrap_draws(60, 300, trial)].mean(1))
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / 300 <= 0.98


# --- replies of a misbehaving server ----------------------------------------------------------------------------------


def completion(text) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


def reply_of(body: bytes, status="200 OK", headers=b"") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n".encode()
    return head + headers + b"\r\n" + body


def drip(connection, head: bytes, part: bytes):
    connection.sendall(head)
    while True:
        connection.sendall(part)
        time.sleep(0.05)


def flood(connection, head: bytes):
    connection.sendall(head)
    while True:
        connection.sendall(b"x" * 2**16)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
BOMB = gzip.compress(completion("[[1]]" + " " * 10**8))
MISBEHAVIOURS = {
    "body never ends": lambda c: drip(c, ENDLESS, b" "),
    "chunks never end": lambda c: drip(c, CHUNKED, b"1\r\n \r\n"),
    "headers never end": lambda c: drip(c, b"HTTP/1.1 200 OK\r\nA: ", b"x"),
    "lines of headers never end": lambda c: drip(c, b"HTTP/1.1 200 OK\r\n", b"A: x\r\n"),
    "interim replies never end": lambda c: drip(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "huge": lambda c: flood(c, ENDLESS),
    "huge headers": lambda c: flood(c, b"HTTP/1.1 200 OK\r\nA: "),
    "huge and of no length": lambda c: flood(c, b"HTTP/1.1 200 OK\r\n\r\n"),
    "huge error": lambda c: flood(c, ENDLESS.replace(b"200 OK", b"418 Teapot")),
    "compressed": lambda c: c.sendall(reply_of(BOMB, headers=b"Content-Encoding: gzip\r\n")),
    "silent": lambda c: time.sleep(2),
    "closed": lambda c: None,
    "no HTTP": lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "cut": lambda c: c.sendall(reply_of(completion("[[1]]"))[:-9]),
    "no JSON": lambda c: c.sendall(reply_of(b"<html>502</html>")),
    "no text": lambda c: c.sendall(reply_of(b"\xff\xfe\x00")),
    "deep": lambda c: c.sendall(reply_of(b"[" * 10**5)),
    "a number of many digits": lambda c: c.sendall(reply_of(b'{"choices": ' + b"9" * 10**5 + b"}")),
    "a string": lambda c: c.sendall(reply_of(b'"[[1]]"')),
    "text of the wrong type": lambda c: c.sendall(reply_of(completion({"a": 1}))),
    "text that is a list": lambda c: c.sendall(reply_of(completion([{"type": "text", "text": "[[1]]"}]))),
    "text that is a number": lambda c: c.sendall(reply_of(completion(7))),
    "server error": lambda c: c.sendall(reply_of(b"x", "500 Oh")),
    "redirect": lambda c: c.sendall(reply_of(b"", "302 Found", b"Location: /v1/chat/completions\r\n")),
    "redirect without a place": lambda c: c.sendall(reply_of(b"", "307 There")),
}


class RawServer:
    """A server that replies correctly, except that `misbehave` handles `bad` requests after the first."""

    def __init__(self, misbehave, bad):
        outer = self
        self.requests = 0

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                head, body, length = b"", b"", 0
                while b"\r\n\r\n" not in head or len(body) < length:  # unread bytes would reset the connection
                    head += self.request.recv(2**16)
                    body = head.partition(b"\r\n\r\n")[2]
                    length = int((re.search(rb"content-length: (\d+)", head.lower()) or [0, 0])[1])
                outer.requests += 1
                with contextlib.suppress(OSError):
                    if 1 < outer.requests <= 1 + bad:
                        misbehave(self.request)
                    else:
                        self.request.sendall(reply_of(completion("[[1]]"), headers=b"Connection: close\r\n"))

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def judge(self, retries):
        return ApiJudge(f"http://127.0.0.1:{self.server.server_address[1]}/v1", "m", 1, retries)


@pytest.fixture
def misbehaving(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(name, bad):
        servers.append(RawServer(MISBEHAVIOURS[name], bad))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_bad_reply_is_no_verdict(misbehaving, name):
    server = misbehaving(name, bad=1)
    judge = server.judge(retries=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert judge(QUESTION) == "[[1]]"
    started = time.monotonic()
    assert judge(QUESTION) == ""
    assert time.monotonic() - started < 20  # 2 s on an idle machine
    assert judge(QUESTION) == "[[1]]" and server.requests == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize("name", ["body never ends", "huge", "silent", "headers never end", "cut"])
def test_bad_reply_is_requested_again(misbehaving, name):
    server = misbehaving(name, bad=1)
    judge = server.judge(retries=2)
    assert [judge(QUESTION), judge(QUESTION)] == ["[[1]]", "[[1]]"] and server.requests == 3


@pytest.mark.parametrize("name", ["no JSON", "cut", "huge", "redirect"])
def test_only_bad_replies(misbehaving, name):
    server = misbehaving(name, bad=99)
    judge = server.judge(retries=0)
    assert judge(QUESTION) == "[[1]]"
    assert [judge(QUESTION) for _ in range(4)] == [""] * 4
    with pytest.raises(UserError, match=r"^evaluation\.judge=http://127") as caught:
        judge(QUESTION)
    assert one_line(caught.value)


def test_comparison_goes_on(misbehaving):
    server = misbehaving("huge", bad=2)
    comparison = compare(["a", "b", "c"], ["x"] * 3, ["y"] * 3, server.judge(retries=0), 0)
    assert (
        comparison["outcomes"] == ["unparsed", "unparsed", "tie"]
        and comparison["n"] == 1
        and comparison["unparsed"] == 2
    )


def test_texts_of_replies(serve, tmp_path):
    """A lone surrogate is replaced, so that a reply can be stored, and parsing takes no time quadratic in the length."""
    server = serve(lambda prompt: "\ud800[[1]]")
    assert server.judge()(QUESTION) == "?[[1]]"
    for text in ("[[" + "1" * 10**6, "[[" * 10**5, "[[1" + " " * 10**6, "[[answer" + " " * 10**6, "[" + "1." * 10**5):
        started = time.process_time()
        server = serve(lambda prompt, text=text: text)
        assert judges._verdict(server.judge(30), "a", "b", "c") == "unparsed"
        assert mt_bench.parse_rating(text) == mt_bench.UNRATED
        assert time.process_time() - started < 5
