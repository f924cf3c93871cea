"""Tests of 4-bit base models and 8-bit optimiser states, with bitsandbytes on the CPU."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from spin.config.schema import EngineConfig, ModelConfig, OptimizerConfig
from spin.engines.eight_bit import EightBit
from spin.engines.logps import compute_logps, sequence_logps
from spin.engines.memory import NF4
from spin.engines.optimizers import state_values_per_weight
from spin.engines.single import SingleEngine
from spin.models import adapters
from spin.models.find import find_model, fresh_adapter
from spin.models.load import load_model, load_policy
from spin.models.policy import with_quantization
from tests.conftest import random_items
from tests.games import Place
from tests.models.test_adapters import CPU, LORA, PACKED, adapted, base_or_self, train

WORDS = ["model.adapter=lora", "model.quantization=nf4", "model.merge=true", "iter=0"]
# Dettmers et al., arXiv 2305.14314, appendix E: the 16 values of 4-bit NormalFloat.
LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("nf4"), games)
    place.first = place.play(*WORDS)
    return place


def quantize_naively(weight: torch.Tensor) -> torch.Tensor:
    """Round to the nearest level in blocks of 64, with scales in full precision."""
    blocks = weight.flatten().view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(LEVELS).abs().argmin(-1)
    return (LEVELS[nearest] * scale).view_as(weight)


def test_nf4_levels(tiny_folder):
    rounded = load_model(tiny_folder, torch.float32, CPU, "nf4").dequantize()
    exact = load_model(tiny_folder, torch.float32, CPU)
    for name, weight in exact.named_parameters():
        quantized = rounded.get_parameter(name)
        if "proj" not in name:  # norms, and embeddings tied to the output layer, are not quantized
            assert torch.equal(quantized, weight), name
            continue
        scale = weight.flatten().view(-1, 64).abs().amax(1)
        # The scales are quantized to 8 bits, relative to the largest of 256.
        error = (quantized - quantize_naively(weight)).abs().max() / scale.max()
        assert error < 0.02 and (quantized - weight).abs().mean() > 0.01 * weight.abs().mean(), name


def test_nf4_size_matches_estimate(tiny_folder):
    model = load_model(tiny_folder, torch.bfloat16, CPU, "nf4")
    stored = sum(
        weight.numel() * weight.element_size()
        + sum(
            t.numel() * t.element_size() for t in weight.quant_state.as_dict(packed=True).values() if torch.is_tensor(t)
        )
        for weight in model.parameters()
        if hasattr(weight, "quant_state")
    )
    numbers = sum(
        w.numel() for name, w in load_model(tiny_folder, torch.float32, CPU).named_parameters() if "proj" in name
    )
    maps = 14 * (16 + 256) * 4 + 14 * 200  # levels and JSON header of each of 14 layers
    assert stored - maps == pytest.approx(NF4 * numbers, rel=0.1)


def test_nf4_game_starts_at_opponent(played):
    firsts = [row for row in played.metrics() if row["stage"] == "train" and row["step"] == 0]
    assert len(firsts) == 1 and firsts[0]["loss"] == pytest.approx(0.6931, abs=0.01)
    metadata = json.loads((played.folder / "run/iter0/policy/base.json").read_text())
    assert metadata["quantization"] == "nf4"
    assert load_file(played.folder / "run/iter0/policy/adapter_model.safetensors")
    assert not list((played.folder / "store").glob("train/*/policy/model.safetensors"))


def test_policy_opens_on_its_quantized_base(played):
    words = ["stage=evaluate", f"model.path={played.folder}/run/sft/policy"]
    before = played.stages()
    assert "evaluate sft/policy: reused" in played.play(*words, run="measured").stdout
    assert played.stages() == before


def test_merged_model_same_logits(played):
    policy = find_model(ModelConfig.from_defaults(path=f"{played.folder}/run/iter0/policy"), played.folder / "cache")
    assert policy.base.quantization == "nf4"
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        adapted = load_policy(policy, torch.float32, CPU)(ids).logits
        merged = load_model(played.folder / "run/iter0/merged", torch.float32, CPU)
        assert (merged(ids).logits - adapted).abs().max() < 0.01 * adapted.abs().max()
    assert merged.dtype == torch.float32 and getattr(merged.config, "quantization_config", None) is None
    unquantized = load_model(policy.base.folder, torch.float32, CPU)
    with torch.no_grad():
        assert (unquantized(ids).logits - adapted).abs().max() > 0.05


def test_quantization_changes_model_id(tiny_folder):
    assert with_quantization(base_or_self(tiny_folder), "nf4").id != base_or_self(tiny_folder).id
    assert with_quantization(base_or_self(tiny_folder), "none") == base_or_self(tiny_folder)


def states_of(optimizer, key):
    if isinstance(optimizer, EightBit):
        return optimizer.optimizers[key].state[optimizer.parameters[key]]
    return optimizer.states[key]


@pytest.mark.parametrize(("name", "fp32_name"), [("rmsprop8bit", "rmsprop"), ("adamw8bit", "adamw")])
def test_eight_bit_states_size_and_step(tiny_folder, name, fp32_name):
    changes, bytes_per_weight = [], []
    for optimizer_name in (fp32_name, name):
        engine = SingleEngine(
            base_or_self(tiny_folder),
            torch.float32,
            CPU,
            EngineConfig.from_defaults(),
            OptimizerConfig.from_defaults(name=optimizer_name),
        )
        before = {key: master.clone() for key, master in engine.masters.items()}
        train(engine, batch_size=5)
        changes.append(torch.cat([(engine.masters[key] - before[key]).flatten() for key in before]))
        large = {
            key: master for key, master in engine.masters.items() if master.numel() >= 4096
        }  # smaller ones keep fp32 states
        states = [states_of(engine.optimizer, key) for key in large]
        tensors = [
            t for state in states for key, t in state.items() if torch.is_tensor(t) and "qmap" not in key and t.ndim
        ]
        bytes_per_weight.append(
            sum(t.numel() * t.element_size() for t in tensors) / sum(master.numel() for master in large.values())
        )
    assert bytes_per_weight[0] == 4 * state_values_per_weight(fp32_name, "fp32")
    assert bytes_per_weight[1] == pytest.approx(4 * state_values_per_weight(name, "fp32"), rel=0.02)
    similar = torch.nn.functional.cosine_similarity(changes[0], changes[1], dim=0)
    assert similar > 0.9 and changes[1].abs().mean() == pytest.approx(changes[0].abs().mean().item(), rel=0.2)


@pytest.mark.parametrize("name", ["rmsprop8bit", "adamw8bit"])
def test_eight_bit_resume_same_bits(tiny_folder, tmp_path, name):
    def engine():
        return SingleEngine(
            base_or_self(tiny_folder),
            torch.bfloat16,
            CPU,
            EngineConfig.from_defaults(),
            OptimizerConfig.from_defaults(name=name),
        )

    def step(trained):
        for number, (key, weight) in enumerate(trained.weights.items()):
            generator = torch.Generator().manual_seed(number)
            trained.grads[key] = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        trained.step(1e-3)

    straight, cut = engine(), engine()
    for trained in (straight, cut):
        step(trained)
    cut.save_state(tmp_path)
    resumed = engine()
    resumed.load_state(tmp_path)
    for trained in (straight, resumed):
        step(trained)
        step(trained)
    start = engine().masters
    assert not any(torch.equal(straight.masters[key], start[key]) for key in start)
    assert all(torch.equal(straight.masters[key], resumed.masters[key]) for key in straight.masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_quantized_layers(tiny_folder, tmp_path, dtype, checkpointing):
    """Gradients match those of the same weights dequantized to fp32, after a pass without gradients as in a game."""
    policy = adapted(tiny_folder, tmp_path / "policy")
    policy = replace(policy, base=with_quantization(policy.base, "nf4"))
    engine = SingleEngine(
        policy,
        dtype,
        CPU,
        EngineConfig.from_defaults(gradient_checkpointing=checkpointing),
        OptimizerConfig.from_defaults(),
    )
    items = random_items(6)
    compute_logps(engine.model, items, PACKED)
    full = adapters.attach_adapter(load_model(tiny_folder, dtype, CPU, "nf4").dequantize().float(), policy.folder)
    trained = {name: w.requires_grad_(True) for name, w in full.named_parameters() if "lora_" in name}
    for batch in PACKED.batches(items):
        engine.backward(sequence_logps(engine.model, batch, PACKED).sum())
        sequence_logps(full, batch, PACKED).sum().backward()
    for name, weight in trained.items():  # gradients of the first layer passed through all others
        error = (engine.grads[name] - weight.grad).norm() / weight.grad.norm()
        assert error < {torch.float32: 0.01, torch.bfloat16: 0.1}[dtype], name


def test_adapter_on_nf4_trains(tiny_folder, tmp_path):
    start = with_quantization(base_or_self(tiny_folder), "nf4")
    policy = fresh_adapter(start, LORA, 0, ModelConfig.from_defaults(path=str(tiny_folder)), tmp_path / "policy")
    options, optimizer = (
        EngineConfig.from_defaults(gradient_checkpointing=True),
        OptimizerConfig.from_defaults(name="rmsprop8bit"),
    )
    engine = SingleEngine(policy, torch.bfloat16, CPU, options, optimizer)
    rows = []
    train(engine, log=rows.append, epochs=8, lr=3e-3)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=0.02)
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.2
