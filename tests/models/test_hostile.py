"""Untrusted model folders: changed values in small files give a game or a one-line error, with bounded resources."""

import copy
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from spin.config.schema import GenerationConfig, ModelConfig
from spin.data.examples import Example
from spin.data.templates import ChatTemplate, encode_prompts, end_of_turn
from spin.engines.logps import choose_forward
from spin.engines.memory import shape_of
from spin.engines.packing import Continuations
from spin.generation.answers import AnswerRequest
from spin.generation.sampling import generate_answers
from spin.models import validate
from spin.models.find import find_model
from spin.models.load import load_policy, load_tokenizer, stop_ids
from spin.runtime.errors import UserError, user_message
from tests.conftest import model_folder

ROOT = Path(__file__).parents[2]
VALUES = [None, True, "x", "64", "", [], {}, [[-1]], {"a": 1}, 0, 1, -1, 1.5, 10**6, 10**9, 2**63, 10**30, 1e308, -1e-3]
VALUES += [float("nan"), float("inf"), "a/b", "../../x", "\ud800", "x" * 10_000]
REMOVED = object()
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def paths_of(value, path=()):
    """Yield the path of every value in a JSON document, except list items after the third."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


def changed(document, path, value):
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is REMOVED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


def changes(document, rng, count):
    """Return `count` random changes of the document, in which a vocabulary counts as one value."""
    paths = [path for path in paths_of(document) if "vocab" not in path[:-1]]
    candidates = [(path, value) for path in paths for value in [*VALUES, REMOVED]]
    return rng.sample(candidates, min(count, len(candidates)))


def use(folder):
    """Use a model folder like a game, on a small scale."""
    policy = find_model(ModelConfig.from_defaults(path=str(folder)), folder.parent / "cache")
    tokenizer = load_tokenizer(policy.tokenizer)
    stops = stop_ids(policy.folder, tokenizer)
    chat = ChatTemplate(tokenizer)
    for note in chat.notes(stops):
        assert note.startswith("note:")
    stops |= {end_of_turn(tokenizer, chat)}
    shape_of(AutoConfig.from_pretrained(policy.folder, trust_remote_code=False))
    model = load_policy(policy, torch.float32, torch.device("cpu"))
    [(text, ids)] = encode_prompts(tokenizer, [[{"role": "user", "content": "Hi"}]], "chat")
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        raise UserError("the tokenizer has tokens that the model has no embedding for")  # as a game reports
    items = [Continuations(tuple(ids), ((3, 4), (5,))) for _ in range(2)]
    choose_forward(model, items, "auto", 64, 64, 64)
    generation = GenerationConfig.from_defaults()
    examples = [Example("a", text, tuple(ids), "", ())]
    generate_answers(model, AnswerRequest(tokenizer, examples, generation, 3, stops, 0))


def outcome(folder, change):
    """Return "" or the one-line error of `use`. Fails for a traceback or too much time or memory."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message: str | None = ""
    try:
        use(folder)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise AssertionError(f"{change}: a traceback") from error
    assert message.isprintable() and len(message) < 1000, (change, message)
    assert time.process_time() - started < 20, change
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * 2**19, change  # KiB
    return message


def explore(name, file, count, tmp_path, seed=0):
    """Return the outcomes of `count` changes of a file."""
    folder = model_folder(name, tmp_path / "model")
    document, lines = json.loads((folder / file).read_text()), []
    for path, value in changes(document, random.Random(f"{name} {file} {seed}"), count):
        (folder / file).unlink()
        (folder / file).write_text(json.dumps(changed(document, path, value)))
        lines.append(outcome(folder, (path, value)))
    return lines


FILES = [("llama", file) for file in SMALL[1:4]] + [(name, "config.json") for name in ("llama", "mixtral", "mamba2")]
ALL_FILES = [(name, "config.json") for name in ("gpt2", "gemma3", "gpt_oss", "qwen3_next", "falcon_h1")] + FILES


@pytest.mark.parametrize(("name", "file"), FILES)
def test_changed_values(tmp_path, name, file):
    lines = explore(name, file, 5, tmp_path)
    assert any(lines) or file == "generation_config.json"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), ALL_FILES)
def test_many_changed_values(tmp_path, name, file):
    lines = explore(name, file, 40, tmp_path, seed=1)
    assert len([line for line in lines if line]) > 5 or file == "generation_config.json"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**9}, "39 tensors for num_hidden_layers=1000000000|20 tensors"),
        ({"num_hidden_layers": -1}, "a forward pass fails|no model can be built"),
        ({"hidden_size": 10**9}, "do not match its config.json"),
        ({"hidden_size": -64}, "no model can be built"),
        ({"vocab_size": 10**12}, r"embed_tokens\.weight is \[258, 64\], not \[1000000000000, 64\]"),
        ({"intermediate_size": 10**9}, "do not match its config.json"),
        ({"num_key_value_heads": 10**9}, "do not match its config.json"),
        ({"head_dim": 10**9}, "do not match its config.json"),
        ({"rope_parameters": {"rope_type": "evil"}}, "no model can be built"),
        ({"attention_dropout": "x"}, "no model can be built|config.json cannot be used|a forward pass fails"),
    ],
)
def test_sizes(tiny_folder, tmp_path, settings, message):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **settings}))
    line = outcome(folder, settings)
    assert re.search(message, line) and str(folder) in line


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mixtral", {"num_local_experts": 10**9}),
        ("gpt2", {"n_layer": 10**9}),
        ("qwen3_next", {"num_hidden_layers": 10**9}),
        ("mamba2", {"num_heads": 10**9}),
    ],
)
def test_sizes_of_other_architectures(tmp_path, name, settings):
    folder = model_folder(name, tmp_path / "model")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **settings}))
    assert str(folder) in outcome(folder, settings)


def test_endless_architecture(tiny_folder, tmp_path, monkeypatch):
    """Sizes that no rule checks exceed the limits of the child process, which is ended."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "num_hidden_layers": 10**9}))
    monkeypatch.setattr(validate, "LAYERS", ())
    monkeypatch.setattr(validate, "SECONDS", 2)
    assert re.search("no model can be built.*(takes more than 2|needs more than 1536 MiB)", outcome(folder, "layers"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"null", b"{% for i in x %}", b"{{ 1 / 0 }}"])
def test_other_small_files(tiny_folder, tmp_path, content):
    for file in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"):
        folder = Path(shutil.copytree(tiny_folder, tmp_path / file))
        (folder / file).write_bytes(content)
        outcome(folder, (file, content))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [("llama", file) for file in SMALL[:4]] + [("mixtral", "config.json")])
def test_games(place, name, file):
    """A complete game ends with status 0, or with 1 and one line."""
    folder = model_folder(name, place.folder / "model")
    document = json.loads((folder / file).read_text())
    for number, (path, value) in enumerate(changes(document, random.Random(file), 4)):
        (folder / file).write_text(json.dumps(changed(document, path, value)))
        words = place.words(f"model.path={folder}", "iter=0", "schedule.sft_epochs=0", run=f"run{number}")
        result = place.games.play(*words)
        assert result.returncode in (0, 1) and "Traceback" not in result.stderr, (path, value, result.stderr)
        if result.returncode == 1:
            assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1, result.stderr


HUB = """
import sys
from pathlib import Path
from spin.config.schema import ModelConfig
from spin.models.find import find_model
from spin.runtime.errors import UserError
try:
    find_model(ModelConfig.from_defaults(path="a/b"), Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


@pytest.mark.slow  # imports everything again
@pytest.mark.parametrize("body", [b"[1, 2]", b'{"id": 3}', b'{"id": "a/b", "sha": "x", "siblings": ["y"]}'])
def test_invalid_hub_responses(tmp_path, body):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
        command = [sys.executable, "-c", HUB, str(tmp_path)]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout.startswith("model.path=a/b: no such folder, and the Hugging Face hub")
        and result.stdout.count("\n") == 1
    )
