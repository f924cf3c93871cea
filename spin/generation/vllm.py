"""Generate answers with vLLM, which is optional and not imported here.

vLLM pins other versions of torch and transformers than spin. It runs in separate processes (`vllm_worker.py`), with the
interpreter of another environment if `generation.python` is set. They load the policy from its folder in the store.
vLLM's log-probs differ from those of a forward pass, so pairs are scored with the training engines.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import torch

from spin.config.schema import GenerationConfig
from spin.generation.answers import Answer, AnswerRequest, Ids, answer_in_shards
from spin.models import adapters
from spin.models.policy import Policy
from spin.runtime.errors import TRY_AGAIN, UserError, brief
from spin.runtime.signals import raise_if_stopped
from spin.runtime.tables import Rows

INSTALL = "python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm==0.32.0"  # the tested version
# Environment variables of torchrun, with which vLLM's processes would join the wrong process group.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
WORKER = Path(__file__).with_name("vllm_worker.py")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for `max_lora_rank`
# A line of vLLM's log: process; level, date, time and source location; text. Warnings may have tracebacks, too.
LINE = re.compile(r"^(?:\[rank\d+\]: |\(\S+ pid=\d+\) )?(?:([A-Z]+) \S+ \S+ \[\S+\] )?(.*)$", re.MULTILINE)


def check_vllm(config: GenerationConfig, start: Policy, rank: int) -> None:
    """Raise UserError if vLLM cannot be used. A separate process imports it and checks its interface.

    `rank` is the rank of the policies' adapters, or 0 without adapters.
    """
    python, quantization = config.python or sys.executable, start.base_or_self.quantization
    if quantization:
        raise UserError(
            f"generation.engine=vllm: set model.quantization=none: vLLM rounds to {quantization} in its own way, and the "
            "answers would come from another model than the scored opponent."
        )
    if rank > RANKS[-1]:
        raise UserError(f"generation.engine=vllm: vLLM takes adapters up to rank {RANKS[-1]}, not {rank}.")
    added = ["enforce_eager", "enable_chunked_prefill", "use_tqdm", "lora_request"]  # by the worker
    names = {
        "LLM": [*llm_arguments(start, torch.float32, config, 1, rank), *added],
        "SamplingParams": list(sampling_arguments(0, config, 1, ())),
        "LoRARequest": list(lora_arguments(start)),
    }
    command = [python, "-P", str(WORKER), "check", json.dumps(names)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=_environment())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"generation.python={python}: can't be run ({brief(error)}).") from error
    if "No module named 'vllm'" in result.stderr:
        raise UserError(
            f"generation.engine=vllm: vLLM is not installed for {python}: {INSTALL}, then set "
            "generation.python=.venv-vllm/bin/python (without a GPU: `make vllm`)"
        )
    if result.returncode:
        raise UserError(f"generation.engine=vllm: {python} can't import vLLM: {brief(first_error(result.stderr), 300)}")
    facts = json.loads(result.stdout.splitlines()[-1])
    if missing := ", ".join(facts["missing"]):
        raise UserError(f"generation.engine=vllm: vLLM {brief(facts['version'])} has no {missing}: {INSTALL}")
    devices, needed = facts["devices"], config.tensor_parallel * config.data_parallel
    if devices is not None and devices < needed:
        raise UserError(
            f"generation.tensor_parallel={config.tensor_parallel} times generation.data_parallel={config.data_parallel} "
            f"needs {needed} GPUs, but {python} finds {devices}."
        )


def generate_with_vllm(policy: Policy, dtype: torch.dtype, logs: Path, request: AnswerRequest) -> Rows[Answer]:
    """Generate answers like `sampling.generate_answers`, but with vLLM, whose processes log to the folder `logs`.

    The processes start with the first shard that is not stored. Raises UserError if one ends early.
    """
    settings, max_new_tokens, stop_ids = request.settings, request.max_new_tokens, request.stop_ids
    longest = max(len(example.prompt_ids) for example in request.examples) + max_new_tokens
    rank = adapters.largest_rank(policy.folder) if policy.base else 0
    llm = llm_arguments(policy, dtype, settings, longest, rank)
    arguments = {"llm": llm, "lora": lora_arguments(policy) if policy.base else None}
    with run_workers(arguments, settings, logs) as ask:

        def decode(prompts: list[Ids], seeds: list[int]) -> list[list[int]]:
            sampling = [sampling_arguments(seed, settings, max_new_tokens, stop_ids) for seed in seeds]
            answers = [checked_ids(output, stop_ids) for output in ask(prompts, sampling)]
            request.advance(len(answers))
            return answers

        return answer_in_shards(request, decode)


def llm_arguments(
    policy: Policy, dtype: torch.dtype, config: GenerationConfig, longest: int, rank: int = 0
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for up to `longest` tokens and adapters of up to `rank` (0: none)."""
    arguments = {
        "model": str(policy.base_or_self.folder.resolve()),
        "skip_tokenizer_init": True,  # prompts and answers are token ids; each request names its stop tokens
        "generation_config": "vllm",  # ignore the model's own sampling settings
        "trust_remote_code": False,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": longest,
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.gpu_memory,
        "seed": 0,  # each request has its own seed
    }
    if rank:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in RANKS if r >= rank)}
    return arguments


def lora_arguments(policy: Policy) -> dict[str, Any]:
    """Return the arguments of `vllm.lora.request.LoRARequest` for a policy that is an adapter."""
    return {"lora_name": policy.id[:16], "lora_int_id": 1, "lora_path": str(policy.folder.resolve())}


def sampling_arguments(
    seed: int, config: GenerationConfig, max_new_tokens: int, stop_ids: Collection[int]
) -> dict[str, Any]:
    """Return the arguments of `vllm.SamplingParams` for one prompt."""
    return {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": max_new_tokens,
        "seed": seed,
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,  # otherwise the end tokens in the model's folder also stop an answer
        "detokenize": False,
    }


def checked_ids(output: dict[str, Any], stop_ids: Collection[int]) -> list[int]:
    """Return the token ids of a worker's output.

    Raises UserError unless the answer ends with a stop token if and only if its finish reason is "stop".
    """
    ids, reason = output["token_ids"], output["finish_reason"]
    if not ids or reason not in ("stop", "length") or (reason == "stop") != (ids[-1] in stop_ids):
        last = ids[-1] if ids else "nothing"
        raise UserError(
            f"generation.engine=vllm: an answer's finish reason is {brief(reason)}, but its last token is {last} and the stop "
            f"tokens are {sorted(stop_ids)}: its ids can't be trusted. Use generation.engine=transformers."
        )
    return ids


# --- worker processes -------------------------------------------------------------------------------------------------


@contextmanager
def run_workers(arguments: dict, config: GenerationConfig, logs: Path) -> Iterator[Callable]:
    """Yield `ask(prompts, sampling)`, which returns the outputs of `data_parallel` workers in the order of the prompts.

    The first call starts the workers, each on its own GPUs. They end with this process, even if it is killed.
    """
    with tempfile.TemporaryDirectory(prefix="spin-vllm-") as name:
        folder, workers = Path(name), list[subprocess.Popen]()

        def ask(prompts: list[Ids], sampling: list[dict]) -> list[dict]:
            if not workers:
                (folder / "engine.json").write_text(json.dumps(arguments))
                workers.extend(_start(folder, number, config, logs) for number in range(config.data_parallel))
            count = min(len(workers), len(prompts))
            for number in range(count):
                path = folder / f"{number}.tmp"
                path.write_text(json.dumps({"prompts": prompts[number::count], "sampling": sampling[number::count]}))
                path.rename(folder / f"{number}.json")
            outputs: list[dict] = [{}] * len(prompts)
            for number, worker in enumerate(workers[:count]):
                outputs[number::count] = _receive(folder / f"{number}.json.out", worker, logs / f"vllm-{number}.log")
            return outputs

        try:
            yield ask
        finally:
            for worker in workers:
                _end(worker)


def _start(folder: Path, number: int, config: GenerationConfig, logs: Path) -> subprocess.Popen:
    width = config.tensor_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = ",".join(visible.split(",")[number * width : (number + 1) * width])
    paths = [str(folder / "engine.json"), str(folder / f"{number}.json")]
    with (logs / f"vllm-{number}.log").open("wb") as log:
        return subprocess.Popen(
            [config.python or sys.executable, str(WORKER), *paths],
            stdin=subprocess.PIPE,  # closed when this process ends, which the worker detects
            stdout=log,
            stderr=log,
            env=_environment(CUDA_VISIBLE_DEVICES=gpus),
            start_new_session=True,  # signals reach only this process, which then ends the worker's process group
        )


def _environment(**more: str) -> dict[str, str]:
    """Return this process's environment without torchrun's variables, and with spin's modules off the import path."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(TORCHRUN)}
    return {**inherited, "PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1", **more}


def _receive(path: Path, worker: subprocess.Popen, log: Path) -> list[dict]:
    """Wait for a worker's outputs and return them. Raises UserError with the first error in its log if it ends."""
    while not path.exists():
        raise_if_stopped()
        if (status := worker.poll()) is not None and not path.exists():
            reason = f"ended with status {status}: {brief(first_error(log.read_text(errors='replace')), 300)}."
            if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
                reason = "was killed, as the system does when main memory is short."
            raise UserError(
                f"generation.engine=vllm: vLLM {reason} Its log is {log}. If GPU memory is short, lower "
                f"generation.gpu_memory, or raise generation.tensor_parallel; {TRY_AGAIN}"
            )
        time.sleep(0.05)
    outputs = json.loads(path.read_text())
    path.unlink()
    return outputs


def first_error(log: str) -> str:
    """Return the error of the first traceback in a log, which causes later ones, or the last line without one."""
    lines = [text for level, text in LINE.findall(log.strip()) if level not in ("INFO", "WARNING")]
    traceback = list(dropwhile(lambda text: not text.startswith("Traceback "), lines))
    error = list(dropwhile(lambda text: text.startswith(" "), traceback[1:])) or lines[-1:]
    return " ".join([*error[:1], *takewhile(lambda text: text.startswith(" "), error[1:])]) or "no output"


def _end(worker: subprocess.Popen) -> None:
    """End a worker and its process group, and wait until all its processes are gone and their GPU memory is free."""
    with suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(worker.pid, number)
            with suppress(subprocess.TimeoutExpired):
                worker.wait(timeout=10)
        for _ in range(100):
            os.killpg(worker.pid, 0)  # raises when the group is empty
            time.sleep(0.1)
