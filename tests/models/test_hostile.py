"""Model folders from strangers: every value of every small file changed. A game, or one line; bounded in time and memory."""

import copy
import json
import random
import re
import resource
import shutil
import time
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
from spin.generation.sampling import generate_answers
from spin.models.find import find_model
from spin.models.load import load_policy, load_tokenizer, stop_ids
from spin.runtime.errors import UserError, user_message
from tests.conftest import model_folder

VALUES = [None, True, "x", "64", "", [], {}, [[-1]], {"a": 1}, 0, 1, -1, 1.5, 10**6, 10**9, 2**63, 10**30, 1e308, -1e-3]
VALUES += [float("nan"), float("inf"), "a/b", "../../x", "\ud800", "x" * 10_000]
REMOVED = object()
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def paths_of(value, path=()):
    """The path of every value in a JSON document, lists cut after three."""
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
    """`count` of all changes of the document; those of a vocabulary's entries count as those of one value."""
    paths = [path for path in paths_of(document) if "vocab" not in path[:-1]]
    every = [(path, value) for path in paths for value in [*VALUES, REMOVED]]
    return rng.sample(every, min(count, len(every)))


def use(folder):
    """What a game does with a model folder, in little."""
    policy = find_model(ModelConfig.from_defaults(path=str(folder)), folder.parent / "cache")
    tokenizer = load_tokenizer(policy.tokenizer)
    stops = stop_ids(policy.folder, tokenizer)
    for note in ChatTemplate(tokenizer).notes(stops):
        assert note.startswith("note:")
    stops |= {end_of_turn(tokenizer, stops, "chat")}
    shape_of(AutoConfig.from_pretrained(policy.folder, trust_remote_code=False))
    model = load_policy(policy, torch.float32, torch.device("cpu"))
    [(text, ids)] = encode_prompts(tokenizer, [[{"role": "user", "content": "Hi"}]], "chat")
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        raise UserError("the tokenizer has tokens that the model has no embedding for")  # as a game says
    items = [Continuations(tuple(ids), ((3, 4), (5,))) for _ in range(2)]
    choose_forward(model, items, "auto", 64, 64, 64)
    generation = GenerationConfig.from_defaults()
    generate_answers(model, tokenizer, [Example("a", text, tuple(ids), "", ())], 1, generation, 3, stops, 0)


def outcome(folder, change):
    """"" for a game, or the one line. Fails for tracebacks, and above the bounds."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        use(folder)
        return ""
    except Exception as error:
        said = user_message(error)
        assert said is not None, (change, repr(error))
        assert said.isprintable() and len(said) < 1000, (change, said)
        return said
    finally:
        assert time.process_time() - started < 20, change
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, change  # KiB


def explore(name, file, count, tmp_path, seed=0):
    """Play with `count` changes of a file. Returns the lines."""
    folder = model_folder(name, tmp_path / "model")
    document, lines = json.loads((folder / file).read_text()), []
    for path, value in changes(document, random.Random(f"{name} {file} {seed}"), count):
        (folder / file).unlink()
        (folder / file).write_text(json.dumps(changed(document, path, value)))
        lines.append(outcome(folder, (path, value)))
    return lines
