"""The estimate of memory: against what is counted in an engine, what autograd keeps, and the measured peak."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

from spin.config.schema import EngineConfig, OptimizerConfig
from spin.engines import memory, memory_table
from spin.engines.activations import save_less_for_backward
from spin.engines.device_memory import DeviceMemory
from spin.engines.logps import Forward, sequence_logps
from spin.engines.memory import GIB, Load, Needed, advice, check_memory, shape_of
from spin.engines.single import SingleEngine
from spin.models import adapters
from spin.models.adapters import Lora
from spin.models.policy import Policy, content_id
from spin.runtime.errors import UserError
from tests.config.test_schema import load as load_config
from tests.conftest import random_items

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LOAD = Load("bf16", "rmsprop", False, None, 1024, 1024, 256, 2048, 16, 128, 192)
MEDIUM = tf.LlamaConfig(
    vocab_size=8000,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)


def test_weights_are_counted_as_they_are():
    shape = shape_of(MEDIUM, rank=4)
    assert shape.weights == tf.LlamaForCausalLM(MEDIUM).num_parameters()
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(MEDIUM)
    adapters.insert_adapter(model, Lora(4, 8, "all-linear"))
    assert shape.adapter == adapters.num_parameters(model)
    assert shape_of(memory_table.architecture_of(**memory_table.MODELS["135M (SmolLM2)"])).weights == 134_515_008
    for name, billions in (("1.7B (SmolLM2)", 1.71), ("7B (Mistral, Zephyr)", 7.24), ("70B (Llama 3.1)", 70.55)):
        assert shape_of(memory_table.architecture_of(**memory_table.MODELS[name])).weights / 1e9 == pytest.approx(
            billions, abs=0.01
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_what_an_engine_holds_a_weight_is_what_the_table_says(tiny_folder, precision, optimizer):
    """All tensors of an engine after a step, each storage once."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    policy = Policy("start", tiny_folder, content_id(tiny_folder))
    engine = SingleEngine(
        policy, dtype, CPU, EngineConfig.from_defaults(), OptimizerConfig.from_defaults(name=optimizer)
    )
    forward = Forward("packed", "chunked", 256, 999, 64)
    engine.optimizer.step(engine.weights, engine.residuals, {}, 1e-3, 1.0)
    for passes in (1, 2):
        (batch,) = forward.batches(random_items(2))
        engine.backward(sequence_logps(engine.model, batch, forward).sum())
        states = [value for states in engine.optimizer.states.values() for value in states.values()]
        tensors = [*engine.weights.values(), *engine.residuals.values(), *engine.grads.values(), *states]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        numbers = sum(weight.numel() for weight in engine.weights.values())
        expected = memory.bytes_per_weight(precision, optimizer, passes=passes)
        assert sum(storages.values()) == pytest.approx(numbers * sum(expected.values()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_keeps_of_a_layer_is_what_the_formula_says(dtype, checkpointing):
    """Counted storage by storage in two models that differ by two layers."""
    kept = []
    for layers in (2, 4):
        config = tf.LlamaConfig(
            **{**MEDIUM.to_dict(), "num_hidden_layers": layers, "hidden_size": 96, "vocab_size": 97}
        )
        model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        save_less_for_backward(model, checkpointing)  # a layer that is at work
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        forward = Forward("packed", "chunked", 256, 512, 64)
        batch = next(forward.batches(random_items(60)))
        found = {}

        def keep(tensor, found=found, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logps = sequence_logps(model, batch, forward)
        kept.append(sum(found.values()))
        assert logps.requires_grad
    a_token = (kept[1] - kept[0]) / 2 / batch.input_ids.numel()
    formula = memory._kept_by_layer(shape_of(config), dtype.itemsize, checkpointing)
    assert a_token == pytest.approx(formula, rel=0.1)


# --- the peak ---------------------------------------------------------------------------------------------------------

# Trains two steps and says how many bytes the process came to hold at most, above what it held before the model was
# loaded. A tiny model goes first: what libraries allocate for themselves is no part of the estimate.
MEASURE = """
import json, sys, tempfile
from pathlib import Path
import torch
from spin import tiny
from spin.models.adapters import Lora
from spin.config.schema import EngineConfig, ModelConfig, OptimizerConfig
from spin.engines.single import SingleEngine
from spin.engines.logps import Forward, sequence_logps
from spin.engines.device_memory import resident_bytes, release_free_memory
from spin.models.policy import Policy, with_quantization
from spin.models.find import fresh_adapter
from spin.engines.packing import Continuations

asked = json.loads(sys.argv[1])
forward = Forward("packed", "chunked", asked["row"], asked["tokens"], asked["chunk"])

def train(folder, vocabulary):
    policy = with_quantization(Policy("start", folder, "x"), asked["quantization"])
    if asked["rank"]:
        lora = Lora(asked["rank"], 8, "all-linear")
        policy = fresh_adapter(policy, lora, 0, ModelConfig.from_defaults(path=str(folder)), folder / "adapter")
    engine = SingleEngine(policy, getattr(torch, asked["dtype"]), torch.device("cpu"),
        EngineConfig.from_defaults(gradient_checkpointing=asked["checkpointing"]), OptimizerConfig.from_defaults(name=asked["optimizer"]))
    n = asked["row"] // 4
    ids = [tuple((7 * i + k) % (vocabulary - 5) + 3 for i in range(n)) for k in range(3)]
    items = [Continuations(ids[0], (ids[1], ids[2]))] * (asked["tokens"] // asked["row"])
    for _ in range(2):
        for batch in forward.batches(items):
            engine.backward(sequence_logps(engine.model, batch, forward).sum())
        engine.step(1e-6)
    engine.close()

with tempfile.TemporaryDirectory() as name:
    tiny.make(Path(name))
    train(Path(name), 258)
release_free_memory()
before = resident_bytes()
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
train(Path(asked["folder"]), asked["vocabulary"])
status = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 - before)
"""


# What is freed goes back to the system at once. Else glibc keeps holes between small tensors: how many is chance, and where
# weights are rounded to 4 bits while they are read it is anything up to half of the peak (docs/memory.md).
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def measured(folder: Path, vocabulary: int, load: Load, rank: int) -> float:
    asked = {
        "folder": str(folder),
        "vocabulary": vocabulary,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[load.precision],
        "rank": rank,
        "quantization": load.quantization or "none",
        "optimizer": load.optimizer,
        "checkpointing": load.checkpointing,
        "row": load.row,
        "tokens": load.training_tokens,
        "chunk": load.head_chunk,
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(asked)],
        cwd=ROOT,
        env={**os.environ, **AT_ONCE},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    folder = tmp_path_factory.mktemp("medium")
    tf.LlamaForCausalLM(MEDIUM).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


CASES = {
    "fp32": ({"precision": "fp32"}, 0),
    "bf16, adamw, checkpointing": ({"optimizer": "adamw", "checkpointing": True}, 0),
    "LoRA": ({}, 8),
    "LoRA on nf4, checkpointing": ({"quantization": "nf4", "checkpointing": True}, 8),
}
SLOW = ("fp32", "LoRA on nf4, checkpointing")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize(
    ("change", "rank"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in CASES.items()],
)
def test_the_estimate_is_near_the_measured_peak(medium, change, rank):
    """Of a model this small, the logits' gradients that fp32 is counted to hold are much."""
    load = replace(
        LOAD,
        **change,
        passes=1,
        files=sum(path.stat().st_size for path in medium.glob("*.safetensors")),
    )
    shape = shape_of(MEDIUM, rank)
    expected = max(one.total for one in (memory.training(shape, load), memory.loading(shape, load)))
    found = measured(medium, MEDIUM.vocab_size, load, rank)
    off = 0.3 if load.precision == "fp32" else 0.2
    assert expected == pytest.approx(found, rel=off), f"{expected / 1e6:.0f} MB, measured {found / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.parametrize(("change", "rank"), CASES.values(), ids=CASES)
def test_the_estimate_is_near_the_measured_peak_of_the_embedded_model(change, rank, tmp_path):
    from spin.models.find import find_model

    config = load_config()
    folder = find_model(config.model, Path(config.cache.path)).folder
    here = tmp_path / "model"
    here.mkdir()
    for path in folder.iterdir():
        (here / path.name).symlink_to(path)
    architecture = tf.AutoConfig.from_pretrained(folder)
    files = sum(path.stat().st_size for path in here.glob("*.safetensors"))
    load = replace(
        LOAD,
        passes=1,
        training_tokens=512,
        scoring_tokens=512,
        head_chunk=1024,
        files=files,
        **change,
    )
    shape = shape_of(architecture, rank)
    expected = max(one.total for one in (memory.training(shape, load), memory.loading(shape, load)))
    found = measured(here, architecture.vocab_size, load, rank)
    assert expected == pytest.approx(found, rel=0.2), f"{expected / 1e6:.0f} MB, measured {found / 1e6:.0f} MB"


# --- what is said -----------------------------------------------------------------------------------------------------

SEVEN = memory_table.architecture_of(**memory_table.MODELS["7B (Mistral, Zephyr)"])


def adapted():
    return shape_of(SEVEN, memory.RANK)


def test_a_line_says_what_is_needed_and_a_second_one_what_to_change():
    shape = shape_of(SEVEN)
    line, warning = check_memory(shape, LOAD, DeviceMemory(200 * GIB, 300 * GIB, 0.0), adapted)
    needed = memory.stages(shape, LOAD)[0]
    assert warning is None and needed.stage == "training"
    assert line.startswith(f"memory needed: about {needed.total / GIB:.1f} GiB (training: weights 13.5, masters 13.5, ")
    assert line.endswith("200.0 GiB free")
    line, warning = check_memory(shape, LOAD, DeviceMemory(70 * GIB, 300 * GIB, 0.0), adapted)
    assert "that may not fit: set " in warning and "\n" not in warning
    with pytest.raises(UserError, match=r"and there are 24\.0 GiB in all: set .*model\.adapter=lora") as error:
        check_memory(shape, LOAD, DeviceMemory(23 * GIB, 24 * GIB, 0.0), adapted)
    assert "\n" not in str(error.value)


def test_only_what_is_counted_ends_a_run():
    """Activations are estimated: however many there may be, that is a warning."""
    shape, load = shape_of(MEDIUM), replace(LOAD, training_tokens=10**7)
    line, warning = check_memory(shape, load, DeviceMemory(GIB, GIB, 0.0), lambda: shape_of(MEDIUM, 16))
    assert warning and "may not fit" in warning and "memory needed" in line


def test_advice_comes_in_the_order_of_what_it_costs_and_holds():
    shape, asked = shape_of(SEVEN), []
    for free in (120, 100, 60, 20, 8):
        words = advice(shape, replace(LOAD, training_tokens=4096), DeviceMemory(free * GIB, 300 * GIB, 0.0), adapted)
        asked.append(words)
    assert asked[-1].count("=") >= asked[0].count("=")
    assert "model.quantization=nf4" in asked[-1] and "model.adapter=lora" in asked[3] and "lora" not in asked[0]
    assert "take a smaller model" in advice(shape, LOAD, DeviceMemory(GIB, GIB, 0.0), adapted)
    nothing = replace(LOAD, decoded=8, plays=False)
    assert advice(shape, nothing, DeviceMemory(GIB, GIB, 0.0), adapted) == "take a smaller model or more memory"


def test_less_of_anything_needs_less():
    shape = shape_of(SEVEN)
    most = memory.training(shape, LOAD).total
    for change in ({"checkpointing": True}, {"training_tokens": 512}, {"optimizer": "rmsprop8bit"}, {"head_chunk": 64}):
        assert memory.training(shape, replace(LOAD, **change)).total < most, change
    assert memory.training(adapted(), LOAD).total < most
    assert memory.generating(shape, replace(LOAD, decoded=4)).total < memory.generating(shape, LOAD).total
    assert Needed("x", {"a": 1.0, "b": 2.0}).total == 3.0


def test_a_game_says_what_it_needs_before_it_loads_anything(place):
    done = place.play("iter=0", "schedule.sft_epochs=0", "evaluation=none")
    lines = done.stdout.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("memory needed: about ")]
    assert "GiB free" in lines[at] and not any("iter 0" in line for line in lines[:at])
    again = place.play("iter=0", "schedule.sft_epochs=0", "evaluation=none")
    assert "memory needed" not in again.stdout  # nothing is loaded
    stated = float(lines[at].split("about ")[1].split()[0])
    peak = json.loads((place.folder / "run" / "game.json").read_text())["peak_memory_gib"]
    assert stated == pytest.approx(peak, abs=0.6)


@pytest.mark.parametrize("words", ["", "--ranks 8 --cards 24 40 80"])
def test_the_table_of_the_docs_is_what_the_command_prints(capsys, words):
    memory_table.main(words.split())
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs" / "memory.md").read_text()


def test_the_command_takes_other_cards():
    done = subprocess.run(
        [sys.executable, "-m", "spin", "memory", "--cards", "0"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr == "error: --cards takes GiB of 1 or more, --ranks 1 card or more.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have their own ways")
def test_freed_memory_goes_back_to_the_system():
    """What small tensors leave stays with the process where one of them is still there, until it is told to give it back."""
    script = """
import torch
from spin.engines.device_memory import resident_bytes, release_free_memory
tensors = [torch.ones(16_000) for _ in range(4_000)]  # 256 MB, each too small for a mapping of its own
last, most = torch.ones(16_000), resident_bytes()
del tensors
kept = resident_bytes()
release_free_memory()
print(most - kept, most - resident_bytes(), last.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    freed, given_back, _ = map(float, done.stdout.split())
    assert freed < 50e6 and given_back > 200e6
