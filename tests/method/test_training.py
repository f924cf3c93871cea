"""Training compared with a naive float64 step, and edge cases of the training loop."""

import gc
import hashlib
import json
import weakref

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from spin.config.schema import EngineConfig, LossConfig, OptimizerConfig
from spin.engines.logps import Forward, compute_logps, sequence_logps
from spin.engines.single import SingleEngine
from spin.method.objectives import make_objective
from spin.method.pairs import Pair, group_by_prompt, split_responses, to_continuations
from spin.method.training import check_first_step, fit, learning_rate_factor, train_sft, train_spin
from spin.models.load import load_model, saved_buffers
from spin.models.policy import Policy, content_id
from spin.runtime.checkpoints import Checkpoints
from spin.runtime.errors import UserError
from tests.conftest import BODY, SMALL, random_items
from tests.method.test_objectives import NAIVE

PACKED = Forward("packed", "chunked", 128, 16)
PADDED = Forward("padded", "chunked", 64, 16)
CPU = torch.device("cpu")


def policy_of(folder) -> Policy:
    return Policy("start", folder, content_id(folder))


def engine_of(folder, dtype=torch.float32, **optimizer) -> SingleEngine:
    return SingleEngine(
        policy_of(folder), dtype, CPU, EngineConfig.from_defaults(), OptimizerConfig.from_defaults(**optimizer)
    )


def pairs_of(count=10) -> list[Pair]:
    items = random_items(count, seed=5, longest=30)
    return [Pair(f"p{i}", "", "", "", "stop", item.prompt_ids, *item.responses) for i, item in enumerate(items)]


def score(folder, pairs, forward=PACKED, dtype=torch.float32) -> dict:
    """Return references for `train_spin`: the pairs' log-probs under the opponent in `folder`."""
    values = compute_logps(load_model(folder, dtype, CPU), to_continuations(pairs), forward)
    return {"opponent": split_responses(values, [len(group) for group in group_by_prompt(pairs)])}


def train(engine, pairs, forward=PACKED, references=None, log=lambda row: None, loss=None, **settings):
    """Call `train_spin`, by default with references from the engine's initial policy."""
    references = references or score(engine.policy.folder, pairs, forward, engine.dtype)
    objective = make_objective(LossConfig.from_defaults(**{"beta": 0.1, **(loss or {})}), 0)
    return train_spin(engine, pairs, references, objective, forward, log=log, **{**SETTINGS, **settings})


SETTINGS = dict(lr=1e-3, epochs=1, batch_size=100, warmup_ratio=0.0, seed=0)


def test_step_equals_naive_float64(tiny_folder):
    """One step equals plain float64 arithmetic: log-probs, loss, mean over pairs, clipping, RMSprop."""
    pairs = pairs_of()
    engine = engine_of(tiny_folder, max_grad_norm=0.5)
    rows = []
    train(engine, pairs, log=rows.append, loss={"beta": 0.2})

    model = load_model(tiny_folder, torch.float64, CPU).requires_grad_(True)
    opponent = load_model(tiny_folder, torch.float64, CPU)

    def logp(net, prompt, response):
        table = net(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        return sum(table[len(prompt) - 1 + k, token] for k, token in enumerate(response))

    loss = 0.0
    for p in pairs:
        real = logp(model, p.prompt_ids, p.real_ids) - logp(opponent, p.prompt_ids, p.real_ids)
        generated = logp(model, p.prompt_ids, p.generated_ids) - logp(opponent, p.prompt_ids, p.generated_ids)
        loss = loss + torch.log(1 + torch.exp(-0.2 * (real - generated))) / len(pairs)
    loss.backward()
    norm = sum((w.grad**2).sum() for w in model.parameters()).sqrt()
    for name, weight in model.named_parameters():
        grad = weight.grad * min(1.0, 0.5 / (norm.item() + 1e-6))
        square = 0.01 * grad**2
        expected = weight.detach() - 1e-3 * grad / (square.sqrt() + 1e-8)
        # RMSprop divides by |grad|, so the steps of tiny gradients are rounding noise: compare the others.
        large = grad.abs() > 1e-6
        assert large.float().mean() > 0.5
        master = engine.masters[name].double()
        assert torch.allclose(master[large], expected[large], atol=2e-5), name
        assert torch.equal(engine.model.get_parameter(name).data, engine.masters[name])
    assert rows[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("link", ["logistic", "hinge", "exponential", "correlation"])
def test_first_step_has_margin_0(tiny_folder, link):
    rows = []
    train(engine_of(tiny_folder), pairs_of(), PADDED, log=rows.append, loss={"link": link})
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["loss"] == pytest.approx(NAIVE[link](0.0), abs=1e-4)


def test_wrong_opponent_is_detected(tiny_folder):
    pairs = pairs_of()
    opponent = score(tiny_folder, pairs)["opponent"]
    wrong = {"opponent": opponent | {"real": opponent["real"] - 3}}
    with pytest.raises(UserError, match=r"does not equal its opponent at the first step: .* instead of 0\.69315\)"):
        train(engine_of(tiny_folder), pairs, references=wrong)
    nan = {name: torch.full((4,), torch.nan) for name in ("real", "generated")}
    with pytest.raises(UserError):
        check_first_step(nan, nan, torch.full((4,), torch.nan), None, 0.1)


@pytest.mark.parametrize("forward", [PADDED, Forward("packed", "chunked", 300, 64), Forward("packed", "full", 64, 1)])
def test_gradient_with_any_micro_batches(tiny_folder, forward):
    """Micro-batches of unequal numbers of pairs give the gradient of the mean over pairs."""
    pairs = pairs_of(11)
    results = []
    for batching in (PACKED, forward):
        engine = engine_of(tiny_folder)
        collected = {}

        def step(lr, engine=engine, collected=collected):
            collected.update({name: grad.clone() for name, grad in engine.grads.items()})
            return 0.0

        engine.step = step
        train(engine, pairs, batching, loss={"beta": 0.5})
        results.append(collected)
    for name, grad in results[0].items():
        assert torch.allclose(grad, results[1][name], atol=1e-5, rtol=1e-3), name


def test_metrics_are_means_over_items(tiny_folder):
    engine, items = engine_of(tiny_folder), random_items(9, responses=1)
    values = torch.arange(9.0)

    def batch_loss(batch, logps, indices, step):
        return 0 * logps, {"loss": values[indices]}

    rows = []
    fit(engine, items, batch_loss, PADDED, log=rows.append, **SETTINGS)
    assert rows[0]["loss"] == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_learning_rate_moves_masters(tiny_folder, dtype):
    """fp32 masters keep updates that bf16 weights would round away."""
    engine = engine_of(tiny_folder, dtype)
    before = {name: master.clone() for name, master in engine.masters.items()}
    train(engine, pairs_of(), lr=5e-7, epochs=8, batch_size=5)
    moved = torch.cat([(engine.masters[name] - before[name]).abs().flatten() for name in before])
    assert (moved > 1e-8).float().mean() > 0.5
    rounded = torch.cat(
        [(b.bfloat16() + (engine.masters[n] - b).bfloat16() != b.bfloat16()).flatten() for n, b in before.items()]
    )
    assert rounded.float().mean() < 0.1


def test_masters_are_saved_in_fp32(tiny_folder, tmp_path):
    engine = engine_of(tiny_folder, torch.bfloat16)
    items = random_items(6, responses=1)
    train_sft(engine, items, PACKED, log=lambda row: None, **SETTINGS)
    engine.save(tmp_path / "policy")
    saved = load_model(tmp_path / "policy", torch.float32, CPU)
    for name, weight in saved.named_parameters():
        assert torch.equal(weight.data, engine.masters[name])
        assert torch.equal(engine.weights[name].data, engine.masters[name].bfloat16())
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["dtype"] == "float32"
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template


def test_no_global_random_state(tiny_folder):
    pairs = pairs_of()
    digests = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        engine = engine_of(tiny_folder)
        train(engine, pairs, epochs=2, batch_size=3)
        assert torch.equal(torch.get_rng_state(), state)
        digests.append(hashlib.sha256(b"".join(m.numpy().tobytes() for m in engine.masters.values())).hexdigest())
    assert digests[0] == digests[1]


def test_gradient_checkpointing_keeps_bits(tiny_folder):
    pairs, results = pairs_of(), []
    for checkpointing in (False, True):
        engine = SingleEngine(
            policy_of(tiny_folder),
            torch.float32,
            CPU,
            EngineConfig.from_defaults(gradient_checkpointing=checkpointing),
            OptimizerConfig.from_defaults(),
        )
        train(engine, pairs)
        results.append(engine.masters)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def broken_at(steps, loss=True, gradient=True):
    """Return an objective whose loss, gradient or both are not finite at some steps."""

    def objective(batch, logps, indices, step):
        is_broken = step in steps
        losses = -logps * (torch.inf if is_broken and gradient else 1.0)
        return losses, {"loss": -logps.detach() * (torch.nan if is_broken and loss else 1.0)}

    return objective


@pytest.mark.parametrize(("loss", "gradient"), [(True, True), (True, False), (False, True)])
def test_nonfinite_step_is_skipped(tiny_folder, loss, gradient):
    items, settings = random_items(12, responses=1), {**SETTINGS, "batch_size": 1}
    rows, norms = [], []
    engine = engine_of(tiny_folder)

    def log(row):
        rows.append(row)
        norms.append(sum(float(master.double().square().sum()) for master in engine.masters.values()))

    state = fit(engine, items, broken_at({3, 4, 8}, loss, gradient), PACKED, log=log, **settings)
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert state.skipped == 3 and state.step == 12
    changed = [now != before for before, now in zip(norms, norms[1:], strict=False)]
    assert changed == [step not in {3, 4, 8} for step in range(1, 12)]
    assert all(torch.isfinite(master).all() for master in engine.masters.values())


@pytest.mark.parametrize(("count", "broken_steps", "num_rows"), [(12, {2, 3, 4, 5, 6}, 7), (1, {0}, 1), (4, {1, 2}, 3)])
def test_nonfinite_steps_in_a_row_end_the_run(tiny_folder, tmp_path, count, broken_steps, num_rows):
    """The newest checkpoint is that of the last step with an update."""
    messages, rows = [], []
    checkpoints = Checkpoints(tmp_path, steps=1, say=messages.append)
    settings = {**SETTINGS, "batch_size": 1}
    with pytest.raises(UserError, match="lower the learning rate"):
        fit(
            engine_of(tiny_folder),
            random_items(count, responses=1),
            broken_at(broken_steps),
            PACKED,
            log=rows.append,
            checkpoints=checkpoints,
            **settings,
        )
    assert len(rows) == num_rows
    restored = Checkpoints(tmp_path, steps=1).restore(engine_of(tiny_folder))
    assert restored.step == min(broken_steps) and restored.skipped == 0


def test_divergence_ends_the_run(tiny_folder):
    settings = {**SETTINGS, "lr": 1e30, "epochs": 4, "batch_size": 2}
    with pytest.raises(UserError, match="lower the learning rate"):
        train_sft(engine_of(tiny_folder), random_items(8, responses=1), PACKED, log=lambda row: None, **settings)


def test_margin_rises(tiny_folder):
    rows = []
    train(engine_of(tiny_folder), pairs_of(), log=rows.append, epochs=8)
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.5
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_learning_rate_schedule():
    factors = [learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert learning_rate_factor(0, 1, 0.0) == 1.0
    assert all(0 < learning_rate_factor(s, n, r) <= 1 for n in range(1, 30) for s in range(n) for r in (0, 0.1, 0.9))


@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(**SMALL, **BODY, attention_dropout=0.5),
        tf.GPT2Config(vocab_size=97, n_positions=256, n_embd=32, n_layer=3, n_head=4),
        tf.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
    ],
    ids=["llama", "gpt2", "opt"],
)
def test_no_dropout_with_gradient_checkpointing(config, tiny_folder, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    results = []
    for checkpointing in (False, True):
        options = EngineConfig.from_defaults(gradient_checkpointing=checkpointing)
        engine = SingleEngine(policy_of(tmp_path), torch.float32, CPU, options, OptimizerConfig.from_defaults())
        (batch,) = Forward("padded", "chunked", 999, 64).batches(random_items(4))
        logps = sequence_logps(engine.model, batch, PADDED)
        engine.backward(logps.sum())
        results.append((logps.detach(), engine.grads))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.allclose(results[0][1][name], results[1][1][name], atol=1e-5) for name in results[0][1])


def test_buffers_are_saved(tiny_folder, tmp_path):
    engine = engine_of(tiny_folder, torch.bfloat16)
    engine.model.model.register_buffer("scalar", torch.tensor(0.3))
    assert saved_buffers(engine.model).keys() == {"model.scalar"}
    engine.buffers = saved_buffers(engine.model)
    engine.save(tmp_path / "policy")
    assert load_file(tmp_path / "policy" / "model.safetensors")["model.scalar"].item() == pytest.approx(0.3)


def test_closed_engine_frees_weights(tiny_folder):
    """A closed engine frees its weights, because a game trains several times in one process."""
    engine = engine_of(tiny_folder)
    train(engine, pairs_of())
    references = [weakref.ref(engine), weakref.ref(engine.model), *map(weakref.ref, engine.model.parameters())]
    engine.close()
    del engine
    gc.collect()
    assert not any(reference() is not None for reference in references)
