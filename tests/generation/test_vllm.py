"""Tests of generation with vLLM that need neither vLLM nor a mock of it: arguments, outputs and failures.

tests/generation/test_vllm_cpu.py runs vLLM itself.
"""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from spin.config.schema import GenerationConfig, ModelConfig
from spin.data.examples import Example
from spin.generation import vllm as vllm_engine
from spin.generation.answers import Answer, AnswerRequest
from spin.generation.vllm_worker import settings_for_cpu
from spin.models.find import fresh_adapter
from spin.models.load import load_tokenizer
from spin.pipeline.context import prepare_run
from spin.pipeline.generate import generation_inputs
from spin.pipeline.train import training_inputs
from spin.runtime.errors import UserError
from spin.runtime.random import seed_of
from spin.runtime.tracking import Tracker
from tests.config.test_schema import load
from tests.models.test_adapters import LORA, base_or_self

CONFIG = GenerationConfig.from_defaults(temperature=0.7, top_p=0.9, engine="vllm", tensor_parallel=2)
EXAMPLES = [Example(f"e{i}", "", tuple(range(2, 4 + i)), "", ()) for i in range(5)]


def test_policy_arguments(tiny_folder, tmp_path):
    start = base_or_self(tiny_folder)
    arguments = vllm_engine.llm_arguments(start, torch.bfloat16, CONFIG, 300)
    assert (
        arguments["model"] == str(tiny_folder) and arguments["dtype"] == "bfloat16" and "enable_lora" not in arguments
    )
    assert arguments["tensor_parallel_size"] == 2 and arguments["max_model_len"] == 300
    policy = fresh_adapter(start, LORA, 0, ModelConfig.from_defaults(path=str(tiny_folder)), tmp_path / "policy")
    arguments = vllm_engine.llm_arguments(policy, torch.float32, CONFIG, 300, 4)
    assert arguments["model"] == str(tiny_folder)  # the adapter's base
    assert arguments["enable_lora"] and arguments["max_lora_rank"] == 8  # the smallest supported value of at least 4
    assert vllm_engine.lora_arguments(policy)["lora_path"] == str(tmp_path / "policy")


def test_sampling_arguments():
    seed = seed_of(0, "e3")
    assert 0 <= seed < 2**63
    assert vllm_engine.sampling_arguments(seed, CONFIG, 64, {7, 1}) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": seed,
        "stop_token_ids": [1, 7],
        "ignore_eos": True,
        "detokenize": False,
    }


def test_output_is_checked():
    def ids_of(ids, reason):
        return vllm_engine.checked_ids({"token_ids": ids, "finish_reason": reason}, {1, 7})

    assert ids_of([3, 4, 1], "stop") == [3, 4, 1]
    assert ids_of([3, 4, 5], "length") == [3, 4, 5]
    # A missing stop token, an unknown stop, an aborted request, a stop token at the maximal length, no reason.
    for ids, reason in (([3, 4], "stop"), ([], "stop"), ([3], "abort"), ([3, 1], "length"), ([3], None)):
        with pytest.raises(UserError, match="its ids can't be trusted") as error:
            ids_of(ids, reason)
        assert "\n" not in str(error.value)


def test_interface_check_names_the_arguments_on_a_cpu(tiny_folder, monkeypatch):
    facts = json.dumps({"version": "", "devices": None, "missing": []})
    run = Mock(return_value=subprocess.CompletedProcess([], 0, facts, ""))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "environ", {})
    vllm_engine.check_vllm(CONFIG, base_or_self(tiny_folder), 0)
    assert set(settings_for_cpu(True)) < set(json.loads(run.call_args[0][0][-1])["LLM"])


def test_missing_vllm(place):
    done = place.play("generation=vllm", status=1)
    assert "vLLM is not installed" in done.stderr and vllm_engine.INSTALL in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not place.stages()
    done = place.play("generation=vllm", "generation.python=/nowhere/python", status=1)
    assert "generation.python=/nowhere/python: can't be run" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_worker_that_fails(tiny_folder, tmp_path):
    """The error of a worker whose interpreter lacks vLLM is reported in one line with the path of its log."""
    config = CONFIG.model_copy(update={"python": sys.executable, "data_parallel": 2})
    request = AnswerRequest(load_tokenizer(tiny_folder), EXAMPLES, config, 8, {1}, 0)
    with pytest.raises(
        UserError, match=r"vLLM ended with status 1: ModuleNotFoundError: No module named 'vllm'\. Its log is"
    ) as error:
        vllm_engine.generate_with_vllm(base_or_self(tiny_folder), torch.float32, tmp_path, request)
    assert "\n" not in str(error.value) and f"Its log is {tmp_path}/vllm-0.log" in str(error.value)
    assert "ModuleNotFoundError" in (tmp_path / "vllm-0.log").read_text()


WORKER, CORE = (
    "(Worker_TP0 pid=7) ERROR 11-27 15:33:23 [a.py:1063] ",
    "(EngineCore pid=5) ERROR 11-27 15:33:23 [core.py:15] ",
)
WARNING = "(MainProcess pid=4) WARNING 11-27 15:33:20 [base.py:380] "
HARMLESS = [
    WARNING + line for line in ("warmup failed", "Traceback (most recent call last):", "  File", "ValueError: x")
]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], "no output"),
        (["INFO 11-27 15:33:20 [a.py:1] start", "Segmentation fault"], "Segmentation fault"),
        (["Traceback (most recent call last):", '  File "a.py"', "KeyError: 'a'", "Error: later"], "KeyError: 'a'"),
        # The worker of an engine fails; then the engine and the main process fail with other errors.
        (
            [
                *HARMLESS,
                WORKER + "WorkerProc hit an exception.",
                *(
                    WORKER + line
                    for line in ("Traceback (most recent call last):", "  File", "RuntimeError: head_dim=16")
                ),
                *(
                    CORE + line
                    for line in ("Traceback (most recent call last):", "  File", "RuntimeError: Worker failed")
                ),
                "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
            ],
            "RuntimeError: head_dim=16",
        ),
        (
            ["[rank0]: Traceback (most recent call last):", "[rank0]:     a()", "[rank0]: ValueError: b"],
            "ValueError: b",
        ),
        (["Traceback (most recent call last):", "a.ValidationError: 1 error", "  Value error, why", "x"], "why"),
    ],
)
def test_first_error(lines, error):
    assert vllm_engine.first_error("\n".join(lines)).endswith(error)


def test_stored_answers_need_no_worker(tiny_folder, tmp_path):
    """A run starts workers at the first missing shard, and so none if all shards are stored."""
    config = CONFIG.model_copy(update={"python": "/nowhere/python"})
    shards = []

    def keep(parts):
        for part in parts:
            shards.append(list(part.of))
            names = [name.partition("#") for name in part.of]
            yield [
                {"id": id, "index": int(index or 0), "ids": [2, 1], "finish_reason": "stop", "text": "a"}
                for id, _, index in names
            ]

    request = AnswerRequest(None, EXAMPLES, config, 8, {1}, 0, num_answers=2, keep=keep, shard_size=4)
    answers = vllm_engine.generate_with_vllm(base_or_self(tiny_folder), torch.float32, tmp_path, request)
    assert shards == [["e0", "e0#1", "e1", "e1#1"], ["e2", "e2#1", "e3", "e3#1"], ["e4", "e4#1"]]
    assert answers == [Answer(example.id, k, (2, 1), "stop", "a") for example in EXAMPLES for k in (0, 1)]


def test_engine_changes_only_keys_of_answers(tmp_path):
    words = [f"cache.path={tmp_path}/cache", f"store.path={tmp_path}/store"]
    smoke = load("experiment=smoke", *words)
    run = prepare_run(smoke, tmp_path, Tracker(tmp_path, name="", config={}, rank=1))

    def inputs(**settings):
        run.config = smoke.model_copy(update={"generation": GenerationConfig.from_defaults(**settings)})
        return generation_inputs(run, 4), training_inputs(run, run.start), run.numerics

    transformers, vllm = inputs(), inputs(engine="vllm")
    assert transformers[1:] == vllm[1:]
    assert set(vllm[0]["generation"].items()) - set(transformers[0]["generation"].items()) == {("engine", "vllm")}
    for change in (
        {"tensor_parallel": 2},
        {"data_parallel": 2},
        {"gpu_memory": 0.5},
        {"python": "x"},
        {"batch_size": 3},
    ):
        assert inputs(engine="vllm", **change) == vllm
    assert "engine" not in transformers[0]["generation"]


def test_workers_do_not_inherit_torchrun(monkeypatch):
    """Workers do not inherit torchrun's variables, which would make them join the run's process group."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("HF_TOKEN", "kept")
    environment = vllm_engine._environment(CUDA_VISIBLE_DEVICES="0,1")
    assert environment["HF_TOKEN"] == "kept" and environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not [key for key in environment if key.startswith(vllm_engine.TORCHRUN)]
