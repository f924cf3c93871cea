"""Judges (chat models at an address or in a folder), and comparison of two policies by a judge."""

import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import torch
from scipy.stats import binomtest

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.data.messages import Message
from spin.data.templates import QUESTION, render_chat, token_ids
from spin.evaluation.measures import bootstrap_draws, interval
from spin.generation.answers import AnswerRequest
from spin.generation.sampling import generate_answers
from spin.models.load import load_model, load_tokenizer, stop_ids
from spin.models.policy import content_id
from spin.models.validate import check_folder
from spin.runtime.errors import UserError, brief, explaining
from spin.runtime.shards import Shard, ShardDriver, compute_shards

INSTALL = "pip install openai==3.57.0"
KEY = "SPIN_JUDGE_KEY"  # an environment variable, so that no configuration, log or shell history contains the key
MAX_TOKENS = 2048  # per judgment, as in FastChat
MAX_REPLY = 2**20  # bytes
BAD_REPLIES = 5
SHARD = 8  # judgments that are stored together: few, because each may cost money
PAIR = (Path(__file__).parent / "assets" / "pair.txt").read_text("utf-8")
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
SHARES = {"wins": 1.0, "ties": 0.5, "losses": 0.0}

# Maps a conversation to the judge's reply at temperature 0, or to "" if it cannot answer (if too long, for example).
Judge = Callable[[list[Message]], str]


def open_judge(setting: str, model: str | None, timeout: float, dtype: torch.dtype, device: torch.device) -> Judge:
    """Return the judge of `evaluation.judge`: `model` at an address, or a chat model in a folder. Raises UserError."""
    identity(setting, model)
    if "://" in setting:
        return ApiJudge(setting, str(model), timeout, is_checked=True)
    folder = Path(setting).expanduser()
    tokenizer = load_tokenizer(folder)
    render_chat(tokenizer, [QUESTION])  # forks the template's process while this process is small
    judge = load_model(folder, dtype, device)
    stops, greedy = stop_ids(folder, tokenizer), GenerationConfig.from_defaults(temperature=0.0, batch_size=1)
    context = getattr(judge.config, "max_position_embeddings", None) or 2**31

    def reply(messages: list[Message]) -> str:
        [ids] = token_ids(tokenizer, [render_chat(tokenizer, messages, add_generation_prompt=True)])
        budget = min(MAX_TOKENS, context - len(ids))
        example = Example("question", "", tuple(ids), "", ())
        if budget <= 0:
            return ""
        return generate_answers(judge, AnswerRequest(tokenizer, [example], greedy, budget, stops, seed=0))[0].text

    return reply


def identity(setting: str, model: str | None) -> str:
    """Return the judge's part of a cache key: address and model name, or a hash of its weights. Nothing is loaded.

    Raises UserError: neither an address (without a secret, which would be logged) nor a folder with a model.
    """
    if "://" not in setting:
        folder = Path(setting).expanduser()
        check_folder(folder, f"evaluation.judge={brief(setting)}: must be an address (http://host:port/v1) or a folder")
        return content_id(folder)
    parts = urlsplit(setting)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise UserError(f"evaluation.judge: an address is http://host:port/v1; a key goes into the variable {KEY}.")
    if not model:
        raise UserError(f"evaluation.judge={setting}: evaluation.judge_model must name the model to ask there.")
    with explaining(f"evaluation.judge={setting}: an address needs the openai client", INSTALL, ImportError):
        import openai  # noqa: F401
    return f"{setting.rstrip('/')} {model}"


def check_judge(setting: str, model: str | None, timeout: float) -> None:
    """Raise JudgeError unless the judge at an address answers a short question. A judge in a folder is not checked."""
    if "://" in setting:
        ApiJudge(setting, str(model), timeout, retries=2)([{"role": "user", "content": "Say yes."}])


class JudgeError(UserError):
    """The judge at an address gives no verdicts, or has stopped giving them."""


class ApiJudge:
    """`model` at an OpenAI-compatible address. The openai client retries with increasing delays.

    An unusable reply is returned as "". JudgeError is raised after `BAD_REPLIES` in a row, or if another request is
    pointless. Unless the server `is_checked`, its first reply must be usable.
    """

    def __init__(self, address: str, model: str, timeout: float, retries: int = 5, is_checked: bool = False):
        from openai import OpenAI

        self.address, self.model, self.timeout = address, model, timeout
        self.key = os.environ.get(KEY, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):  # the client's own error would show the key
            raise UserError(f"{KEY} contains characters that a key cannot have: set it again.")
        # Connections are not reused: the server may close them at any time, and the next request would fail.
        limits, headers = httpx2.Limits(max_keepalive_connections=0), {"Accept-Encoding": "identity"}
        client = BoundedClient(timeout=timeout, headers=headers, limits=limits)
        self.client: Any = OpenAI(
            base_url=address, api_key=self.key or "none", max_retries=retries, timeout=timeout, http_client=client
        )
        self.bad_replies = 0 if is_checked else BAD_REPLIES  # in a row

    def __call__(self, messages: list[Message]) -> str:
        import openai

        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=MAX_TOKENS
            )
            text = (reply.choices[0].message.content or "").encode(errors="replace").decode()
        except (openai.OpenAIError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            failure = error  # handled below, so that no traceback shows the server's words, which may contain the key
        else:
            self.bad_replies = 0
            return text
        return self._no_verdict(failure)

    def _no_verdict(self, error: Exception) -> str:
        """Return "" for an unusable reply, or raise JudgeError."""
        import openai

        status, cause = getattr(error, "status_code", 0), error.__cause__
        if status in (400, 413, 422) and self.bad_replies < BAD_REPLIES:
            return ""  # only this conversation is affected: too long, or filtered
        self.bad_replies += 1
        is_final = 400 <= status < 500 or isinstance(cause, httpx2.ConnectError)
        if not is_final and self.bad_replies < BAD_REPLIES:
            return ""
        fault = "the reply is no chat completion; an OpenAI-compatible server has /v1 at the end of its address"
        if status in (401, 403):  # without the server's message, which may contain the key
            fault = f"HTTP {status}, the server refuses the key; set {KEY} to one that it knows"
        elif isinstance(error, openai.APIStatusError):
            fault = f"HTTP {status}, asked for {self.model} ({brief(error.response.text or error.message)})"
        elif isinstance(error, openai.APITimeoutError):
            fault = f"no answer in {self.timeout:g} s (evaluation.judge_timeout); is the server up?"
        elif isinstance(error, openai.APIConnectionError):
            fault = f"{brief(cause or error)}; is the server up?"
        if self.key:
            fault = fault.replace(self.key, "…")
        raise JudgeError(f"evaluation.judge={self.address}: {fault}")


class BoundedClient(httpx2.Client):
    """An HTTP client whose timeout applies to the whole reply (in httpx2, to each part), of at most `MAX_REPLY`
    bytes, which are not decompressed. It follows no redirects, which would send the answers elsewhere."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        body = b""
        previous = signal.signal(signal.SIGALRM, _end_wait)  # possible because judges are called in the main thread
        signal.setitimer(signal.ITIMER_REAL, self.timeout.read or 0)
        try:
            with closing(super().send(request, **options | {"stream": True})) as response:
                for part in response.iter_raw(2**16):
                    body += part
                    if len(body) > MAX_REPLY:
                        raise httpx2.ReadError(f"a reply of more than {MAX_REPLY >> 10} KiB")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        headers = {name: value for name, value in response.headers.items() if not name.endswith("-encoding")}
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)


def _end_wait(*_: object) -> None:
    raise httpx2.ReadTimeout("the reply does not end")


def compare(
    prompts: Sequence[str],
    answers: Sequence[str],
    opponents: Sequence[str],
    judge: Judge,
    seed: int,
    resamples: int = 1000,
    advance: Callable[[int], None] = lambda prompts: None,
    keep: ShardDriver = compute_shards,
) -> dict[str, Any]:
    """Return a judge's blind preference between the answers of a policy and its opponent to the same prompts.

    Each pair is judged in both orders. A win needs the same verdict in both orders, all else is a tie, so that position
    bias has no effect (Zheng et al. 2023, arXiv 2306.05685, section 3.4). Equal answers are ties and not judged.

    The result has `outcomes` ("win", "tie", "loss", or "unparsed", which is excluded from the rest), the number `n` of
    parsed outcomes and their shares `wins`, `ties`, `losses`, `win_rate` (a tie is half a win) with its 95 % bootstrap
    interval over prompts, `p_value` of the exact sign test, and `inconsistent`, the share of judged prompts whose
    verdict depends on the order. A share is None if there is nothing to count.
    """

    def judged(i: int) -> dict:
        first = second = "tie"
        if answers[i] != opponents[i]:
            verdict = _verdict(judge, prompts[i], answers[i], opponents[i])
            first = {"1": "win", "2": "loss"}.get(verdict, verdict)
            verdict = _verdict(judge, prompts[i], opponents[i], answers[i])
            second = {"1": "loss", "2": "win"}.get(verdict, verdict)
        outcome = "unparsed" if "unparsed" in (first, second) else first if first == second else "tie"
        return {"outcome": outcome, "is_consistent": first == second, "is_judged": answers[i] != opponents[i]}

    rows = in_shards(judged, {str(i): i for i in range(len(prompts))}, keep, advance)
    outcomes = [row["outcome"] for row in rows]
    points = np.array([POINTS[outcome] for outcome in outcomes if outcome in POINTS])
    consistent = [row["is_consistent"] for row in rows if row["is_judged"] and row["outcome"] in POINTS]
    n, wins, decided = len(points), outcomes.count("win"), int((points != 0.5).sum())
    return {
        "outcomes": outcomes,
        "n": n,
        "unparsed": len(outcomes) - n,
        **{name: float((points == value).mean()) if n else None for name, value in SHARES.items()},
        "win_rate": float(points.mean()) if n else None,
        "win_rate_interval": interval(points[bootstrap_draws(n, resamples, seed)].mean(1)) if n else None,
        "p_value": float(binomtest(wins, decided).pvalue) if decided else 1.0,
        "inconsistent": 1 - sum(consistent) / len(consistent) if consistent else None,
    }


def _verdict(judge: Judge, prompt: str, first: str, second: str) -> str:
    """Return the better answer, "1", "2" or "tie"; "unparsed" if the judge names none or several."""
    reply = judge([{"role": "user", "content": PAIR.format(prompt=prompt, first=first, second=second)}])
    verdicts = {text.lower() for text in re.findall(r"\[\[\s*(?:answer\s*)?(1|2|tie)\s*\]\]", reply, re.I)}
    return verdicts.pop() if len(verdicts) == 1 else "unparsed"


def finding(comparison: dict[str, Any], policy: str, opponent: str) -> str:
    """Return a comparison as a sentence. A preference must be significant by the interval and the sign test (5 %)."""
    if comparison["win_rate"] is None:
        return f"no verdict between {policy} and {opponent}: none of the {comparison['unparsed']} verdicts can be read."
    rate, (low, high), p_value = (comparison[key] for key in ("win_rate", "win_rate_interval", "p_value"))
    numbers = f"win rate {rate:.2f} [{low:.2f}, {high:.2f}] over {comparison['n']} prompts, p = {p_value:.2g}."
    if low <= 0.5 <= high or p_value > 0.05:
        return f"no difference seen between {policy} and {opponent}: {numbers}"
    better, worse = (policy, opponent) if rate > 0.5 else (opponent, policy)
    return f"{better} is preferred to {worse}: {numbers}"


def in_shards(
    make: Callable[[Any], dict], tasks: Mapping[str, Any], keep: ShardDriver, advance: Callable[[int], None]
) -> list[dict]:
    """Return `make(task)` for all tasks, computed through `keep` in shards of `SHARD`, which a resumed run reuses."""

    def rows_of(ids: Sequence[str]) -> list[dict]:
        rows = []
        for id in ids:
            rows.append(make(tasks[id]))
            advance(1)
        return rows

    parts = [list(tasks)[start : start + SHARD] for start in range(0, len(tasks), SHARD)]
    return [row for rows in keep([Shard(ids, partial(rows_of, ids)) for ids in parts]) for row in rows]
