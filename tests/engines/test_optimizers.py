"""Tests of the optimisers: updates against PyTorch's own, residual bits, and stochastic rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spin.config.schema import OptimizerConfig
from spin.engines.optimizers import PIECE, Optimizer, combine, residual_bits, round_stochastically

REFERENCE = {
    "rmsprop": lambda w: torch.optim.RMSprop(w, lr=1e-3, alpha=0.9, eps=1e-6, weight_decay=0.1),
    "adamw": lambda w: torch.optim.AdamW(w, lr=1e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
}


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    large = PIECE["cpu"] + 77  # more than one piece
    return {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(large, generator=generator)}


def optimizer(name, shaped, **settings):
    return Optimizer(
        OptimizerConfig.from_defaults(name=name, alpha=0.9, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.1, **settings),
        shaped,
    )


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", REFERENCE)
def test_updates_equal_pytorch(name, halves):
    """Updates in pieces, also of bf16 weights with residual bits, equal PyTorch's updates of complete fp32 tensors."""
    expected, start = weights(), weights()
    reference = REFERENCE[name](list(expected.values()))
    rounded = {k: w.bfloat16() for k, w in start.items()} if halves else start
    residuals = {k: residual_bits(start[k], w) for k, w in rounded.items()} if halves else {}
    ours = optimizer(name, rounded)
    for step in range(3):
        generator = torch.Generator().manual_seed(step + 1)
        grads = {k: torch.randn(w.shape, generator=generator) for k, w in expected.items()}
        for k, w in expected.items():
            w.grad = 0.5 * grads[k]
        reference.step()
        ours.step(rounded, residuals, grads, lr=1e-3, scale=0.5)
    for k, w in expected.items():
        master = combine(rounded[k], residuals[k]) if halves else start[k]
        difference = (master.view(torch.int32) - w.view(torch.int32)).abs()
        assert difference.max() <= (3 if halves else 0)  # a tie is off by one in the last bit
        assert (difference == 0).float().mean() > 0.999
        if halves:
            assert torch.equal(rounded[k], w.bfloat16())


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_residual_bits_restore_master(value):
    master = torch.tensor([value])
    rounded = master.bfloat16()
    if not rounded.isfinite().all():
        return  # beyond bf16's largest number
    restored = combine(rounded, residual_bits(master, rounded))
    difference = (restored.view(torch.int32) - master.view(torch.int32)).abs().item()
    tie = master.view(torch.int32).item() & 0xFFFF == 0x8000
    assert difference == 0 or (tie and difference == 1)


def test_stochastic_rounding_keeps_mean():
    value = torch.full((200_000,), 1.0 + 2**-10)  # a quarter of bf16's last bit
    mean = round_stochastically(value, torch.Generator().manual_seed(0)).double().mean().item()
    assert mean == pytest.approx(1 + 2**-10, abs=5e-5)
    grads, shaped = {"a": torch.full((4096,), 0.1)}, {"a": torch.zeros(4096)}
    bf16 = optimizer("adamw", shaped, states="bf16")
    fp32 = optimizer("adamw", {"a": torch.zeros(4096)})
    for _ in range(40):
        bf16.step(shaped, {}, grads, 1e-4, 1.0)
        fp32.step({"a": torch.zeros(4096)}, {}, grads, 1e-4, 1.0)
    assert bf16.states["a"]["exp_avg_sq"].dtype == torch.bfloat16
    for state in ("exp_avg", "exp_avg_sq"):
        bf16_mean, fp32_mean = (o.states["a"][state].double().mean().item() for o in (bf16, fp32))
        assert bf16_mean == pytest.approx(fp32_mean, rel=2e-3)


def test_rounding_noise_differs_between_tensors():
    """Equal tensors with equal gradients round differently, and a repeated run rounds them the same."""
    results = []
    for _ in range(2):
        shaped = {name: torch.zeros(4096) for name in ("a", "b")}
        ours = optimizer("rmsprop", shaped, states="bf16")
        ours.step(shaped, {}, {name: torch.linspace(0.1, 0.2, 4096) for name in shaped}, 1e-3, 1.0)
        results.append({name: ours.states[name]["square_avg"].clone() for name in shaped})
    first, second = results
    # With independent noise about a third of the rounded values differ.
    assert (first["a"] != first["b"]).float().mean() > 0.2
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_resume_same_bits(states, tmp_path):
    results = []
    for cut in (False, True):
        shaped = weights()
        ours = optimizer("adamw", shaped, states=states)
        for step in range(4):
            if cut and step == 2:
                ours.save(tmp_path / "states")
                ours = optimizer("adamw", shaped, states=states)
                ours.load(tmp_path / "states")
            ours.step(shaped, {}, {k: w.cos() for k, w in shaped.items()}, 1e-2, 1.0)
        own_states = {
            f"{k}.{state}": value for k, states_of in ours.states.items() for state, value in states_of.items()
        }
        results.append({**shaped, **own_states})
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
