"""Tests of save_less_for_backward: it keeps forward bits and gradients for every architecture, and other modules as is."""

import gc
import weakref

import pytest
import torch
import transformers as tf
from torch import nn

from spin.config.schema import EngineConfig, ModelConfig, OptimizerConfig
from spin.engines import activations
from spin.engines.activations import save_less_for_backward
from spin.engines.base import checkpoint_activations
from spin.engines.logps import Forward, choose_forward, reference_logps, sequence_logps
from spin.engines.single import SingleEngine
from spin.models.adapters import Lora
from spin.models.find import fresh_adapter
from spin.models.load import load_policy
from spin.models.policy import Policy, content_id
from tests.conftest import BODY, CONFIGS, SMALL, random_items, small_model

PACKED = Forward("packed", "chunked", 512, 16)
OTHERS = {"glm4": tf.Glm4Config(**SMALL, **BODY, head_dim=8)}
# Numbers of wrapped norms and feed-forward blocks.
WRAPPED = {
    **dict.fromkeys(["llama", "mistral", "mistral-short-window", "qwen2", "granite"], (7, 3)),
    "qwen3": (13, 3),
    "gemma2": (13, 3),
    "gemma3": (19, 3),
    "gpt2": (0, 0),
    "cohere": (0, 3),
    "falcon_h1": (7, 3),  # its multipliers are 1
    "glm4": (13, 0),
    # Models of two layers.
    **dict.fromkeys(["phi3", "gpt_oss", "mixtral"], (5, 0)),
    "olmo2": (9, 2),
    "gpt_neox": (0, 0),
    "cohere2": (0, 2),
    **dict.fromkeys(["mamba", "mamba2"], (3, 0)),  # the gated norms are unchanged
    "qwen3_next": (7, 2),  # the shared experts
    "lfm2": (7, 0),
    "qwen3_moe": (9, 0),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Tensors are processed in several pieces, the last of which is smaller."""
    monkeypatch.setitem(activations.PIECE, "cpu", 32 * 37)


def model_of(name: str, dtype: torch.dtype) -> tf.PreTrainedModel:
    if name in CONFIGS:
        return small_model(name, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(OTHERS[name], dtype=dtype).eval()


def perturb_norms(model: nn.Module) -> None:
    """Add noise to the weights of norms (and to biases), which otherwise are all equal."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += torch.randn(weight.shape, generator=generator).to(weight.dtype) / 10


def gradients(model: tf.PreTrainedModel, forward: Forward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = next(forward.batches(random_items(12, longest=16)))
    logps = sequence_logps(model, batch, forward)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_same_logps_and_gradients(name, dtype):
    plain, lean = model_of(name, dtype), model_of(name, dtype)
    forward, _ = choose_forward(plain, random_items(3), "auto", 512, 16, longest=64)
    for model in (plain, lean):
        perturb_norms(model)
    save_less_for_backward(lean)
    wrapped = [module.forward for module in lean.modules() if "forward" in vars(module)]
    counts = [sum(call.func is kind for call in wrapped) for kind in (activations._norm, activations._feed_forward)]
    assert tuple(counts) == WRAPPED[name]

    expected, grads = gradients(plain, forward)
    logps, lean_grads = gradients(lean, forward)
    assert torch.equal(logps, expected)
    assert lean_grads.keys() == grads.keys()
    for key, grad in lean_grads.items():
        error = (grad.double() - grads[key].double()).norm() / grads[key].double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_float64(dtype):
    """The gradients are as close to those in float64 as PyTorch's own gradients."""
    exact = model_of("llama", torch.float64)
    perturb_norms(exact)
    exact.to(dtype).double()  # the rounded weights
    _, grads = gradients(exact, PACKED)
    errors = {}
    for lean in (False, True):
        model = model_of("llama", torch.float64)
        perturb_norms(model)
        model.to(dtype)
        if lean:
            save_less_for_backward(model)
        _, rounded_grads = gradients(model, PACKED)
        errors[lean] = {
            key: (grad.double() - grads[key]).norm() / grads[key].norm() for key, grad in rounded_grads.items()
        }
    assert all(errors[True][key] <= 1.2 * errors[False][key] + 1e-7 for key in grads)


def stored_bytes(model: tf.PreTrainedModel) -> int:
    """Return the bytes that autograd stores between forward and backward."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes = {}

    def record_storage(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        logps = sequence_logps(model, next(PACKED.batches(random_items(40))), PACKED)
    assert logps.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_less_memory_stored(name, dtype):
    before = stored_bytes(model_of(name, dtype))
    lean = model_of(name, dtype)
    save_less_for_backward(lean)
    assert stored_bytes(lean) < 0.75 * before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_layers_store_no_factors(checkpointing):
    _, grads = gradients(model_of("llama", torch.float32), PACKED)
    model = model_of("llama", torch.float32)
    if checkpointing:
        checkpoint_activations(model)
    save_less_for_backward(model, checkpointing)
    factors: list[weakref.ref] = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, inputs, result: factors.append(weakref.ref(result)))
    batch = next(PACKED.batches(random_items(12, longest=16)))
    logps = sequence_logps(model, batch, PACKED)
    gc.collect()
    assert [factor() is None for factor in factors] == [checkpointing] * 3
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_adapters_on_quantized_weights(tmp_path, quantization):
    small_model("llama").save_pretrained(tmp_path / "model")
    base = Policy("start", tmp_path / "model", content_id(tmp_path / "model"))
    base = Policy("start", base.folder, base.id, quantization=None if quantization == "none" else quantization)
    lora = Lora(rank=4, alpha=8, targets="all-linear")
    policy = fresh_adapter(base, lora, 0, ModelConfig.from_defaults(path=str(base.folder)), tmp_path / "adapter")
    results = []
    for lean in (False, True):
        model = load_policy(policy, torch.float32, torch.device("cpu"))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                weight.data = torch.randn(weight.shape, generator=generator) / 10
                weight.requires_grad_(True)
        if lean:
            save_less_for_backward(model)
            wrapped = [module.forward.func for module in model.modules() if "forward" in vars(module)]
            assert wrapped.count(activations._feed_forward) == 3
        results.append(gradients(model, PACKED))
    (expected, grads), (logps, lean_grads) = results
    assert (
        torch.equal(logps, expected) and lean_grads.keys() == grads.keys() and all("lora_" in key for key in lean_grads)
    )
    assert all(torch.allclose(lean_grads[key], grads[key], rtol=1e-4, atol=1e-5) for key in lean_grads)


def test_engine_wraps_model(tiny_folder):
    policy = Policy("start", tiny_folder, "x")
    for checkpointing in (False, True):
        settings = EngineConfig.from_defaults(gradient_checkpointing=checkpointing)
        engine = SingleEngine(policy, torch.float32, torch.device("cpu"), settings, OptimizerConfig.from_defaults())
        wrapped = [module.forward for module in engine.model.modules() if "forward" in vars(module)]
        recomputed = [call.args[1] for call in wrapped if call.func is activations._feed_forward]
        assert recomputed == [not checkpointing] * 2
        assert len(wrapped) == 7
        engine.close()


def test_wrapped_model_freed_without_collector():
    """A wrapped model is freed without the garbage collector, since no reference cycle keeps its weights alive."""
    model = small_model("llama")
    save_less_for_backward(model)
    gradients(model, PACKED)
    parts = [weakref.ref(model.model.norm), weakref.ref(model.model.layers[0].mlp.up_proj.weight)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()


class Doubled(nn.Module):
    """A feed-forward block with the attributes of a gated one but a different forward."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = part.gate_proj, part.up_proj, part.down_proj
        self.act_fn = part.act_fn

    def forward(self, states):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


class Scaled(nn.Module):
    """An activation function with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, gate):
        return nn.functional.silu(gate * self.scale)


def test_trained_activation_function():
    results = []
    for lean in (False, True):
        model = small_model("llama")
        for layer in model.model.layers:
            layer.mlp.act_fn = Scaled()
        if lean:
            save_less_for_backward(model)
            assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
        results.append(gradients(model, PACKED))
    (expected, grads), (logps, lean_grads) = results
    assert torch.equal(logps, expected) and "model.layers.2.mlp.act_fn.scale" in lean_grads
    assert all(torch.allclose(lean_grads[key], grads[key], rtol=1e-4, atol=1e-5) for key in grads)


def test_other_feed_forward_unchanged():
    model = small_model("llama")
    for layer in model.model.layers:
        layer.mlp = Doubled(layer.mlp)
    item = random_items(1)[0]
    before = torch.cat(reference_logps(model, item))
    save_less_for_backward(model)
    assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)
    assert torch.equal(torch.cat(reference_logps(model, item)), before)


def test_gated_norm_uses_own_forward():
    class GatedRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, states, gate=None):
            return self.weight * (states if gate is None else states * gate)

    norm = GatedRMSNorm()
    save_less_for_backward(norm)
    states, gate = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.equal(norm(states, gate), states * gate)
    assert torch.equal(norm(states), states)
