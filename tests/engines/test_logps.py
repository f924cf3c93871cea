"""Tests of log-probs in every layout against a naive float64 loop and the models' own forward, for many architectures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from spin.engines import attention
from spin.engines import head as head_module
from spin.engines.flex import block_mask
from spin.engines.head import ResponseHead
from spin.engines.logps import Forward, choose_forward, compute_logps, sequence_logps
from spin.engines.packing import Continuations
from spin.runtime.errors import UserError
from tests.conftest import BODY, CONFIGS, SMALL, random_items, small_model

PACKED = Forward("packed", "chunked", tokens_per_batch=128, head_chunk=7)
LAYOUTS = ["packed", "padded"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The output layer processes positions in blocks: two in the gradcheck, several in other tests."""
    monkeypatch.setitem(head_module.BLOCK, "cpu", 3)


def naive_logps(model, items: list[Continuations]) -> torch.Tensor:
    """Compute log-probs token by token in float64, one sequence at a time: without masks, batches and shifts by slicing."""
    sums = []
    for item in items:
        for response in item.responses:
            ids = [*item.prompt_ids, *response]
            logits = model(torch.tensor([ids])).logits[0].detach().double()
            total = 0.0
            for position in range(len(item.prompt_ids), len(ids)):
                row = logits[position - 1]
                total += (row[ids[position]] - row.exp().sum().log()).item()
            sums.append(total)
    return torch.tensor(sums)


@pytest.mark.parametrize("name", CONFIGS)
def test_logps_match_float64_loop(name):
    model, items = small_model(name), random_items(9)
    forward, _ = choose_forward(model, items, "auto", 128, 7, longest=64)
    expected = naive_logps(model, items)
    assert torch.allclose(compute_logps(model, items, forward), expected, atol=1e-3, rtol=0)
    assert expected.std() > 5  # the sequences differ by far more than the tolerance


PACKABLE = """
    llama mistral mistral-short-window qwen2 qwen3 gpt2 granite cohere gemma3 phi3 olmo2 gpt_neox cohere2 mixtral qwen3_moe
""".split()


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_layout_chosen(name):
    forward, remark = choose_forward(small_model(name), random_items(4), "auto", 128, 7, longest=64)
    assert (forward.layout, forward.head, remark) == ("packed", "chunked", None)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - set(PACKABLE)))
def test_unpackable_models_padded(name):
    """Models with attention sinks, soft caps or a recurrent state use padded rows."""
    model, items = small_model(name), random_items(6)
    forward, remark = choose_forward(model, items, "auto", 128, 7, longest=64)
    assert (forward.layout, forward.head) == ("padded", "chunked") and remark


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_fp32_hidden_states_in_bf16(name):
    """The chunked head supports Mamba, whose residual stream is fp32 and whose output layer is bf16."""
    model, items = small_model(name, torch.bfloat16), random_items(4)
    forward, _ = choose_forward(model, items, "auto", 128, 7, longest=64)
    assert forward.head == "chunked"


@pytest.mark.parametrize("prompt", [30, 60])
def test_prompts_longer_than_the_window(prompt):
    items = [Continuations(tuple(range(2, 2 + prompt)), ((5, 6), (7, 8, 9))) for _ in range(2)]
    forward, _ = choose_forward(small_model("mistral-short-window"), items, "auto", 128, 7, longest=70)
    assert forward.layout == "packed"


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_short_window_packed_exact(name):
    """Packed rows are exact with a short window, also if only some layers have one, as in Gemma 3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = type(CONFIGS[name])(**SMALL, **BODY, head_dim=8, sliding_window=8)
        model = tf.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data.mul_(20 if weight.ndim > 1 else 1)
    items = random_items(6)
    expected = naive_logps(model, items)
    assert torch.allclose(compute_logps(model, items, PACKED), expected, atol=1e-3, rtol=0)


def test_wrong_layout_refused(monkeypatch):
    """Packed rows are refused if the attention ignores the window; without the check they would differ silently."""
    monkeypatch.setattr(attention, "_causal", lambda query, window: {"is_causal": True})
    model, items = small_model("mistral-short-window"), random_items(4)
    with pytest.raises(UserError, match=r"packed rows .* differs from the model's own forward"):
        choose_forward(model, items, "packed", 128, 7, longest=64)
    forward, remark = choose_forward(model, items, "auto", 128, 7, longest=64)
    assert forward.layout == "padded" and "differs from the model's own forward" in remark


@pytest.mark.parametrize("tokens_per_batch", [16, 80, 128, 400])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_budget_keeps_logps(layout, tokens_per_batch):
    model, items = small_model("llama"), random_items(12, responses=3)
    forward = Forward(layout, "chunked", tokens_per_batch, 5)
    assert torch.allclose(compute_logps(model, items, forward), naive_logps(model, items), atol=1e-4, rtol=0)


def test_scoring_without_dropout(tiny_folder):
    from spin.models.load import load_model

    model = load_model(tiny_folder, torch.float32, torch.device("cpu"))
    assert not model.training
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    items = random_items(3)
    assert torch.equal(compute_logps(model, items, PACKED), compute_logps(model, items, PACKED))


def test_fp32_log_softmax_in_bf16():
    """The sums are those of fp32 log-softmax over the bf16 logits; a bf16 softmax would be off by whole nats."""
    model, items = small_model("llama", torch.bfloat16), random_items(6, longest=40)
    rounded = sum_of(items, lambda ids: model(ids).logits.log_softmax(-1))
    exact = sum_of(items, lambda ids: model(ids).logits.double().log_softmax(-1))
    logps = compute_logps(model, items, Forward("padded", "chunked", 64, 7)).double()
    assert (logps - exact).abs().mean() < (rounded - exact).abs().mean()


def sum_of(items, log_softmax):
    result = []
    for item in items:
        for response in item.responses:
            ids = torch.tensor([[*item.prompt_ids, *response]])
            table = log_softmax(ids)[0, len(item.prompt_ids) - 1 : -1].double()
            result.append(table.gather(1, ids[0, len(item.prompt_ids) :, None]).sum())
    return torch.stack(result).detach()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_match_plain_forward(name, layout):
    if name == "gemma2":
        layout = "padded"  # eager attention, and a window shorter than the rows
    model, items = small_model(name), random_items(5)
    weights = torch.randn(10, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    total = 0.0
    for k, (item, response) in enumerate((i, r) for i in items for r in i.responses):
        ids = torch.tensor([[*item.prompt_ids, *response]])
        logps = model(ids).logits[0, len(item.prompt_ids) - 1 : -1].log_softmax(-1)
        total = total + weights[k] * logps.gather(1, torch.tensor(response)[:, None]).sum()
    total.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    forward = Forward(layout, "chunked", 128, 7)
    for batch in forward.batches(items):
        indices = torch.tensor([2 * i + k for i in batch.items for k in range(2)])
        (sequence_logps(model, batch, forward) * weights[indices]).sum().backward()
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[n], atol=2e-4, rtol=1e-3), n


def test_response_head_gradcheck():
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (9, 4), (9,)))
    target = torch.tensor([0, 8, 3, 3, 1])

    def head(h, w, b):
        return ResponseHead.apply(h, w, b, target, 0.7, 3.0, 2)

    # The head computes in fp32 from the logits on, so the check has the precision of fp32.
    assert torch.autograd.gradcheck(head, (hidden, weight, bias), eps=1e-3, atol=1e-2, rtol=1e-2)


def test_response_positions():
    items = random_items(7, responses=2)
    for layout in LAYOUTS:
        batched_items = []
        for batch in Forward(layout, "chunked", 100, 64).batches(items):
            assert batch.input_ids.numel() <= 100 or len(batch.items) == 1
            ids = batch.input_ids.flatten()
            for k in range(batch.responses):
                item, response = items[batch.items[k // 2]], items[batch.items[k // 2]].responses[k % 2]
                is_own = batch.sequence == k
                assert tuple(batch.target[is_own].tolist()) == response
                assert (
                    ids[batch.source[is_own][0]] == item.prompt_ids[-1]
                )  # the shift: the prompt's end predicts the first
            batched_items += batch.items
        assert sorted(batched_items) == list(range(7))


@pytest.mark.parametrize(("head", "at_least", "at_most"), [("chunked", 0, 120), ("full", 180, 4000)])
def test_head_peak_memory(head, at_least, at_most):
    """The chunked head's measured peak is less than 1,500 response tokens times 40,000 words, 229 MiB of fp32 logits. The
    peak counter is reset before the step."""
    script = rf"""
import re, sys, torch, transformers as tf
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from spin.runtime.errors import UserError
from spin.engines.logps import Forward, sequence_logps
from spin.engines.packing import Continuations
torch.set_num_threads(1)
config = tf.LlamaConfig(vocab_size=40000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
model = tf.AutoModelForCausalLM.from_config(config)
items = [Continuations((1, 2), (tuple(range(3, 378)), tuple(range(400, 775)))) for _ in range(2)]
forward = Forward("padded", {head!r}, 2000, 16)
(batch,) = forward.batches(items)
def held(key): return int(re.search(key + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
small = next(forward.batches([Continuations((1,), ((2, 3),))]))
sequence_logps(model, small, forward).sum().backward()
before = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
sequence_logps(model, batch, forward).sum().backward()
print(held("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert at_least <= float(done.stdout) <= at_most


def test_window_checked_against_longest_item(monkeypatch):
    """The layout is checked with an item of the maximal length, because the sample may fit into the window."""
    config = tf.MistralConfig(**{**SMALL, **BODY}, sliding_window=64)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setattr(attention, "_causal", lambda query, window: {"is_causal": True})
    with pytest.raises(UserError, match="differs from the model's own forward"):
        choose_forward(model, random_items(4), "packed", 96, 7, longest=170)
    monkeypatch.undo()
    forward, _ = choose_forward(model, random_items(4), "auto", 96, 7, longest=170)
    assert forward.layout == "packed"
    items = random_items(3, longest=80)
    assert torch.allclose(compute_logps(model, items, forward), naive_logps(model, items), atol=1e-3, rtol=0)


def test_packed_row_size():
    items = random_items(20, responses=2)
    for batch in Forward("packed", "chunked", 200, 64).batches(items):
        assert batch.input_ids.shape == (1, batch.tokens) and batch.tokens <= 200
        assert batch.attention_mask.numel() == 3 * len(batch.items)
        assert batch.tokens == sum(items[i].tokens for i in batch.items)


@pytest.mark.parametrize("padding", [0, 40])
def test_block_mask_against_rule(padding):
    """FlexAttention's mask equals the rule that is written out here; no block with an allowed pair is missing."""
    items = random_items(12, responses=2)
    (batch,) = Forward("packed", "chunked", 999, 64).batches(items)
    total = batch.tokens + padding
    owner = [
        (i, b) for i in batch.items for b, ids in enumerate((items[i].prompt_ids, *items[i].responses)) for _ in ids
    ]
    mask = block_mask(batch.attention_mask, total)
    blocks = mask.to_dense()[0, 0]
    positions = torch.arange(total)
    may_attend = mask.mask_mod(0, 0, positions[:, None], positions)
    for q in range(total):
        for k in range(total):
            if q < batch.tokens and k < batch.tokens:
                allowed = k <= q and owner[k][0] == owner[q][0] and owner[k][1] in (0, owner[q][1])
            else:
                allowed = q == k  # padding attends to itself only
            assert bool(may_attend[q, k]) == allowed
            assert blocks[q // 128, k // 128] or not allowed
    assert blocks.sum() < blocks.numel()


def test_flex_attention_matches_sequences(monkeypatch):
    """FlexAttention, uncompiled on a CPU but with the mask and the call of a GPU, equals attention per sequence."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    from spin.engines.attention import packed_attention

    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    (batch,) = Forward("packed", "chunked", 999, 64).batches(random_items(4, responses=2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        query, key, value = (torch.randn(1, heads, batch.tokens, 16) for heads in (4, 2, 2))
    table = batch.attention_mask
    expected, _ = packed_attention(module, query, key, value, table, scaling=0.25)
    actual, _ = packed_attention(module, query, key, value, block_mask(table, batch.tokens), scaling=0.25)
    assert torch.allclose(actual, expected, atol=1e-5)
