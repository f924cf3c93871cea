"""Tests, for every setting and on a played game, that a stage's key depends only on what determines its content."""

import json
import shutil
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.config import schema
from spin.data.sources import ASSETS
from spin.engines.base import select_device, select_dtype
from spin.evaluation.external.harness import Task
from spin.game import declare
from spin.pipeline.context import Run, prepare_run
from spin.pipeline.external import Benchmark, MtBench
from spin.pipeline.plan import look_up
from spin.pipeline.train import Merge
from spin.runtime.store import key_of
from spin.runtime.tracking import Tracker
from tests.config.test_schema import load
from tests.conftest import model_folder
from tests.games import ROOT, Place

NOTHING = "nothing"  # every stage is reused
EVALUATIONS = "evaluations"
EVERYTHING = "everything"
SFT = "sft"  # the SFT stage and all later ones; the start's evaluation stays
ANSWERS = "answers"  # all generation, and later stages; the SFT stage stays
TRAIN = "train"  # iteration 0's training and later stages; its pairs and scores stay
TRAIN_1 = "train 1"  # iteration 1's training and its evaluation
SCORE_1 = "score 1"  # iteration 1's scores and later stages
PAIRS = "pairs"  # the generation of training pairs, and later stages

ORDER = [
    ("evaluate", "start"),
    ("sft", "start"),
    ("evaluate", "sft"),
    *((stage, f"iter {t}") for t in (0, 1) for stage in ("generate", "score", "train", "evaluate")),
]
PLAYED_AGAIN = {
    NOTHING: [],
    EVALUATIONS: [entry for entry in ORDER if entry[0] == "evaluate"],
    EVERYTHING: ORDER,
    SFT: ORDER[1:],
    ANSWERS: [entry for entry in ORDER if entry != ("sft", "start")],
    TRAIN: ORDER[ORDER.index(("train", "iter 0")) :],
    TRAIN_1: ORDER[ORDER.index(("train", "iter 1")) :],
    SCORE_1: ORDER[ORDER.index(("score", "iter 1")) :],
    PAIRS: ORDER[ORDER.index(("generate", "iter 0")) :],
}
# For every setting, a value other than its default and the stages that the value makes play again. COPY stands for a copy
# of the model or of the data. For settings that have an effect only together with others, GIVEN lists the others.
TABLE = {
    "name=other": NOTHING,
    "seed=1": EVERYTHING,
    "plan=true": NOTHING,
    "iter=1": NOTHING,
    "model.name=other": NOTHING,
    "model.path=COPY": NOTHING,  # the content of the weights counts, not their path
    "model.path=CHANGED": EVERYTHING,
    "+model.revision=abc": NOTHING,  # of a hub name
    "+model.package='a==1'": NOTHING,  # the path wins
    "+model.package_sha256=a": NOTHING,
    "+model.file=a": NOTHING,
    "+model.file_sha256=a": NOTHING,
    "model.sft_epochs=2": SFT,
    "model.lr=2e-3": TRAIN,
    "model.adapter=lora": SFT,
    "model.lora_rank=4": SFT,
    "model.lora_alpha=4": SFT,
    "model.lora_targets=[q_proj]": SFT,
    "model.merge=true": NOTHING,  # one more stage
    "model.quantization=nf4": EVERYTHING,
    "data.name=other": NOTHING,
    "data.path=COPY": NOTHING,  # the examples count, not their file's name
    "data.path=SHUFFLED": NOTHING,  # nor their order in it
    "data.revision=abc": NOTHING,  # of a hub name
    "data.config=default": NOTHING,  # the only one
    "data.splits=[train]": NOTHING,  # the only one
    "data.package='a==1'": NOTHING,  # the path wins
    "data.package_sha256=a": NOTHING,
    "data.file=a": NOTHING,
    "data.format=auto": NOTHING,  # the same records
    "data.generated=file": PAIRS,
    "data.turns=all": NOTHING,  # the data has one turn
    "data.template='Q: {prompt} A: '": EVERYTHING,
    "data.template_options={unknown: 1}": NOTHING,  # the template does not use it
    "data.filter=prose": NOTHING,  # drops none
    "data.size=20": SFT,  # what is held out stays the same
    "data.held_out=7": EVERYTHING,
    "data.validation=6": SFT,  # takes examples from the training set; four more stages
    "data.max_prompt_length=120": NOTHING,  # drops none
    "data.max_response_length=100": ANSWERS,  # drops none, but caps the generated answers
    "data.min_response_length=2": NOTHING,  # drops none
    "data.max_length=250": NOTHING,  # drops none
    "data.overlong=cut": NOTHING,  # none is overlong
    "data.check=exact": EVALUATIONS,
    "optimizer.name=adamw": SFT,
    "optimizer.lr=[1e-3,2e-3]": TRAIN_1,
    "optimizer.weight_decay=0.1": SFT,
    "optimizer.alpha=0.9": SFT,
    "optimizer.betas=[0.8,0.9]": SFT,
    "optimizer.eps=1e-6": SFT,
    "optimizer.states=bf16": SFT,
    "optimizer.max_grad_norm=2": SFT,
    "loss.objective=space": TRAIN,
    "loss.mu=2.5": TRAIN,
    "loss.link=hinge": TRAIN,
    "loss.beta=0.3": TRAIN,
    "loss.sft_weight=0.1": TRAIN,
    "loss.reference=start": TRAIN_1,  # and one more stage; at iteration 0 the start is the opponent
    "loss.alpha=0.2": TRAIN_1,
    "loss.length_normalised=true": TRAIN,
    "loss.real_floor=0.1": TRAIN,
    "loss.history_weight=0.1": TRAIN_1,  # iteration 0 has no earlier answers
    "loss.router_aux_weight=0.1": TRAIN,
    "publish.hub=a/b": NOTHING,
    "publish.private=false": NOTHING,
    "schedule.iterations=3": NOTHING,  # four more stages
    "schedule.epochs=2": TRAIN,
    "schedule.batch_size=5": SFT,
    "schedule.warmup_ratio=0.5": SFT,
    "schedule.replay=previous": SCORE_1,
    "schedule.sft_epochs=2": SFT,
    "schedule.sft_lr=1e-3": SFT,
    "schedule.stop=no_gain": SFT,  # through data.validation; it is in no key itself
    "schedule.patience=2": NOTHING,
    "generation.temperature=0.5": ANSWERS,
    "generation.top_p=0.9": ANSWERS,
    "generation.max_new_tokens=64": ANSWERS,
    "generation.num_answers=2": PAIRS,
    "generation.batch_size=5": ANSWERS,  # changes rounding, like the next
    "generation.tokens=900": ANSWERS,
    "generation.engine=vllm": ANSWERS,
    "generation.python=a": NOTHING,  # used with vllm, like the next three
    "generation.tensor_parallel=2": NOTHING,
    "generation.data_parallel=2": NOTHING,
    "generation.gpu_memory=0.5": NOTHING,
    "engine.name=deepspeed": SFT,  # changes the rounding of training
    "engine.device=cpu": NOTHING,  # what auto selects
    "engine.precision=OTHER": EVERYTHING,
    "engine.layout=padded": EVERYTHING,
    "engine.tokens_per_batch=1500": EVERYTHING,  # changes rounding, like the next
    "engine.head_chunk=20": EVERYTHING,
    "engine.gradient_checkpointing=true": NOTHING,  # the same bits
    "engine.compile=true": SFT,
    "engine.zero_stage=1": SFT,  # through engine=deepspeed, like the next; neither is in a key itself
    "engine.offload_optimizer=true": SFT,
    "evaluation.name=other": NOTHING,
    "evaluation.enabled=false": NOTHING,  # four stages fewer
    "evaluation.samples=2": NOTHING,
    "evaluation.bootstrap=51": EVALUATIONS,
    "evaluation.embedder=COPY": EVALUATIONS,
    "evaluation.select=harness": NOTHING,
    "evaluation.harness=[spin_choice:0:acc]": NOTHING,  # four more stages
    "evaluation.harness_include=TASKS": NOTHING,
    "evaluation.harness_limit=3": NOTHING,
    "evaluation.harness_batch_size=3": NOTHING,
    "evaluation.questions=QUESTIONS": NOTHING,  # four more stages
    "evaluation.judge=http://127.0.0.1:9/v1": NOTHING,  # two more stages
    "evaluation.judge_model=a": NOTHING,
    "evaluation.judge_timeout=9": NOTHING,
    "store.path=COPY": NOTHING,
    "cache.path=COPY": NOTHING,
    "checkpoint.minutes=1": NOTHING,
    "checkpoint.steps=3": NOTHING,
    "checkpoint.shard_size=5": ANSWERS,  # changes rounding: no batch exceeds a shard
    "checkpoint.shard_size=5000": NOTHING,  # more than there are answers
    "tracking.wandb=offline": NOTHING,
    "tracking.project=other": NOTHING,
    "tracking.entity=other": NOTHING,
    "tracking.policies=all": NOTHING,
}


# The other settings that a setting needs to have an effect.
LORA, MIXTURE, ADAMW = ["model.adapter=lora"], ["loss.reference=mixture"], ["optimizer=adamw"]
SPACE, HARNESS = ["loss=space"], ["evaluation.harness_include=TASKS", "evaluation.harness=[spin_choice:0:acc]"]
CHAT = ["data.template=chat"]
GIVEN = {
    "data.template_options": CHAT,
    "data.generated": ["data.path=PREFERENCES", "data.format=auto"],
    "model.adapter": ["model.lora_rank=5"],
    "data.config": ["data.path=SPLITS"],
    "data.splits": ["data.path=SPLITS"],
    "optimizer.name": ["optimizer.eps=1e-7"],
    "optimizer.betas": ADAMW,
    "engine.zero_stage": ["engine=deepspeed"],
    "engine.offload_optimizer": ["engine=deepspeed"],
    "model.lora_rank": LORA,
    "model.lora_alpha": LORA,
    "model.lora_targets": LORA,
    "model.merge": LORA,
    "model.quantization": LORA,
    "loss.alpha": MIXTURE,
    "loss.objective": ["loss.beta=null", "loss.mu=3.5"],
    "loss.mu": SPACE,
    "loss.router_aux_weight": ["model.path=EXPERTS"],
    "schedule.stop": ["data.validation=6"],
    "evaluation.select": HARNESS,
    "evaluation.harness": ["evaluation.harness_include=TASKS"],
    "evaluation.judge": ["evaluation.judge_model=a"],
}
POLICIES = ("start", "sft", "iter 0", "iter 1")
VALIDATIONS, BENCHMARKS = ({(stage, name) for name in POLICIES} for stage in ("validate", "harness"))
EXTRA = {
    "schedule.iterations=3": {(stage, "iter 2") for stage in ("generate", "score", "train", "evaluate")},
    "model.merge=true": {("merge", "iter1")},
    "data.validation=6": VALIDATIONS,
    "schedule.stop=no_gain": VALIDATIONS,
    "evaluation.select=harness": BENCHMARKS,
    "evaluation.harness=[spin_choice:0:acc]": BENCHMARKS,
    "evaluation.questions=QUESTIONS": {("mt_bench", name) for name in POLICIES},
    "evaluation.judge=http://127.0.0.1:9/v1": {("compare", "iter 0"), ("compare", "iter 1")},
}
UNTESTED = {"stage", "evaluation.against"}  # declare other stages: tests/pipeline/test_game.py


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("keys"), games)
    experts = f"model.path={model_folder('qwen3_moe', place.folder / 'experts')}"
    for number, words in enumerate(([], LORA, MIXTURE, ADAMW, SPACE, CHAT, [experts])):
        place.play(*words, run=f"run{number}")
    return place


def prepare(place: Place, *words: str) -> Run:
    given = {word.lstrip("+").split("=")[0] for word in words}
    settings = {
        "cache.path": place.folder / "cache",
        "store.path": place.folder / "store",
        "tracking.wandb": "disabled",
        "evaluation.bootstrap": 50,
    }
    config = load("experiment=smoke", *(f"{k}={v}" for k, v in settings.items() if k not in given), *words)
    # The check of vLLM would fail here; the keys do not depend on it.
    transformers = config.generation.model_copy(update={"engine": "transformers"})
    folder = place.folder / "none"
    run = prepare_run(
        config.model_copy(update={"generation": transformers}), folder, Tracker(folder, name="", config={}, rank=1)
    )
    run.config = config
    return run


def plan(place: Place, *words: str) -> list:
    run = prepare(place, *words)
    return look_up(run, declare(run)[1])


def resolve(word: str, place: Place, folder: Path) -> str:
    """Replace the placeholder in a word of TABLE."""
    key, _, value = word.partition("=")
    if value == "OTHER":
        engine = load("experiment=smoke").engine
        current = select_dtype(engine, select_device(engine))
        return f"{key}={'fp32' if current == torch.bfloat16 else 'bf16'}"
    if value == "EXPERTS":
        return f"{key}={place.folder}/experts"
    if value == "TASKS":
        return f"{key}={ROOT}/tests/tasks"
    if value == "QUESTIONS":
        question = '{"question_id": %d, "category": "writing", "turns": ["a", "b"]}'
        (folder / "question.jsonl").write_text("".join(question % i + "\n" for i in range(81, 161)))
        return f"{key}={folder}/question.jsonl"
    if value == "PREFERENCES":
        rows = [json.loads(line) for line in (ASSETS / "pairs.jsonl").read_text().splitlines()]
        rows = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": row["response"][::-1]} for row in rows]
        (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{key}={folder}/preferences.jsonl"
    if value == "SPLITS":
        (folder / "set").mkdir()
        shutil.copy(ASSETS / "pairs.jsonl", folder / "set" / "train.jsonl")
        return f"{key}={folder}/set"
    if value not in ("COPY", "CHANGED", "SHUFFLED"):
        return word
    if key == "data.path":
        lines = (ASSETS / "pairs.jsonl").read_text().splitlines()
        (folder / "mine.jsonl").write_text("\n".join(lines[::-1] if value == "SHUFFLED" else lines) + "\n")
        return f"{key}={folder}/mine.jsonl"
    model = next((place.folder / "cache").glob("tiny-*[0-9]"))
    if key == "evaluation.embedder":
        return f"{key}={model}"
    source = model if key == "model.path" else place.folder / key.split(".")[0]
    shutil.copytree(source, folder / "copy")
    if value == "CHANGED":
        weights = load_file(folder / "copy" / "model.safetensors")
        weights["model.norm.weight"][0] += 0.5
        save_file(weights, folder / "copy" / "model.safetensors", metadata={"format": "pt"})
    return f"{key}={folder}/copy"


@pytest.mark.parametrize(("word", "kind"), TABLE.items(), ids=TABLE)
def test_key(played, tmp_path, word, kind):
    given = GIVEN.get(word.lstrip("+").partition("=")[0], [])
    planned = plan(played, *(resolve(entry, played, tmp_path) for entry in [*given, word]))
    replayed = [(entry.stage, entry.subject) for entry in planned if entry.status != "reuse"]
    assert {entry for entry in replayed if entry not in ORDER} == EXTRA.get(word, set())
    assert [entry for entry in ORDER if entry in replayed] == PLAYED_AGAIN[kind]


def test_table_is_complete():
    def keys(section, prefix=""):
        for name, value in section:
            if isinstance(value, schema.Section):
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    varied = {word.lstrip("+").split("=")[0] for word in TABLE}
    assert varied | UNTESTED == set(keys(load())) and not varied & UNTESTED


def test_table_leaves_no_default(played, tmp_path):
    """Every value in TABLE differs from that of the smoke game."""
    default = load("experiment=smoke", "evaluation.bootstrap=50", "tracking.wandb=disabled")
    for number, word in enumerate(TABLE):
        key = word.lstrip("+").partition("=")[0]
        folder = tmp_path / str(number)
        folder.mkdir()
        words = [resolve(entry, played, folder) for entry in [*GIVEN.get(key, []), word]]
        values = [attrgetter(key)(config) for config in (default, load("experiment=smoke", *words))]
        assert values[0] != values[1], word


@pytest.mark.parametrize("words", [["iter=0"], ["iter=2"], ["iter=5"]])
def test_iterations_are_reused(played, words):
    planned = plan(played, *words)
    reused = [(entry.stage, entry.subject) for entry in planned if entry.status == "reuse"]
    assert reused == ORDER[: len(reused)] and len(reused) == min(len(ORDER), len(planned))


def test_key_of_a_changed_template(played, tmp_path):
    """Stages that use or copy the tokenizer and the template of a policy depend on them, not only on its weights."""
    words = [resolve(word, played, tmp_path) for word in ("model.path=COPY", "evaluation.questions=QUESTIONS")]

    def keys(*more: str) -> list[str]:
        run = prepare(played, *words, *more)
        stages = (
            Benchmark(None, run.start, Task("spin_choice", 0, "acc")),
            MtBench(None, run.start),
            Merge(None, run.start),
        )
        return [key_of(stage.inputs(run, run.start)) for stage in stages]

    before, other_tokens = keys(), keys("generation.tokens=900")
    assert other_tokens[0] == before[0] and other_tokens[1] != before[1]  # only MT-Bench decodes with our batches
    template = tmp_path / "copy" / "chat_template.jinja"
    template.write_text("{# mine #}" + template.read_text())
    assert all(new != old for new, old in zip(keys(), before, strict=True))


def test_threads_change_no_key(played):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(entry.status == "reuse" for entry in plan(played))
    finally:
        torch.set_num_threads(before)
