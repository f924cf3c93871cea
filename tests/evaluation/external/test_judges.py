"""Judges behind a real server, in a folder and as a reward model; and what comes out when two policies are compared."""

import json
import math
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import binomtest

from spin.evaluation.external import judges
from spin.evaluation.external.judges import (
    ApiJudge,
    LocalJudge,
    RewardModel,
    compare,
    open_judge,
    parse_verdict,
    sign_test,
)
from spin.models import tiny
from spin.models.load import load_model, load_tokenizer
from spin.runtime.errors import UserError
from spin.runtime.shards import ResumableShards

SECRET = "sk-very-secret-0123456789"
QUESTION = [{"role": "user", "content": "Which?"}]


class Server:
    """An OpenAI-compatible server on this machine. `rule(prompt)` is what it says; `faults` come before, one a request."""

    def __init__(self, rule=lambda prompt: "[[1]]"):
        self.rule, self.faults, self.seen, self.times = rule, [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # what a followed redirect would send
                outer.seen.append(("GET", self.path, dict(self.headers), {}))
                self.send_error(404)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(("POST", self.path, dict(self.headers), body))
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

    def judge(self, **options) -> ApiJudge:
        return ApiJudge(self.address, "the-model", **{"timeout": 5, "retries": 3, "backoff": 0.01, **options})

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
    for one in servers:
        one.server.shutdown()
        one.server.server_close()


def shown(prompt: str) -> tuple[str, str]:
    """The two answers in a judge's prompt, in its order."""
    first, second = (
        re.search(f"=== Answer {i} ===\n(.*?)\n=== End of answer {i} ===", prompt, re.S)[1] for i in (1, 2)
    )
    return first, second


def longer(prompt: str) -> str:
    first, second = map(len, map(str, shown(prompt)))
    return "Long is good. " + ("[[tie]]" if first == second else "[[1]]" if first > second else "[[2]]")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and SECRET not in text and len(text) < 700
    return text


# --- behind an address ------------------------------------------------------------------------------------------------


def test_a_question_is_put_as_the_protocol_has_it_and_the_key_goes_into_the_header_only(serve, monkeypatch, capfd):
    server = serve(lambda prompt: f"You said {prompt} [[1]]")
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET + "\n")
    assert server.judge().ask(QUESTION, 77) == "You said Which? [[1]]"
    [(method, path, headers, body)] = server.seen
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert body == {"model": "the-model", "messages": QUESTION, "temperature": 0, "max_tokens": 77}
    assert headers["Authorization"] == f"Bearer {SECRET}" and headers["Content-Type"] == "application/json"
    assert sum(SECRET in value for value in [path, json.dumps(body), *headers.values()]) == 1
    assert SECRET not in repr(server.judge()) and capfd.readouterr() == ("", "")


def test_without_a_key_none_is_sent(serve):
    server = serve()
    assert server.judge().ask(QUESTION, 5) == "[[1]]"
    assert "Authorization" not in server.seen[0][2]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_later_and_later(serve, status):
    server = serve()
    server.faults = [(status, {}, b"busy")] * 2
    assert server.judge(backoff=0.1).ask(QUESTION, 5) == "[[1]]"
    first, second, third = server.times
    assert second - first >= 0.1 and 2 > third - second >= 0.2


def test_a_server_that_says_how_long_to_wait_is_left_alone_that_long(serve):
    server = serve()
    server.faults = [(429, {"Retry-After": "0.4"}, b""), (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"")]
    assert server.judge().ask(QUESTION, 5) == "[[1]]"
    assert server.times[1] - server.times[0] >= 0.4 and server.times[2] - server.times[1] < 0.3


def test_tries_come_to_an_end(serve):
    server = serve()
    server.faults = [(429, {}, b"slow down")] * 9
    with pytest.raises(UserError, match=r"HTTP 429.*slow down.*\(4 tries\)") as caught:
        server.judge().ask(QUESTION, 5)
    assert len(server.seen) == 4 and one_line(caught.value)


def test_a_server_that_hangs_is_given_up_after_the_timeout_and_asked_again(serve):
    server = serve()
    server.faults = ["hang"]
    started = time.monotonic()
    assert server.judge(timeout=0.2).ask(QUESTION, 5) == "[[1]]"
    assert 0.2 <= time.monotonic() - started < 1.2
    server.faults = ["hang", "hang"]
    with pytest.raises(UserError, match=r"no answer in 0.2 s \(evaluation.judge_timeout\).*2 tries"):
        server.judge(timeout=0.2, retries=1).ask(QUESTION, 5)


def test_a_connection_that_breaks_in_the_middle_is_made_again_and_a_wrong_address_is_told_at_once(serve):
    server = serve()
    judge = server.judge()
    judge.ask(QUESTION, 5)
    server.faults = ["reset", "reset"]
    assert judge.ask(QUESTION, 5) == "[[1]]"
    for address in ("http://127.0.0.1:1/v1", "http://no-such-host.invalid/v1", f"http://{'a' * 70}.invalid"):
        started = time.monotonic()
        with pytest.raises(UserError, match="is the server up"):
            ApiJudge(address, "m", retries=9, backoff=9).ask(QUESTION, 5)
        assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    "reply",
    [
        b"<html>hello</html>",
        b"",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"choices": [{"message": ' + SECRET.encode() + b" " * 300,
    ],
)
def test_a_reply_that_is_no_completion_is_one_line_and_not_asked_for_again(serve, monkeypatch, reply):
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET)
    server = serve()
    server.faults = [(200, {}, reply)]
    with pytest.raises(UserError, match="no chat completion") as caught:
        server.judge().ask(QUESTION, 5)
    assert one_line(caught.value) and len(server.seen) == 1


def test_a_reply_without_a_text_is_an_empty_one(serve):
    server = serve()
    server.faults = [(200, {}, {"choices": [{"message": {"content": None}}]})]
    assert server.judge().ask(QUESTION, 5) == ""


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_told_without_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET)
    server = serve()
    server.faults = [(status, {}, {"error": {"message": f"wrong key {SECRET[:12]}"}})]
    with pytest.raises(UserError, match="set SPIN_JUDGE_KEY") as caught:
        server.judge().ask(QUESTION, 5)
    assert SECRET[:12] not in one_line(caught.value) and len(server.seen) == 1


@pytest.mark.parametrize("status", [400, 404, 500])
def test_what_the_server_says_is_shown_but_for_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET)
    server = serve()
    server.faults = [(status, {}, {"error": {"message": f"no model\nhere {SECRET}"}})] * 9
    with pytest.raises(UserError, match=r"the-model.*no model") as caught:
        server.judge().ask(QUESTION, 5)
    assert one_line(caught.value)


def test_a_question_that_is_refused_after_others_were_answered_has_no_verdict(serve):
    server = serve()
    judge = server.judge()
    judge.ask(QUESTION, 5)
    server.faults = [(400, {}, {"error": {"message": "maximum context length"}})]
    assert judge.ask(QUESTION, 5) == "" and judge.ask(QUESTION, 5) == "[[1]]"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_with_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("SPIN_JUDGE_KEY", SECRET)
    server, other = serve(), serve()
    server.faults = [(status, {"Location": f"{other.address}/chat/completions"}, b"")]
    with pytest.raises(UserError, match="has moved") as caught:
        server.judge().ask(QUESTION, 5)
    assert one_line(caught.value) and other.seen == []


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{SECRET}@host/v1",
        f"https://host/v1?key={SECRET}",
        "http://",
        "https:host",
        "http://host:port/v1",
        "http://host:99999",
        "http://[::1/v1",
        "http://host/a b",
        "http://host/\n",
        "http://host/é",
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_unseen(address):
    for refuse in (lambda: open_judge(address, "m"), lambda: judges.identity(address, "m")):
        with pytest.raises(UserError, match="http://host:port/v1") as caught:
            refuse()
        assert one_line(caught.value)


@pytest.mark.parametrize("key", [f"{SECRET}\nX: 1", f"{SECRET}é", f"{SECRET}\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("SPIN_JUDGE_KEY", key)
    with pytest.raises(UserError, match="SPIN_JUDGE_KEY holds characters") as caught:
        ApiJudge("http://host/v1", "m")
    assert one_line(caught.value)


# --- which judge it is ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "model"
    make_reward(folder)
    return folder


def make_reward(folder, labels=1):
    tok = tiny.tokenizer()
    config = tf.LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tok.pad_token_id,
        num_labels=labels,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tf.LlamaForSequenceClassification(config).save_pretrained(folder)
    tok.save_pretrained(folder)


def test_the_setting_says_which_judge_it_is(serve, tiny_folder, reward_folder, tmp_path):
    assert isinstance(open_judge(serve().address, "m"), ApiJudge)
    assert isinstance(open_judge("HTTPS://host:8000/v1/", "m"), ApiJudge)
    assert isinstance(open_judge(str(tiny_folder)), LocalJudge)
    assert isinstance(open_judge(str(reward_folder)), RewardModel)
    assert judges.identity("https://host/v1/", "m") == "https://host/v1 m"
    shutil.copytree(reward_folder, tmp_path / "copy")
    assert judges.identity(str(tmp_path / "copy")) == judges.identity(str(reward_folder))
    assert judges.identity(str(tiny_folder)) != judges.identity(str(reward_folder))


@pytest.mark.parametrize("setting", ["gpt-4", "", "/no/such", "a\0b", "x" * 5000, "~nobody-here/x", "ftp://host"])
def test_what_is_no_judge_is_one_line(setting):
    for refuse in (open_judge, judges.identity):
        with pytest.raises(UserError, match=r"address .* or the folder of a model") as caught:
            refuse(setting)
        assert one_line(caught.value)
    with pytest.raises(UserError, match="judge_model must name"):
        open_judge("http://host/v1")


def spoil(change):
    def spoiled(folder):
        settings = json.loads((folder / "config.json").read_text())
        change(settings)
        (folder / "config.json").write_text(json.dumps(settings))

    return spoiled


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def pickled(folder):
    weights = tf.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (without_template, "no chat template"),
        (pickled, "neither model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "broken"),
        (spoil(lambda s: s.update(id2label={"0": "a", "1": "b"})), "classifier with 2 labels"),
        (spoil(lambda s: s.update(attn_implementation="org/kernel")), "code from the hub"),
        (spoil(lambda s: s.update(model_type="own", auto_map={"AutoConfig": "own.Own"})), "code of its own"),
        (spoil(lambda s: s.update(num_hidden_layers=3)), "no finished reward model"),
        (spoil(lambda s: s.update(intermediate_size=40)), "no finished reward model"),
    ],
)
def test_a_broken_reward_model_is_one_line_and_its_code_is_not_run(reward_folder, tmp_path, break_it, says):
    folder = tmp_path / "model"
    shutil.copytree(reward_folder, folder)
    (folder / "own.py").write_text("raise SystemExit('run')")
    break_it(folder)
    with pytest.raises(UserError, match=says) as caught:
        open_judge(str(folder))
    assert one_line(caught.value)


def test_a_language_model_is_no_reward_model_by_name_alone(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    spoil(lambda s: s.update(architectures=["LlamaForSequenceClassification"], id2label={"0": "score"}))(folder)
    with pytest.raises(UserError, match=r"score.weight.*no finished reward model"):
        open_judge(str(folder))


# --- local judges -----------------------------------------------------------------------------------------------------


def test_a_local_judge_is_greedy_whatever_its_own_settings_say(tiny_folder, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(tiny_folder, folder)
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    reply = LocalJudge(folder).ask(QUESTION, 20)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model.generation_config = tf.GenerationConfig.from_defaults()
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 1, "pad_token_id": 1}
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert reply == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True) and reply
    assert LocalJudge(folder).ask(QUESTION, 20) == reply


def test_a_question_too_long_for_a_local_judge_gets_no_verdict(tiny_folder):
    judge = LocalJudge(tiny_folder)
    assert judge.ask([{"role": "user", "content": "x" * 2000}], 20) == ""
    judge.ask([{"role": "user", "content": "x" * 990}], 200)  # as much as there is room for


def test_a_template_that_refuses_is_one_line_about_the_judge(tiny_folder, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no\\nway') }}")
    with pytest.raises(UserError, match=r"^evaluation\.judge=.*no way") as caught:
        LocalJudge(folder).ask(QUESTION, 5)
    assert one_line(caught.value)


def test_a_reward_is_the_models_own_output(reward_folder):
    judge = RewardModel(reward_folder)
    tokenizer = load_tokenizer(reward_folder)
    model = tf.LlamaForSequenceClassification.from_pretrained(reward_folder).eval()
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, *QUESTION]
    for messages, answer in ((QUESTION, "This."), (QUESTION, "That one, said she."), (history, "")):
        whole = [*messages, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(whole, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert judge.score(messages, answer) == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert math.isnan(judge.score(QUESTION, "x" * 600))


def test_a_score_that_is_no_number_is_one_line(reward_folder):
    judge = RewardModel(reward_folder)
    judge.model.score.weight.fill_(math.inf)
    with pytest.raises(UserError, match="not finite"):
        judge.score(QUESTION, "a")


# --- comparisons ------------------------------------------------------------------------------------------------------

PROMPTS = [f"Question {i}?" for i in range(40)]
LONG = [f"a long answer to {i} that goes on" for i in range(40)]
SHORT = [f"short {i}" for i in range(40)]


def test_the_better_policy_wins_in_either_place_and_nothing_names_it(serve):
    server = serve(longer)
    mixed = [LONG[i] if i % 4 else "no" for i in range(40)]  # longer than SHORT in 30 of 40
    found = compare(PROMPTS, mixed, SHORT, server.judge(), 0, names=("iter1", "sft"))
    assert found.outcomes == ["win" if i % 4 else "loss" for i in range(40)]
    assert (found.n, found.unparsed, found.decided, found.inconsistent) == (40, 0, 40, 0)
    assert (found.wins, found.ties, found.losses, found.win_rate) == (0.75, 0, 0.25, 0.75)
    low, high = found.win_rate_interval
    assert 0.55 < low < 0.7 < 0.8 < high < 0.95
    assert found.finding.startswith("iter1 is preferred to sft: win rate 0.75 [0.")
    assert compare(PROMPTS, SHORT, mixed, server.judge(), 0, names=("sft", "iter1")).finding.startswith("iter1 is pref")
    assert found == compare(PROMPTS, mixed, SHORT, server.judge(), 0, names=("iter1", "sft"))

    first_two = [shown(prompt) for prompt in server.prompts[:2]]
    assert first_two == [("no", "short 0"), ("short 0", "no")]  # both orders
    assert len(server.seen) == 240
    for prompt, question in zip(server.prompts, [q for q in PROMPTS for _ in range(2)], strict=False):
        assert f"\n{question}\n" in prompt
    for text in ("iter1", "sft", "policy", "opponent", "model"):
        assert not any(text in prompt.lower() for prompt in server.prompts), text


@pytest.mark.parametrize("place", ["1", "2"])
def test_a_judge_that_likes_a_place_prefers_nobody(serve, place):
    server = serve(lambda prompt: f"It is [[{place}]]")
    found = compare(PROMPTS, LONG, SHORT, server.judge(), 0)
    assert set(found.outcomes) == {"tie"} and found.inconsistent == 1 and found.p_value == 1 and found.decided == 0
    assert found.finding.startswith("no difference seen") and found.win_rate_interval == [0.5, 0.5]


def test_a_policy_beside_itself_is_not_asked_about(serve):
    server = serve(longer)
    found = compare(PROMPTS, LONG, LONG, server.judge(), 0)
    assert server.seen == [] and found.ties == 1 and found.inconsistent is None
    assert found.finding.startswith("no difference seen between a and b")


def test_two_samples_of_one_policy_show_no_difference(serve):
    rng = np.random.default_rng(0)
    a, b = (["x" * int(length) for length in rng.integers(1, 50, 40)] for _ in range(2))
    found = compare(PROMPTS, a, b, serve(longer).judge(), 0)
    low, high = found.win_rate_interval
    assert low < 0.5 < high and found.finding.startswith("no difference seen") and found.p_value > 0.05


def test_verdicts_that_cannot_be_read_are_counted_and_left_out(serve):
    def rule(prompt):  # one order of every third question has none
        i = int(re.search(r"Question (\d+)", prompt)[1])
        return "Hard to say." if i % 3 == 0 and shown(prompt)[0] == LONG[i] else longer(prompt)

    found = compare(PROMPTS, LONG, SHORT, serve(rule).judge(), 0)
    assert found.outcomes == ["unparsed" if i % 3 == 0 else "win" for i in range(40)]
    assert (found.n, found.unparsed, found.wins, found.inconsistent) == (26, 14, 1, 0)
    none = compare(PROMPTS, LONG, SHORT, serve(lambda prompt: "Hm.").judge(), 0)
    assert (none.n, none.unparsed, none.win_rate, none.win_rate_interval) == (0, 40, None, None)
    assert none.finding == "no verdict between a and b: none of 40 prompts has one that can be read."


def test_a_win_on_a_few_prompts_is_no_finding(serve):
    found = compare(PROMPTS[:4], LONG[:4], SHORT[:4], serve(longer).judge(), 0)
    assert found.win_rate_interval == [1, 1] and found.p_value == 0.125
    assert found.finding.startswith("no difference seen")


def test_a_tie_in_one_order_only_is_a_tie_and_inconsistent(serve):
    server = serve(lambda prompt: "[[tie]]" if shown(prompt)[0].startswith("short") else "[[1]]")
    found = compare(PROMPTS, LONG, SHORT, server.judge(), 0)
    assert found.ties == 1 and found.inconsistent == 1


def test_a_reward_models_higher_score_wins_and_conversations_are_scored_whole(reward_folder):
    judge = RewardModel(reward_folder)
    prompts = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, *QUESTION], *PROMPTS[:6]]
    a, b = LONG[:7], [SHORT[0], LONG[1], *SHORT[2:6], "x" * 600]
    found = compare(prompts, a, b, judge, 0)
    for i in range(6):
        messages = prompts[i] if isinstance(prompts[i], list) else [{"role": "user", "content": prompts[i]}]
        gap = judge.score(messages, a[i]) - judge.score(messages, b[i])
        assert found.outcomes[i] == ("tie" if gap == 0 else "win" if gap > 0 else "loss")
    assert found.outcomes[1] == "tie" and found.outcomes[6] == "unparsed" and found.inconsistent == 0
    back = compare(prompts, b, a, judge, 0)
    assert "win" in [*found.outcomes, *back.outcomes]
    assert back.outcomes == [{"win": "loss", "loss": "win"}.get(outcome, outcome) for outcome in found.outcomes]


def test_a_local_judge_that_says_nothing_of_use_gives_no_verdict(tiny_folder, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(tiny_folder, folder)
    spoil(lambda settings: settings.update(max_position_embeddings=4096))(folder)
    found = compare(PROMPTS[:3], LONG[:3], SHORT[:3], LocalJudge(folder), 0, max_new_tokens=8)
    assert found.unparsed == 3 and found.finding.startswith("no verdict")


def test_a_comparison_that_is_stopped_asks_nobody_twice(serve, tmp_path):
    server = serve(longer)
    whole = compare(PROMPTS, LONG, SHORT, server.judge(), 0)
    server.seen.clear()
    server.faults = [None] * 37 + [(404, {}, b"gone")]
    kept, done = ResumableShards(tmp_path / "verdicts", print), []
    with pytest.raises(UserError):
        compare(PROMPTS, LONG, SHORT, server.judge(), 0, keep=kept, advance=done.append)
    assert len(server.seen) == 38 and sum(done) == 18
    found = compare(PROMPTS, LONG, SHORT, server.judge(), 0, keep=kept, advance=done.append)
    assert found == whole and len(server.seen) == 38 + 80 - 32  # two shards of eight prompts were kept
    assert sum(done) == 18 + 24


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
def test_a_verdict_is_read_and_never_guessed(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (3, 9), (9, 3), (10, 0), (60, 41), (900, 1100)])
def test_the_sign_test_is_scipys(wins, losses):
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        points = rng.choice([0, 0.5, 1], size=60, p=[0.3, 0.2, 0.5])
        low, high = judges.interval(lambda i, points=points: points[i].mean(), 60, 300, trial)
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / 300 <= 0.98
