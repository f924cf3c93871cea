"""LoRA compared with PEFT's forward pass and a naive training step; the opponent has the previous adapter."""

import json
import os
import shutil

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spin.config.schema import EngineConfig, LossConfig, ModelConfig, OptimizerConfig
from spin.engines.logps import Forward, choose_forward, compute_logps, reference_logps
from spin.engines.packing import Continuations
from spin.engines.single import SingleEngine
from spin.method.objectives import make_objective
from spin.method.pairs import Pair, group_by_prompt, read_pairs, split_responses, to_continuations
from spin.method.training import train_spin
from spin.models import adapters, tiny
from spin.models.adapters import Lora
from spin.models.find import find_model, fresh_adapter
from spin.models.load import load_model, load_policy
from spin.models.policy import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, Policy, content_id
from spin.models.save import save_merged
from spin.runtime.errors import UserError
from tests.conftest import CONFIGS, random_items, small_model
from tests.games import ROOT, Place

PACKED = Forward("packed", "chunked", 128, 16)
CPU = torch.device("cpu")
LORA = Lora(rank=4, alpha=8, targets="all-linear")
WORDS = ["model.adapter=lora", "model.lora_rank=4", "schedule.replay=previous"]
SETTINGS = dict(lr=1e-3, epochs=1, batch_size=100, warmup_ratio=0.0, seed=0)


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("lora"), games)
    place.first = place.play(*WORDS, "model.merge=true")
    return place


def base_or_self(folder) -> Policy:
    return Policy("start", folder, content_id(folder))


def adapted(folder, target, seed=0, lora=LORA) -> Policy:
    """Return a policy with an adapter that changes the model's output."""
    policy = fresh_adapter(base_or_self(folder), lora, seed, ModelConfig.from_defaults(path=str(folder)), target)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(target / ADAPTER_WEIGHTS)
    weights = {key: w + 0.1 * torch.randn(w.shape, generator=generator) for key, w in weights.items()}
    save_file(weights, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return Policy(policy.label, target, content_id(target, policy.base), policy.base)


def peft_model(folder, dtype=torch.float32):
    config = peft.LoraConfig.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=dtype)
    return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).to(dtype).eval()


# --- a game -----------------------------------------------------------------------------------------------------------


def test_first_step_margin_and_loss(played):
    first_rows = [row for row in played.metrics() if row["stage"] == "train" and row["step"] == 0]
    assert [row["iter"] for row in first_rows] == [0, 1]
    for row in first_rows:
        assert row["loss"] == pytest.approx(0.6931, abs=0.01)
        assert row["rewards/margins"] == pytest.approx(0, abs=0.02)
        assert row["grad_norm"] > 0


def test_opponent_uses_previous_adapter(played):
    """The opponent's scores equal PEFT's forward pass with the previous adapter, not that of the base model."""
    run = played.folder / "run"
    pairs, logps = read_pairs(run / "iter1" / "pairs.parquet")
    opponent = logps["opponent"]
    assert {pair.iter for pair in pairs} == {0, 1}
    previous_policy = peft_model(run / "iter0" / "policy")
    items = [Continuations(pair.prompt_ids, (pair.real_ids, pair.generated_ids)) for pair in pairs[:8]]
    for k, item in enumerate(items):
        real, generated = (values.sum().item() for values in reference_logps(previous_policy, item))
        assert opponent["real"][k].item() == pytest.approx(real, abs=2)
        assert opponent["generated"][k].item() == pytest.approx(generated, abs=2)
    with previous_policy.disable_adapter():
        base_logps = [reference_logps(previous_policy, item)[0].sum().item() for item in items]
    assert min(abs(opponent["real"][k].item() - value) for k, value in enumerate(base_logps)) > 5


def test_saved_policy_opens_in_peft_and_merged(played):
    folder = played.folder / "run" / "iter1"
    ids = torch.tensor([[5, 6, 7, 8, 9, 100]])
    base = load_model(next((played.folder / "cache").glob("tiny-*[0-9]")), torch.float32, CPU)
    with torch.no_grad():
        expected = peft_model(folder / "policy")(ids).logits
        for model in (
            peft.AutoPeftModelForCausalLM.from_pretrained(folder / "policy"),
            AutoModelForCausalLM.from_pretrained(folder / "policy"),
            load_policy(
                find_model(ModelConfig.from_defaults(path=str(folder / "policy")), played.folder / "cache"),
                torch.float32,
                CPU,
            ),
            AutoModelForCausalLM.from_pretrained(folder / "merged"),
        ):
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        assert (base(ids).logits - expected).abs().max() > 0.1
    assert not any("lora" in key for key in load_file(folder / "merged" / "model.safetensors"))
    assert not (played.folder / "run" / "iter0" / "merged").exists()


def test_store_holds_only_adapters(played):
    """Only adapters are stored: rank 4, 2 layers, q, o 64 to 64, k, v 64 to 32, gate, up 64 to 128, down 128 to 64."""
    numbers = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    store = played.folder / "store"
    paths = list(store.glob("train/*/policy/*.safetensors")) + list(store.glob("sft/*/policy/*.safetensors"))
    assert len(paths) == 3 and {path.name for path in paths} == {"adapter_model.safetensors"}
    for path in paths:
        with safe_open(path, "pt") as file:
            assert sum(file.get_tensor(key).numel() for key in file.keys()) == numbers
        assert 4 * numbers < path.stat().st_size < 4 * numbers + 6000  # names and shapes
    (merged,) = store.glob("merge/*/merged/model.safetensors")
    assert merged.stat().st_size > 350_000


def test_evaluate_stage_reused(played):
    """The game's evaluation is reused for the same base and adapter, whatever the folder."""
    before = played.stages()
    result = played.play("stage=evaluate", f"model.path={played.folder}/run/sft/policy", run="measured")
    assert "evaluate sft/policy: reused" in result.stdout and played.stages() == before
    played.play("stage=evaluate", f"model.path={played.folder}/run/iter1/policy", run="last")
    (last,), game = (
        json.loads((played.folder / name / "game.json").read_text())["evaluations"] for name in ("last", "run")
    )
    assert all(last[key] == game[-1][key] for key in ("nll_per_token", "human_likelier", "model_length", "n"))


def test_game_continues_from_adapter(played):
    policy = played.folder / "run" / "iter1" / "policy"
    words = [*WORDS, f"model.path={policy}", "schedule.sft_epochs=0", "iter=0", "evaluation=none", "model.lora_rank=7"]
    result = played.play(*words, run="on")
    assert "is a LoRA adapter; it is trained further as it is" in result.stdout
    first = next(row for row in played.metrics("on") if row["stage"] == "train")
    assert first["loss"] == pytest.approx(0.6931, abs=0.01)
    new, old = (load_file(path / "adapter_model.safetensors") for path in (played.folder / "on/iter0/policy", policy))
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
    change = max((new[key] - old[key]).abs().max() for key in new)
    assert 0 < change < 0.05  # three steps of 1e-3
    planned = played.play(*words[:-1], "model.lora_rank=9", "plan=true", run="on")  # the rank is fixed
    assert "3 stages to reuse, 0 to resume, 0 to play" in planned.stdout
    refused = played.play(f"model.path={policy}", run="none", status=1)
    assert "is a LoRA adapter: set model.adapter=lora" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_base_found_by_content(played, tmp_path):
    """If the base's folder has other weights, the model it was made from is used; if that is missing, it is refused."""
    base = tmp_path / "base"
    shutil.copytree(next((played.folder / "cache").glob("tiny-*[0-9]")), base)
    policy = tmp_path / "policy"
    shutil.copytree(played.folder / "run" / "iter1" / "policy", policy)
    settings = json.loads((policy / ADAPTER_CONFIG).read_text())
    (policy / ADAPTER_CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    config, cache = ModelConfig.from_defaults(path=str(policy)), played.folder / "cache"
    original = find_model(config, cache)
    assert original.base.folder == base
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    substitute = find_model(config, cache)
    assert substitute.base.folder != base and substitute.id == original.id
    facts = json.loads((policy / ADAPTER_BASE).read_text())
    (policy / ADAPTER_BASE).write_text(json.dumps(facts | {"model": facts["model"] | {"path": str(tmp_path / "gone")}}))
    with pytest.raises(UserError, match="holds other weights") as error:
        find_model(config, cache)
    assert "\n" not in str(error.value) and "base_model_name_or_path" in str(error.value)


def test_same_bits_after_kill(played, place):
    words = [*WORDS, "iter=0", "checkpoint.steps=1", "evaluation=none"]
    game = place.start(*words, run="cut")
    while not list((place.folder / "store").glob("train/*.part/resume/training/step-*")):
        assert game.poll() is None, game.wait()
    game.kill()
    game.wait()
    checkpoints = list((place.folder / "store").glob("*/*.part/resume/training/step-*/*.safetensors"))
    assert checkpoints and all(path.stat().st_size < 60_000 for path in checkpoints)
    place.play(*words, run="cut")
    uncut, resumed = (
        load_file(p / "iter0/policy/adapter_model.safetensors") for p in (played.folder / "run", place.folder / "cut")
    )
    assert all(torch.equal(uncut[key], resumed[key]) for key in uncut)


# --- its parts --------------------------------------------------------------------------------------------------------


def pairs_of(count=10) -> list[Pair]:
    items = random_items(count, seed=5, longest=30)
    return [Pair(f"p{i}", "", "", "", "stop", item.prompt_ids, *item.responses) for i, item in enumerate(items)]


def train(engine, beta=0.1, log=lambda row: None, **settings) -> list[Pair]:
    """Train on the pairs of `pairs_of`, scored in fp32 by the initial policy of the engine. Return the pairs."""
    pairs = pairs_of()
    values = compute_logps(load_policy(engine.policy, torch.float32, CPU), to_continuations(pairs), PACKED)
    references = {"opponent": split_responses(values, [len(group) for group in group_by_prompt(pairs)])}
    objective = make_objective(LossConfig.from_defaults(beta=beta), 0)
    train_spin(engine, pairs, references, objective, PACKED, log=log, **SETTINGS | settings)
    return pairs


def test_step_matches_naive_float64(tiny_folder, tmp_path):
    """A step with packed rows, chunked head, clipping and RMSprop equals one of PEFT's model in float64."""
    policy = adapted(tiny_folder, tmp_path / "policy")
    engine = SingleEngine(
        policy, torch.float32, CPU, EngineConfig.from_defaults(), OptimizerConfig.from_defaults(max_grad_norm=0.5)
    )
    frozen = {name: w.clone() for name, w in engine.model.named_parameters() if "lora_" not in name}
    pairs = train(engine, beta=0.2)

    model, opponent = (peft_model(policy.folder, torch.float64) for _ in range(2))
    trained = {n.removeprefix("base_model.model."): w for n, w in model.named_parameters() if "lora_" in n}
    for weight in trained.values():
        weight.requires_grad_(True)
    loss = 0.0
    for p in pairs:
        item = Continuations(p.prompt_ids, (p.real_ids, p.generated_ids))
        real, generated = (
            sum(a.double().sum() * sign for a, sign in ((new, 1), (old.detach(), -1)))
            for new, old in zip(plain64(model, item), plain64(opponent, item), strict=True)
        )
        loss = loss + torch.log(1 + torch.exp(-0.2 * (real - generated))) / len(pairs)
    loss.backward()
    norm = sum((w.grad**2).sum() for w in trained.values()).sqrt()
    assert trained.keys() == engine.masters.keys()
    for name, weight in trained.items():
        grad = weight.grad * min(1.0, 0.5 / (norm.item() + 1e-6))
        expected = weight.detach() - 1e-3 * grad / ((0.01 * grad**2).sqrt() + 1e-8)
        large = grad.abs() > 1e-6
        assert large.float().mean() > 0.5
        assert torch.allclose(engine.masters[name].double()[large], expected[large], atol=2e-5), name
    for name, weight in engine.model.named_parameters():
        assert "lora_" in name or torch.equal(weight, frozen[name]), name


def plain64(model, item):
    for response in item.responses:
        table = model(torch.tensor([[*item.prompt_ids, *response]])).logits[0].log_softmax(-1)
        yield torch.stack([table[len(item.prompt_ids) - 1 + k, token] for k, token in enumerate(response)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_packed_logps_match_peft(name, tmp_path):
    small_model(name).save_pretrained(tmp_path / "base")
    policy = adapted(tmp_path / "base", tmp_path / "policy")
    model = load_policy(policy, torch.float32, CPU)
    items = random_items(4, longest=10)
    forward, _ = choose_forward(model, items, "auto", 128, 16, 60)
    assert forward.head == "chunked"
    expected = torch.stack(
        [logps.sum() for item in items for logps in reference_logps(peft_model(policy.folder), item)]
    )
    assert torch.allclose(compute_logps(model, items, forward), expected, atol=1e-3)
    base_logps = compute_logps(load_model(policy.base.folder, torch.float32, CPU), items, forward)
    assert (base_logps - expected).abs().max() > 0.1


def test_merge_all_architectures(tmp_path):
    for name in CONFIGS.keys() - {"falcon_h1", "mamba", "mamba2"}:
        base, target = tmp_path / name / "base", tmp_path / name / "policy"
        small_model(name).save_pretrained(base)
        (base / "tokenizer_config.json").write_text("{}")
        policy = adapted(base, target)
        save_merged(policy, tmp_path / name / "merged")
        ids = torch.tensor([[2, 3, 5, 7]])
        with torch.no_grad():
            attached = load_policy(policy, torch.float32, CPU)(ids).logits
            merged = load_model(tmp_path / name / "merged", torch.float32, CPU)(ids).logits
        assert torch.allclose(attached, merged, atol=1e-4), name


@pytest.mark.parametrize("name", ["falcon_h1", "mamba2"])
def test_unsupported_layers_named(tmp_path, name):
    small_model(name).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="'out_proj' is incompatible with Mamba") as error:
        adapted(tmp_path / "base", tmp_path / "policy")
    assert "\n" not in str(error.value)


def test_gradient_checkpointing_same_bits(tiny_folder, tmp_path):
    policy, results = adapted(tiny_folder, tmp_path / "policy"), []
    for checkpointing in (False, True):
        options = EngineConfig.from_defaults(gradient_checkpointing=checkpointing)
        engine = SingleEngine(policy, torch.float32, CPU, options, OptimizerConfig.from_defaults())
        train(engine)
        results.append(engine.masters)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_bf16_training_saves_fp32_masters(tiny_folder, tmp_path, monkeypatch):
    policy = adapted(tiny_folder, tmp_path / "policy")
    engine = SingleEngine(policy, torch.bfloat16, CPU, EngineConfig.from_defaults(), OptimizerConfig.from_defaults())
    before = {name: master.clone() for name, master in engine.masters.items()}
    assert all(weight.dtype == torch.bfloat16 for weight in engine.model.parameters())
    train(engine, lr=5e-7, epochs=4, batch_size=5)
    moved = torch.cat([(engine.masters[name] - before[name]).abs().flatten() for name in before])
    assert (moved > 1e-8).float().mean() > 0.5
    monkeypatch.delattr(adapters, "write_base_record")  # the record is copied, without reading the base again
    engine.save(tmp_path / "saved")
    assert (tmp_path / "saved" / ADAPTER_BASE).read_bytes() == (policy.folder / ADAPTER_BASE).read_bytes()
    saved = adapters.read_weights(tmp_path / "saved", CPU)
    assert all(torch.equal(saved[name], engine.masters[name]) for name in engine.masters)
    (tmp_path / "state").mkdir()
    engine.save_state(tmp_path / "state")
    numbers = sum(master.numel() for master in engine.masters.values())
    size = sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    assert 2 * 4 * numbers < size < 2 * 4 * numbers + 20_000


def test_fresh_adapter_neutral_and_deterministic(tiny_folder, tmp_path):
    texts = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        policy = fresh_adapter(
            base_or_self(tiny_folder), LORA, 0, ModelConfig.from_defaults(path=str(tiny_folder)), tmp_path / str(noise)
        )
        model = load_policy(policy, torch.float32, CPU)
        assert torch.equal(torch.get_rng_state(), state)
        texts.append([(tmp_path / str(noise) / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)])
    assert texts[0] == texts[1]
    other_seed = fresh_adapter(
        base_or_self(tiny_folder), LORA, 1, ModelConfig.from_defaults(path=str(tiny_folder)), tmp_path / "other"
    )
    assert other_seed.id != policy.id
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(tiny_folder, torch.float32, CPU)(ids).logits)
    std = adapters.read_weights(policy.folder, CPU)["model.layers.0.mlp.down_proj.lora_A.default.weight"].std().item()
    assert std == pytest.approx(128**-0.5 / 3**0.5, rel=0.2)  # uniform in +-1/sqrt(128)


def test_content_id_of_adapter(tiny_folder, tmp_path):
    policy = adapted(tiny_folder, tmp_path / "policy")
    settings = json.loads((policy.folder / ADAPTER_CONFIG).read_text())
    ids = [policy.id, content_id(policy.folder, Policy("base", tiny_folder, "another"))]
    for change in ({"lora_alpha": 9}, {"base_model_name_or_path": "/elsewhere", "peft_version": "0"}):
        (policy.folder / ADAPTER_CONFIG).write_text(json.dumps(settings | change))
        ids.append(content_id(policy.folder, policy.base))
    assert len(set(ids)) == 3 and ids[3] == ids[0]


def test_adapter_made_by_peft(tiny_folder, tmp_path):
    """An adapter by PEFT with dropout, rslora and ranks per layer, without base.json or tokenizer, is trained."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_dropout=0.5, use_rslora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).save_pretrained(tmp_path / "theirs")
    policy = find_model(ModelConfig.from_defaults(path=str(tmp_path / "theirs")), tmp_path)
    assert policy.base.folder == tiny_folder and policy.tokenizer == tiny_folder
    items = random_items(3)
    logps = compute_logps(load_policy(policy, torch.float32, CPU), items, PACKED)
    expected = torch.stack(
        [values.sum() for item in items for values in reference_logps(peft_model(policy.folder), item)]
    )
    assert torch.allclose(logps, expected, atol=1e-3)
    engine = SingleEngine(policy, torch.float32, CPU, EngineConfig.from_defaults(), OptimizerConfig.from_defaults())
    rows = []
    train(engine, log=rows.append)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    engine.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / ADAPTER_BASE).read_text())["content"] == policy.base.id


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_game_from_an_adapter_made_by_peft(played, place, tmp_path, has_tokenizer):
    """A game starts from an adapter saved by PEFT, with or without a tokenizer, whose base is a relative path."""
    base = next((played.folder / "cache").glob("tiny-*[0-9]"))
    config = peft.LoraConfig(r=2, use_rslora=has_tokenizer, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = os.path.relpath(base, ROOT)
    model.save_pretrained(tmp_path / "theirs")
    if has_tokenizer:
        tiny.tokenizer().save_pretrained(tmp_path / "theirs")
    words = ["iter=0", "model.adapter=lora", "schedule.sft_epochs=0", "evaluation=none"]
    place.play(*words, f"model.path={tmp_path}/theirs")
    policy = find_model(ModelConfig.from_defaults(path=str(tmp_path / "run" / "iter0" / "policy")), tmp_path)
    assert policy.base.folder.resolve() == base.resolve()
    assert json.loads((policy.folder / ADAPTER_BASE).read_text())["content"] == policy.base.id
    place.play(*words, f"model.path={policy.folder}", run="continued")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA can be used"),
        ({"use_dora": True}, "a LoRA adapter with use_dora=True, which cannot be used"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"target_modules": ["Wqkv"]}, "does not fit its base .*Wqkv"),
        ({"target_modules": ["q_proj"]}, "differ in model.layers.0"),
        ({"r": 8}, "does not fit its base .*size mismatch"),
        ({"base_model_name_or_path": "org/base"}, None),
        ({"base_model_name_or_path": "/nowhere/at/all"}, None),
        ({"base_model_name_or_path": None}, None),
    ],
)
def test_unsupported_adapters(tiny_folder, tmp_path, change, message):
    policy = adapted(tiny_folder, tmp_path / "policy")
    (policy.folder / ADAPTER_BASE).unlink()
    settings = json.loads((policy.folder / ADAPTER_CONFIG).read_text())
    (policy.folder / ADAPTER_CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message or "the base of this adapter cannot be found") as error:
        find_model(ModelConfig.from_defaults(path=str(policy.folder)), tmp_path)
    assert "\n" not in str(error.value)


def test_broken_adapter_folders(tiny_folder, tmp_path):
    def broken(name, damage):
        policy = adapted(tiny_folder, tmp_path / name)
        damage(policy.folder)
        with pytest.raises(UserError) as error:
            load_policy(find_model(ModelConfig.from_defaults(path=str(policy.folder)), tmp_path), torch.float32, CPU)
        assert "\n" not in str(error.value)
        return str(error.value)

    def truncate_weights(folder):
        weights = load_file(folder / ADAPTER_WEIGHTS)
        save_file({key: w[:, :3].contiguous() for key, w in weights.items()}, folder / ADAPTER_WEIGHTS)

    def drop_weight(folder):
        weights = load_file(folder / ADAPTER_WEIGHTS)
        weights.pop(min(weights))
        save_file(weights, folder / ADAPTER_WEIGHTS)

    assert "without adapter_model.safetensors" in broken("a", lambda f: (f / ADAPTER_WEIGHTS).unlink())
    assert "is broken" in broken("b", lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"no"))
    assert "cannot read its adapter_config.json as JSON" in broken("c", lambda f: (f / ADAPTER_CONFIG).write_text("{"))
    assert "does not fit its base" in broken("d", truncate_weights)
    assert "the folder is incomplete" in broken("e", drop_weight)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    message = broken("f", lambda f: shutil.copyfile(tmp_path / "x.safetensors", f / ADAPTER_WEIGHTS))
    assert "differ in x.default.weight" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.lora_targets=[q_prj]"],
            "model.lora_targets=['q_prj'] does not fit this model (Target modules {'q_prj'} not",
        ),
        (["model.lora_targets=q_prj"], "model.lora_targets=['q_prj'] does not fit this model"),
        (["model.lora_targets=[lm_head]"], "embeddings and the output layer cannot be adapted"),
        (["model.lora_rank=0"], "model.lora_rank=0: must be greater than or equal to 1"),
        (["model.lora_alpha=0"], "model.lora_alpha=0: must be greater than or equal to 1"),
        (["model.lora_targets=[]"], "model.lora_targets=[]: "),
        (["model.adapter=none", "model.merge=true"], "model.merge=True: has no effect with model.adapter=none"),
        (["model.adapter=none", "model.quantization=nf4"], "set model.adapter=lora"),
        (["model.adapter=lorra"], "must be 'none' or 'lora'"),
    ],
)
def test_invalid_settings(played, words, message):
    given_keys = {word.split("=")[0] for word in words}
    result = played.play(*words, *(w for w in WORDS if w.split("=")[0] not in given_keys), run="refused", status=1)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
