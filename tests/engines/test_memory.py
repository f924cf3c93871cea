"""Tests of the memory estimate against an engine's tensors, autograd's storage, a run's batches and the measured peak."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

from benchmarks import memory_table
from spin.config.schema import EngineConfig, OptimizerConfig
from spin.engines import device_memory, memory
from spin.engines.activations import save_less_for_backward
from spin.engines.device_memory import GIB, DeviceMemory
from spin.engines.logps import Forward, sequence_logps
from spin.engines.memory import Load, advice, check_memory, shape_of, total
from spin.engines.packing import Continuations
from spin.engines.single import SingleEngine
from spin.models import adapters
from spin.models.adapters import Lora
from spin.models.policy import Policy, content_id
from spin.models.tiny import make_tiny_model
from spin.pipeline.context import prepare_run
from spin.runtime.errors import UserError
from spin.runtime.tracking import Tracker
from tests.config.test_schema import load as load_config
from tests.conftest import random_items

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
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
LOAD = Load(shape_of(MEDIUM), "bf16", "rmsprop", False, None, 1024, 1024, 256, 2048, 16, 128, 192)


def test_weight_counts(tmp_path):
    shape = shape_of(MEDIUM, rank=4)
    assert shape.weights == tf.LlamaForCausalLM(MEDIUM).num_parameters()
    MEDIUM.save_pretrained(tmp_path)
    model, _ = adapters.empty_model(tmp_path, Lora(4, 8, "all-linear"))
    assert shape.adapter == adapters.num_parameters(model)
    assert shape_of(memory_table.architecture_of(**memory_table.MODELS["135M (SmolLM2)"])).weights == 134_515_008
    for name, billions in (("1.7B (SmolLM2)", 1.71), ("7B (Mistral, Zephyr)", 7.24), ("70B (Llama 3.1)", 70.55)):
        assert shape_of(memory_table.architecture_of(**memory_table.MODELS[name])).weights / 1e9 == pytest.approx(
            billions, abs=0.01
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_bytes_per_weight(tiny_folder, precision, optimizer):
    """The estimate equals the bytes of all tensors of an engine after a step; a shared storage counts once."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    policy = Policy("start", tiny_folder, content_id(tiny_folder))
    engine = SingleEngine(
        policy, dtype, CPU, EngineConfig.from_defaults(), OptimizerConfig.from_defaults(name=optimizer)
    )
    forward = Forward("packed", "chunked", 999, 64)
    engine.optimizer.step(engine.weights, engine.residuals, {}, 1e-3, 1.0)
    for passes in (1, 2):
        (batch,) = forward.batches(random_items(2))
        engine.backward(sequence_logps(engine.model, batch, forward).sum())
        states = [value for states in engine.optimizer.states.values() for value in states.values()]
        tensors = [*engine.weights.values(), *engine.residuals.values(), *engine.grads.values(), *states]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        numbers = sum(weight.numel() for weight in engine.weights.values())
        expected = memory.bytes_per_weight(replace(LOAD, precision=precision, optimizer=optimizer, passes=passes))
        assert sum(storages.values()) == pytest.approx(numbers * sum(expected.values()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_layer(dtype, checkpointing):
    """The estimate for a layer matches autograd's storage in two models that differ by two layers."""
    stored = []
    for layers in (2, 4):
        config = tf.LlamaConfig(
            **{**MEDIUM.to_dict(), "num_hidden_layers": layers, "hidden_size": 96, "vocab_size": 97}
        )
        model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        save_less_for_backward(model, checkpointing)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        forward = Forward("packed", "chunked", 512, 64)
        batch = next(forward.batches(random_items(60)))
        sizes = {}

        def record_storage(tensor, sizes=sizes, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
            logps = sequence_logps(model, batch, forward)
        stored.append(sum(sizes.values()))
        assert logps.requires_grad
    bytes_per_token = (stored[1] - stored[0]) / 2 / batch.input_ids.numel()
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    load = replace(LOAD, shape=shape_of(config), precision=precision, checkpointing=checkpointing)
    formula = memory._kept_by_layer(load)
    assert bytes_per_token == pytest.approx(formula, rel=0.1)


# --- the peak ---------------------------------------------------------------------------------------------------------

# Return freed memory to the system at once. Otherwise glibc keeps holes between small tensors, sometimes up to half of the
# peak if weights are rounded to 4 bits while they are loaded (docs/memory.md).
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def measure(
    folder: Path, vocabulary: int, load: Load, rank: int = 0, engine: dict | None = None
) -> list[dict[str, float]]:
    """Return the bytes that memory_worker.py measures in one process, or in each of several ranks."""
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={load.ranks}"] if load.ranks > 1 else []
    with tempfile.TemporaryDirectory() as tiny:
        make_tiny_model(Path(tiny))
        case = {
            "folder": str(folder),
            "tiny": tiny,
            "vocabulary": vocabulary,
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[load.precision],
            "rank": rank,
            "quantization": load.quantization or "none",
            "optimizer": load.optimizer,
            "checkpointing": load.checkpointing,
            "row": load.row,
            "tokens": load.training_tokens,
            "chunk": load.head_chunk,
            "passes": load.passes,
            "engine": engine or {},
        }
        process = subprocess.run(
            [sys.executable, *runner, "-m", "tests.engines.memory_worker", json.dumps(case)],
            cwd=ROOT,
            env={**os.environ, **AT_ONCE},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(results) == load.ranks, process.stdout
    return results


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
def test_measured_peak(medium, change, rank):
    """The estimate is near the peak. It is high for a small model, by the logits' gradients (fp32) or activations (LoRA)."""
    load = replace(
        LOAD,
        shape=shape_of(MEDIUM, rank),
        **change,
        passes=1,
        files=sum(path.stat().st_size for path in medium.glob("*.safetensors")),
    )
    expected = max(total(memory.training(load)), total(memory.loading(load)))
    peak = measure(medium, MEDIUM.vocab_size, load, rank)[0]["peak"]
    tolerance = 0.3 if load.precision == "fp32" or rank else 0.2
    assert expected == pytest.approx(peak, rel=tolerance), f"{expected / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"


RANKS = {
    "0": {"zero_stage": 0},
    "0, fp32": {"zero_stage": 0, "precision": "fp32"},
    "1": {"zero_stage": 1},
    "1, offload, adamw": {"zero_stage": 1, "offload": True, "optimizer": "adamw"},
    "2": {"zero_stage": 2},
    "2, fp32, two passes": {"zero_stage": 2, "precision": "fp32", "passes": 2},
    "3": {"zero_stage": 3},
    "3, offload": {"zero_stage": 3, "offload": True},
    "3, fp32, adamw, checkpointing": {
        "zero_stage": 3,
        "precision": "fp32",
        "optimizer": "adamw",
        "checkpointing": True,
    },
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=pytest.mark.slow if name != "3" else ()) for name, case in RANKS.items()]
)
def test_measured_peak_of_ranks(medium, case):
    """The estimate is near the peak of each of two ranks, which hold almost nothing after the engine is closed."""
    load = replace(LOAD, **{"passes": 1, **case}, ranks=2, on_cpu=True)
    expected = total(memory.training(load))
    engine = {"zero_stage": load.zero_stage, "offload_optimizer": load.offload}
    for result in measure(medium, MEDIUM.vocab_size, load, engine=engine):
        assert expected == pytest.approx(result["peak"], rel=0.2), f"{expected / 1e6:.0f} MB, measured {result}"
        assert result["left"] < 2.5 * load.shape.weights, result


@pytest.mark.slow
@pytest.mark.parametrize(("change", "rank"), CASES.values(), ids=CASES)
def test_measured_peak_of_the_embedded_model(change, rank, tmp_path):
    from spin.models.find import find_model

    config = load_config()
    folder = find_model(config.model, Path(config.cache.path)).folder
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    architecture = tf.AutoConfig.from_pretrained(folder)
    files = sum(path.stat().st_size for path in copy.glob("*.safetensors"))
    load = replace(
        LOAD,
        shape=shape_of(architecture, rank),
        passes=1,
        training_tokens=512,
        scoring_tokens=512,
        head_chunk=1024,
        files=files,
        **change,
    )
    expected = max(total(memory.training(load)), total(memory.loading(load)))
    peak = measure(copy, architecture.vocab_size, load, rank)[0]["peak"]
    assert expected == pytest.approx(peak, rel=0.2), f"{expected / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"


# --- the load of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("num_answers", [1, 3])
@pytest.mark.parametrize("tokens_per_batch", [256, 800, 10**6])
def test_load_of_a_run(tmp_path, layout, num_answers, tokens_per_batch):
    """The estimated load matches the batches of the examples with answers of the maximal length."""
    words = [f"cache.path={tmp_path}/cache", f"store.path={tmp_path}/store", f"generation.num_answers={num_answers}"]
    words += [f"engine.layout={layout}", f"engine.tokens_per_batch={tokens_per_batch}", "generation.batch_size=1000"]
    config = load_config("experiment=smoke", *words)
    run = prepare_run(config, tmp_path, Tracker(tmp_path, name="", config={}, rank=1))
    load = memory.load_of(LOAD.shape, config, run.data, run.start, run.device, run.dtype, run.ranks)
    new = (5,) * config.max_new_tokens
    train = [Continuations(e.prompt_ids, (e.real_ids, *num_answers * [new])) for e in run.data.train]
    held_out = [Continuations(e.prompt_ids, (e.real_ids, new, new)) for e in run.data.held_out]
    forward = Forward(layout, "chunked", tokens_per_batch, 64)

    def largest(items):
        return max(batch.input_ids.numel() for batch in forward.batches(items))

    step = sorted(train, key=lambda item: -largest([item]))[: config.schedule.batch_size]
    unlimited = tokens_per_batch == 10**6
    for tokens, count in (
        (load.scoring_tokens, max(map(largest, (train, held_out)))),
        (load.training_tokens, largest(step)),
    ):
        assert count <= tokens <= (1.5 * count if unlimited else max(count, tokens_per_batch))
    assert load.decoded == max(num_answers * len(train), len(held_out))


# --- messages ---------------------------------------------------------------------------------------------------------

SEVEN = memory_table.architecture_of(**memory_table.MODELS["7B (Mistral, Zephyr)"])
LARGE = replace(LOAD, shape=shape_of(SEVEN))


def device(free: float, total: float = 300) -> DeviceMemory:
    return DeviceMemory(free * GIB, total * GIB, 0.0)


def test_messages():
    [line] = check_memory(LARGE, device(200), SEVEN)
    assert line.startswith(
        f"memory needed: about {memory.peak(LARGE) / GIB:.1f} GiB (training: weights 13.5, masters 13.5, "
    )
    assert line.endswith("200.0 GiB free")
    line, warning = check_memory(LARGE, device(70), SEVEN)
    assert "that may not fit: set " in warning and "\n" not in warning
    with pytest.raises(UserError, match=r"and the device has 24\.0 GiB in all: set .*model\.adapter=lora") as error:
        check_memory(LARGE, device(23, 24), SEVEN)
    assert "\n" not in str(error.value)


def test_estimated_parts_only_warn():
    line, warning = check_memory(replace(LOAD, training_tokens=10**7), device(1, 1), MEDIUM)
    assert "may not fit" in warning and "memory needed" in line


def test_advice_order():
    """The advice prefers settings that keep finished stages, then the smallest change that computes them again."""
    load = replace(LARGE, training_tokens=4096)
    checkpointed = total(memory.training(replace(load, checkpointing=True))) / GIB
    text = advice(load, device(checkpointed + 1), SEVEN)
    assert text.startswith("set engine.gradient_checkpointing=true (then about ")
    assert text.endswith("; finished stages are kept)")
    text = advice(load, device(checkpointed - 1), SEVEN)
    assert text.startswith("set engine.gradient_checkpointing=true engine.tokens_per_batch=256 ")
    assert text.endswith("; all stages are computed again)")
    assert "gradient_checkpointing" not in advice(replace(load, checkpointing=True), device(60), SEVEN)
    assert "model.adapter=lora (" in advice(load, device(20), SEVEN)
    assert "model.adapter=lora model.quantization=nf4 (" in advice(load, device(8), SEVEN)
    assert advice(load, device(1), SEVEN).endswith("GiB: take a smaller model or more memory")
    many_answers = replace(LARGE, decoded=4096, trains=False)
    assert advice(many_answers, device(20), SEVEN).startswith("set generation.batch_size=8 (")
    few_tokens = replace(LARGE, decoded=8, training_tokens=256, scoring_tokens=256, trains=False)
    assert advice(few_tokens, device(1), SEVEN) == "take a smaller model or more memory"


def test_advice_for_several_ranks():
    load = replace(LARGE, ranks=8, zero_stage=2, checkpointing=True)
    text = advice(load, device(26), SEVEN)
    assert text.startswith("set engine.zero_stage=3 ") and text.endswith("; finished stages are kept)")
    assert "nf4" not in advice(load, device(1), SEVEN)


def test_smaller_settings_need_less():
    full = total(memory.training(LARGE))
    for change in ({"checkpointing": True}, {"training_tokens": 512}, {"optimizer": "rmsprop8bit"}, {"head_chunk": 64}):
        assert total(memory.training(replace(LARGE, **change))) < full, change
    assert total(memory.training(replace(LARGE, shape=shape_of(SEVEN, memory.RANK)))) < full
    assert total(memory.generating(replace(LARGE, decoded=4))) < total(memory.generating(LARGE))


def test_line_comes_before_weights_are_loaded(place):
    process = place.play("iter=0", "schedule.sft_epochs=0", "evaluation=none")
    lines = process.stdout.splitlines()
    (index,) = [i for i, line in enumerate(lines) if line.startswith("memory needed: about ")]
    assert "GiB free" in lines[index] and not any("iter 0" in line for line in lines[:index])
    repeated = place.play("iter=0", "schedule.sft_epochs=0", "evaluation=none")
    assert "memory needed" not in repeated.stdout  # nothing is loaded
    estimate = float(lines[index].split("about ")[1].split()[0])
    peak = json.loads((place.folder / "run" / "game.json").read_text())["peak_memory_gib"]
    assert estimate == pytest.approx(peak, abs=0.6)


@pytest.mark.parametrize("words", ["", "--ranks 8 --sizes 24 40 80"])
def test_table_in_the_docs(capsys, words):
    memory_table.main(words.split())
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs" / "memory.md").read_text()


def test_table_sizes(capsys):
    memory_table.main(["--sizes", "48"])
    assert capsys.readouterr().out.startswith("| model | 48 GiB |\n")
    with pytest.raises(SystemExit, match="error: --sizes and --ranks"):
        memory_table.main(["--sizes", "0"])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_release_free_memory():
    """Memory of small tensors, which glibc keeps while one of them is alive, is released."""
    script = """
import torch
from spin.engines.device_memory import resident_bytes, release_free_memory
tensors = [torch.ones(16_000) for _ in range(4_000)]  # 256 MB, each too small for a mapping of its own
last, most = torch.ones(16_000), resident_bytes()
del tensors
held = resident_bytes()
release_free_memory()
print(most - held, most - resident_bytes(), last.sum().item())
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    freed, released, _ = map(float, process.stdout.split())
    assert freed < 50e6 and released > 200e6


def test_free_memory_in_a_container(monkeypatch, tmp_path):
    """The limit of the control group counts, and cached files, which the system drops if needed, do not."""
    for name, text in {"max": "6e8", "current": "5e8", "stat": "anon 1\ninactive_file 400000000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(device_memory, "Path", lambda path: tmp_path / Path(path).name)
    memory = device_memory.free_memory(torch.device("cpu"))
    assert memory.total == 6e8 and memory.free - (memory.before - device_memory.LIBRARIES) == pytest.approx(5e8)
