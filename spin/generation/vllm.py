"""Answers by vLLM, which decodes many prompts at once on GPUs. Optional, and not imported here.

vLLM pins versions of torch and transformers other than ours, so it runs in processes of its own (`vllm_worker.py`), with
the Python of another environment where `generation.python` names one. When they end, so does all that they held of the
GPUs. Weights reach them as the policy's folder in the store. Its sampled log-probs differ from a forward's: scores are
still computed by ours.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.generation.answers import Answer, answer_of
from spin.models import adapters
from spin.models.policy import Policy
from spin.runtime.errors import UserError, brief
from spin.runtime.random import seed_of
from spin.runtime.shards import Shard, ShardDriver, compute_shards
from spin.runtime.signals import raise_if_stopped as stop_where_asked

VERSION = "0.33.0"  # whose interface this is written for
INSTALL = f"python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm=={VERSION}"
# What torchrun tells the processes of a game: vLLM's, which are others, would look for each other in the wrong place.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
WORKER = Path(__file__).with_name("vllm_worker.py")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the largest of an adapter


def check_vllm(config: GenerationConfig, quantization: str | None, rank: int) -> None:
    """Raise UserError if vLLM can't be used here: before any long work, and without loading it."""
    python = config.python or sys.executable
    look = "import importlib.metadata as m; print(m.version('vllm'))"
    try:
        done = subprocess.run([python, "-P", "-c", look], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"generation.python={python}: can't be run ({brief(error)}).") from error
    if done.returncode:
        raise UserError(
            f"generation.engine=vllm: vLLM is not installed for {python}: {INSTALL}, then set "
            "generation.python=.venv-vllm/bin/python"
        )
    if (found := done.stdout.strip()) != VERSION:
        raise UserError(f"generation.engine=vllm: {python} has vLLM {brief(found)}, which may differ: {INSTALL}")
    if quantization:
        raise UserError(
            f"generation.engine=vllm: goes with model.quantization=none: it would round to {quantization} in its own way, "
            "and the opponent would not be the one that is scored."
        )
    if rank > RANKS[-1]:
        raise UserError(f"generation.engine=vllm: takes adapters up to rank {RANKS[-1]}, not {rank}.")
    devices, needed = torch.cuda.device_count(), config.tensor_parallel * config.data_parallel
    if devices < needed:
        raise UserError(
            f"generation.tensor_parallel={config.tensor_parallel} times generation.data_parallel={config.data_parallel} "
            f"needs {needed} GPUs, but {devices} are here."
        )


def generate_with_vllm(
    policy: Policy,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: GenerationConfig,
    max_new_tokens: int,
    stop_ids: Collection[int],
    seed: int,
    advance: Callable[[int], None] = lambda answers: None,
    keep: ShardDriver = compute_shards,
    shard_size: int = 256,
) -> list[Answer]:
    """As `opponent.generate`, by vLLM: one answer for every example, in their order.

    Its engines are started when the first shard that is not kept is wanted, and end with the last. Raises UserError if
    one of them ends before.
    """
    answers: dict[str, Answer] = {}
    longest = max(len(example.prompt_ids) for example in examples) + max_new_tokens
    with _engines(llm_arguments(policy, dtype, config, longest), lora_arguments(policy), config) as ask:

        def answer(chosen: Sequence[Example]) -> list[dict]:
            prompts = [list(example.prompt_ids) for example in chosen]
            sampling = [sampling_arguments(example, config, max_new_tokens, stop_ids, seed) for example in chosen]
            rows = []
            for example, output in zip(chosen, ask(prompts, sampling), strict=True):
                ids, reason = read_output(output, stop_ids)
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                rows.append(asdict(Answer(id=example.id, ids=tuple(ids), finish_reason=reason, text=text)))
            advance(len(chosen))
            return rows

        shards = [examples[start : start + shard_size] for start in range(0, len(examples), shard_size)]
        for rows in keep([Shard([example.id for example in chosen], partial(answer, chosen)) for chosen in shards]):
            answers |= {row["id"]: answer_of(row) for row in rows}
    return [answers[example.id] for example in examples]


def llm_arguments(policy: Policy, dtype: torch.dtype, config: GenerationConfig, longest: int) -> dict[str, Any]:
    """What `vllm.LLM` is made with."""
    arguments = {
        "model": str(policy.base_or_self.folder.resolve()),
        "skip_tokenizer_init": True,  # ids in, ids out: it knows no end token but those that it is told
        "generation_config": "vllm",  # none: a model's own sampling settings are not consulted
        "trust_remote_code": False,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": longest,
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.gpu_memory,
        "seed": 0,  # every request has its own
    }
    if policy.base:
        rank = next(rank for rank in RANKS if rank >= adapters.largest_rank(policy.folder))
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    return arguments


def lora_arguments(policy: Policy) -> dict[str, Any] | None:
    """What `vllm.lora.request.LoRARequest` is made with, where the policy is an adapter."""
    if policy.base is None:
        return None
    return {"lora_name": policy.id[:16], "lora_int_id": 1, "lora_path": str(policy.folder.resolve())}


def sampling_arguments(
    example: Example, config: GenerationConfig, max_new_tokens: int, stop_ids: Collection[int], seed: int
) -> dict[str, Any]:
    """What `vllm.SamplingParams` is made with for one prompt: random numbers of its own, whatever is decoded beside it."""
    return {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": max_new_tokens,
        "seed": seed_of(seed, example.id),
        "stop_token_ids": sorted(stop_ids),
        "detokenize": False,
    }


def read_output(output: dict[str, Any], stop_ids: Collection[int]) -> tuple[list[int], str]:
    """The ids and the finish reason of what a worker answers, which must agree: an answer that stopped ends with a stop
    token. Raises UserError if not."""
    ids, reason = output["token_ids"], output["finish_reason"]
    if not ids or reason not in ("stop", "length") or (reason == "stop") != (ids[-1] in stop_ids):
        last = ids[-1] if ids else "nothing"
        raise UserError(
            f"generation.engine=vllm: an answer ended by {brief(reason)} with {last} as its last token, where the end tokens "
            f"are {sorted(stop_ids)}: its ids can't be trusted. Use generation.engine=transformers."
        )
    return ids, reason


# --- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def _engines(llm: dict, lora: dict | None, config: GenerationConfig) -> Iterator[Callable]:
    """`ask(prompts, sampling)` of `data_parallel` engines, each with GPUs of its own, started when they are first asked."""
    with tempfile.TemporaryDirectory(prefix="spin-vllm-") as name:
        folder, running = Path(name), list[subprocess.Popen]()

        def ask(prompts: list[list[int]], sampling: list[dict]) -> list[dict]:
            if not running:
                (folder / "engine.json").write_text(json.dumps({"llm": llm, "lora": lora}))
                running.extend(_start(folder, part, config) for part in range(config.data_parallel))
            asked = running[: len(prompts)]
            ends = len(asked)
            for part, process in enumerate(asked):
                path = folder / f"{part}.json"
                path.write_text(json.dumps({"prompts": prompts[part::ends], "sampling": sampling[part::ends]}))
                assert process.stdin
                try:
                    process.stdin.write(f"{path}\n".encode())
                    process.stdin.flush()
                except BrokenPipeError:
                    _raise_ended(folder, part, process)
            found: list[dict] = [{}] * len(prompts)
            for part, process in enumerate(asked):
                found[part::ends] = _wait(folder, part, process)
            return found

        try:
            yield ask
        finally:
            for process in running:
                _end(process)


def _start(folder: Path, part: int, config: GenerationConfig) -> subprocess.Popen:
    width = config.tensor_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    ours = ",".join(visible.split(",")[part * width : (part + 1) * width])
    with (folder / f"{part}.log").open("wb") as log:
        return subprocess.Popen(
            [config.python or sys.executable, str(WORKER), str(folder / "engine.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=_environment(ours),
            start_new_session=True,  # a signal is for us, who then end it with all of its own processes
        )


def _environment(gpus: str) -> dict[str, str]:
    """Without its own folder on the path: the names of our modules are not for others to import."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(TORCHRUN)}
    return {**kept, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": gpus}


def _wait(folder: Path, part: int, process: subprocess.Popen) -> list[dict]:
    path = folder / f"{part}.json.out"
    while not path.exists():
        stop_where_asked()
        if process.poll() is not None and not path.exists():
            _raise_ended(folder, part, process)
        time.sleep(0.05)
    found = json.loads(path.read_text())
    path.unlink()
    return found


def _raise_ended(folder: Path, part: int, process: subprocess.Popen) -> None:
    lines = (folder / f"{part}.log").read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
    raise UserError(
        f"generation.engine=vllm: vLLM ended with status {process.wait()}: {brief(errors[-1], 300)} "
        "Where memory is short lower generation.gpu_memory, or raise generation.tensor_parallel."
    )


def _end(process: subprocess.Popen) -> None:
    """End a worker and all that it started, and wait until they are gone: what they hold of the GPU goes with them."""
    with suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        for _ in range(100):
            os.killpg(process.pid, 0)  # somebody of the group is still there
            time.sleep(0.1)
