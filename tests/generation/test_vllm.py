"""Generation by vLLM, as far as a machine without a GPU shows it: what is sent, how answers are read, what goes wrong.

No vLLM runs here, and nothing stands in for it. The names that are sent are held against those of its pinned version
(`vllm_interface.json`, read from its wheel by `vllm_interface.py`).
"""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from spin.config.schema import GenerationConfig, ModelConfig
from spin.data.examples import Example
from spin.generation import vllm as vllm_engine
from spin.generation.answers import Answer
from spin.models.find import fresh_adapter
from spin.models.load import load_tokenizer
from spin.pipeline.stages import Stages
from spin.runtime.errors import UserError
from spin.runtime.tracking import Tracker
from tests.config.test_schema import load
from tests.generation import vllm_interface
from tests.models.test_adapters import LORA, base_or_self

RECORD = json.loads((Path(__file__).parent / "vllm_interface.json").read_text())
CONFIG = GenerationConfig.from_defaults(temperature=0.7, top_p=0.9, engine="vllm", tensor_parallel=2)
EXAMPLES = [Example(f"e{i}", "", tuple(range(2, 4 + i)), "", ()) for i in range(5)]


def test_the_record_is_of_the_version_that_is_asked_for():
    assert f"vllm-{vllm_engine.VERSION}-" in RECORD["wheel"]
    assert tuple(RECORD["LoRA ranks"]) == vllm_engine.RANKS
    assert RECORD["exported"] == ["LLM", "SamplingParams", "TokensPrompt"]


def test_all_that_is_sent_has_a_name_that_vllm_knows(tiny_folder, tmp_path):
    policy = fresh_adapter(
        base_or_self(tiny_folder), LORA, 0, ModelConfig.from_defaults(path=str(tiny_folder)), tmp_path / "policy"
    )
    for one in (policy, base_or_self(tiny_folder)):
        arguments = vllm_engine.llm_arguments(one, torch.bfloat16, CONFIG, 300)
        assert arguments.keys() <= {*RECORD["LLM"], *RECORD["EngineArgs"]}
    sampling = vllm_engine.sampling_arguments(EXAMPLES[0], CONFIG, 64, {1, 2}, 0)
    assert sampling.keys() <= {*RECORD["SamplingParams"]}
    assert vllm_engine.lora_arguments(policy).keys() <= {*RECORD["LoRARequest"]}


def test_the_worker_calls_what_vllm_has():
    """Its calls as they are written: keywords of `generate` and `TokensPrompt`, attributes of what comes back."""
    tree = ast.parse(vllm_engine.WORKER.read_text())
    keywords = {
        call.func.attr: {k.arg for k in call.keywords if k.arg}
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    }
    assert keywords["generate"] <= {*RECORD["LLM.generate"]} and "lora_request" in keywords["generate"]
    assert keywords["TokensPrompt"] == {"prompt_token_ids"} <= {*RECORD["TokensPrompt"]}
    read = {
        node.attr: node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert read["outputs"] == "output" and "outputs" in RECORD["RequestOutput"]
    assert {name for name, owner in read.items() if owner == "completion"} <= {*RECORD["CompletionOutput"]}


@pytest.mark.skipif(not list(Path().glob("vllm-*.whl")), reason="needs the wheel: see vllm_interface.py")
def test_the_record_is_what_the_wheel_holds():
    assert vllm_interface.record(next(Path().glob("vllm-*.whl"))) == RECORD


def test_the_reader_of_signatures_reads_them():
    source = 'class A:\n  x: int = 1\n  y: str\n  def f(self, a, *, b=2): ...\nN = ("u", "v")\nL = Literal[1, 2]\n'
    node = vllm_interface.classes(source)["A"]
    assert vllm_interface.fields(node) == ["x", "y"] and vllm_interface.arguments(node, "f") == ["a", "b"]
    assert vllm_interface.value(source, "N") == ["u", "v"] and vllm_interface.value(source, "L") == [1, 2]


def test_an_engine_is_told_the_policy_by_its_folder(tiny_folder, tmp_path):
    start = base_or_self(tiny_folder)
    told = vllm_engine.llm_arguments(start, torch.bfloat16, CONFIG, 300)
    assert told["model"] == str(tiny_folder) and told["dtype"] == "bfloat16" and "enable_lora" not in told
    assert told["tensor_parallel_size"] == 2 and told["max_model_len"] == 300
    assert vllm_engine.lora_arguments(start) is None
    policy = fresh_adapter(start, LORA, 0, ModelConfig.from_defaults(path=str(tiny_folder)), tmp_path / "policy")
    told = vllm_engine.llm_arguments(policy, torch.float32, CONFIG, 300)
    assert told["model"] == str(tiny_folder)  # the base, on which the adapter goes
    assert told["enable_lora"] and told["max_lora_rank"] == 8  # the smallest that holds rank 4
    assert vllm_engine.lora_arguments(policy)["lora_path"] == str(tmp_path / "policy")


def test_every_prompt_has_random_numbers_of_its_own():
    def sent(example, seed):
        return vllm_engine.sampling_arguments(example, CONFIG, 64, {7, 1}, seed)

    seeds = [sent(example, seed)["seed"] for seed in (0, 1) for example in EXAMPLES]
    assert len(set(seeds)) == 10 and all(0 <= seed < 2**63 for seed in seeds)
    assert sent(EXAMPLES[0], 0) == sent(EXAMPLES[0], 0)
    assert sent(EXAMPLES[0], 0) | {"seed": 0} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 0,
        "stop_token_ids": [1, 7],
        "detokenize": False,
    }


def test_answers_are_read_with_their_end_token_or_refused():
    def read(ids, reason):
        return vllm_engine.read_output({"token_ids": ids, "finish_reason": reason}, {1, 7})

    assert read([3, 4, 1], "stop") == ([3, 4, 1], "stop")
    assert read([3, 4, 5], "length") == ([3, 4, 5], "length")
    # Its end token taken away, an end that nobody named, a request that was given up, an end token at the cap: all wrong.
    for ids, reason in (([3, 4], "stop"), ([], "stop"), ([3], "abort"), ([3, 1], "length"), ([3], None)):
        with pytest.raises(UserError, match="its ids can't be trusted") as error:
            read(ids, reason)
        assert "\n" not in str(error.value)


def test_without_vllm_the_install_line_comes_before_any_work(place):
    done = place.play("generation=vllm", status=1)
    assert "vLLM is not installed" in done.stderr and f"pip install vllm=={vllm_engine.VERSION}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not place.stages()
    done = place.play("generation=vllm", "generation.python=/nowhere/python", status=1)
    assert "generation.python=/nowhere/python: can't be run" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_worker_that_ends_is_named_with_its_own_words_and_leaves_no_process(tiny_folder, tmp_path):
    """The worker itself, with an interpreter that has no vLLM."""
    config = CONFIG.model_copy(update={"python": sys.executable, "data_parallel": 2})
    with pytest.raises(
        UserError, match="vLLM ended with status 1: ModuleNotFoundError: No module named 'vllm'"
    ) as error:
        vllm_engine.generate_with_vllm(
            base_or_self(tiny_folder), torch.float32, load_tokenizer(tiny_folder), EXAMPLES, config, 8, {1}, 0
        )
    assert "\n" not in str(error.value)


def test_answers_that_are_kept_need_no_engine(tiny_folder):
    """A resumed run starts one when the first missing shard is wanted, and here none is missing."""
    config = CONFIG.model_copy(update={"python": "/nowhere/python"})
    kept = []

    def keep(parts):
        for part in parts:
            kept.append(list(part.of))
            yield [{"id": one, "ids": [2, 1], "finish_reason": "stop", "text": "a"} for one in part.of]

    answers = vllm_engine.generate_with_vllm(
        base_or_self(tiny_folder), torch.float32, None, EXAMPLES, config, 8, {1}, 0, keep=keep, shard_size=2
    )  # fmt: skip
    assert kept == [["e0", "e1"], ["e2", "e3"], ["e4"]]
    assert answers == [Answer(example.id, (2, 1), "stop", "a") for example in EXAMPLES]


def test_the_engine_is_part_of_what_makes_answers_and_of_nothing_else(tmp_path):
    words = [f"cache.path={tmp_path}/cache", f"store.path={tmp_path}/store"]
    smoke = load("experiment=smoke", *words)
    stages = Stages(smoke, tmp_path, Tracker(tmp_path, name="", config={}, rank=1))

    def inputs(**settings):
        stages.config = smoke.model_copy(update={"generation": GenerationConfig.from_defaults(**settings)})
        return stages._generation_inputs(), stages._training_inputs(stages.start), stages.numerics

    ours, vllm = inputs(), inputs(engine="vllm")
    assert ours[1:] == vllm[1:]
    assert set(vllm[0]["generation"].items()) - set(ours[0]["generation"].items()) == {("engine", "vllm")}
    for change in (
        {"tensor_parallel": 2},
        {"data_parallel": 2},
        {"gpu_memory": 0.5},
        {"python": "x"},
        {"batch_size": 3},
    ):
        assert inputs(engine="vllm", **change) == vllm
    assert "engine" not in ours[0]["generation"]  # as before there were two


def test_its_processes_are_not_told_of_torchruns(monkeypatch):
    """They would wait for each other at the store of a game's own processes."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("HF_TOKEN", "kept")
    found = vllm_engine._environment("0,1")
    assert found["HF_TOKEN"] == "kept" and found["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not [key for key in found if key.startswith(vllm_engine.TORCHRUN)]
