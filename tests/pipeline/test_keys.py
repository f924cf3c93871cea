"""A stage's key changes with what decides its content, and with nothing else: every setting, on a game that is played."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from spin.config import schema
from spin.game import turns
from spin.pipeline.plan import look_up
from spin.pipeline.stages import Stages
from spin.runtime.tracking import Tracker
from tests.config.test_schema import load
from tests.games import Place

NOTHING = "nothing"  # every stage is reused
EVALUATIONS = "evaluations"  # the evaluations alone
EVERYTHING = "everything"
SFT = "sft"  # the SFT stage and all that follows; the start's evaluation stays
ANSWERS = "answers"  # whatever is generated, and what follows; the SFT stage stays
TRAIN = "train"  # iteration 0's training and what follows; its pairs and scores stay
SCORE_1 = "score 1"  # iteration 1's scores and what follows
PAIRS = "pairs"  # what is generated to train on, and what follows; the evaluations before stay
REFERENCE = (
    "reference"  # iteration 1's pairs are scored once more, and what follows; at iteration 0 start and opponent are one
)

ORDER = [
    ("evaluate", "start"),
    ("sft", "start"),
    ("evaluate", "sft"),
    *((stage, f"iter {t}") for t in (0, 1) for stage in ("generate", "score", "train", "evaluate")),
]
PLAYED_AGAIN = {
    NOTHING: [],
    EVALUATIONS: [one for one in ORDER if one[0] == "evaluate"],
    EVERYTHING: ORDER,
    SFT: ORDER[1:],
    ANSWERS: [one for one in ORDER if one != ("sft", "start")],
    TRAIN: ORDER[ORDER.index(("train", "iter 0")) :],
    SCORE_1: ORDER[ORDER.index(("score", "iter 1")) :],
    PAIRS: ORDER[ORDER.index(("generate", "iter 0")) :],
    REFERENCE: ORDER[ORDER.index(("score", "iter 1")) :],
}
# For every setting: a value, and what it makes to be played again. COPY: a copy of the model's or the data's file.
TABLE = {
    "name=other": NOTHING,
    "seed=1": EVERYTHING,
    "plan=true": NOTHING,
    "stage=game": NOTHING,
    "iter=1": NOTHING,
    "model.name=other": NOTHING,
    "model.path=COPY": NOTHING,  # the weights' content counts, not where they lie
    "model.path=CHANGED": EVERYTHING,
    "model.revision=abc": NOTHING,  # of a hub name
    "model.package='a==1'": NOTHING,  # the path wins
    "model.package_sha256=a": NOTHING,
    "model.file=a": NOTHING,
    "model.file_sha256=a": NOTHING,
    "model.sft_epochs=2": SFT,
    "model.lr=2e-3": TRAIN,
    "model.adapter=lora": SFT,
    "model.lora_rank=4": NOTHING,  # without an adapter, as the next three
    "model.lora_alpha=4": NOTHING,
    "model.lora_targets=[q_proj]": NOTHING,
    "model.merge=false": NOTHING,
    "model.quantization=none": NOTHING,  # nf4 needs an adapter
    "data.name=other": NOTHING,
    "data.path=COPY": NOTHING,  # the examples count, not their file's name
    "data.path=SHUFFLED": NOTHING,  # nor their order in it
    "data.revision=abc": NOTHING,  # of a hub name
    "data.splits=[]": NOTHING,
    "data.package='a==1'": NOTHING,  # the path wins
    "data.package_sha256=a": NOTHING,
    "data.file=a": NOTHING,
    "data.format=auto": NOTHING,  # the same records, found out
    "data.turns=all": NOTHING,  # the set has one turn
    "data.template='Q: {prompt} A: '": EVERYTHING,
    "data.filter=prose": NOTHING,  # drops none
    "data.size=20": SFT,  # what is held out stays the same
    "data.held_out=7": EVERYTHING,
    "data.max_prompt_length=120": NOTHING,  # drops none
    "data.max_response_length=100": ANSWERS,  # drops none, but caps the generated answers
    "data.min_response_length=2": NOTHING,  # drops none
    "data.max_length=250": NOTHING,  # drops none
    "data.overlong=cut": NOTHING,  # none is overlong
    "data.check=exact": EVALUATIONS,
    "optimizer.name=adamw": SFT,
    "optimizer.lr=[1e-3,2e-3]": "iteration 1's training",
    "optimizer.weight_decay=0.1": SFT,
    "optimizer.alpha=0.9": SFT,
    "optimizer.betas=[0.9,0.999]": NOTHING,  # with adamw
    "optimizer.eps=1e-6": SFT,
    "optimizer.states=bf16": SFT,
    "optimizer.max_grad_norm=2": SFT,
    "loss.link=hinge": TRAIN,
    "loss.beta=0.3": TRAIN,
    "loss.sft_weight=0.1": TRAIN,
    "loss.reference=start": REFERENCE,
    "loss.alpha=0.2": NOTHING,  # goes with reference=mixture
    "loss.length_normalised=true": TRAIN,
    "schedule.name=other": NOTHING,
    "schedule.iterations=2": NOTHING,
    "schedule.epochs=2": TRAIN,
    "schedule.batch_size=5": SFT,
    "schedule.warmup_ratio=0.5": SFT,
    "schedule.replay=previous": SCORE_1,
    "schedule.sft_epochs=2": SFT,
    "schedule.sft_lr=1e-3": SFT,
    "generation.name=other": NOTHING,
    "generation.temperature=0.5": ANSWERS,
    "generation.top_p=0.9": ANSWERS,
    "generation.max_new_tokens=64": ANSWERS,
    "generation.num_answers=2": PAIRS,
    "generation.batch_size=5": ANSWERS,  # by rounding, as the next
    "generation.tokens=900": ANSWERS,
    "generation.engine=transformers": NOTHING,  # vllm: tests/generation/test_vllm.py
    "generation.python=a": NOTHING,  # with vllm, as the next three, which change answers by rounding
    "generation.tensor_parallel=2": NOTHING,
    "generation.data_parallel=2": NOTHING,
    "generation.gpu_memory=0.5": NOTHING,
    "engine.name=deepspeed": SFT,  # rounds in other ways where it trains; scores and answers are computed alike
    "engine.device=cpu": NOTHING,  # what auto finds
    "engine.precision=OTHER": EVERYTHING,
    "engine.layout=padded": EVERYTHING,
    "engine.tokens_per_row=300": EVERYTHING,  # by rounding, as the next two
    "engine.tokens_per_batch=1500": EVERYTHING,
    "engine.head_chunk=20": EVERYTHING,
    "engine.gradient_checkpointing=true": NOTHING,  # the same bits
    "engine.zero_stage=3": NOTHING,  # with deepspeed, as the next
    "engine.offload_optimizer=false": NOTHING,
    "evaluation.name=other": NOTHING,
    "evaluation.enabled=false": NOTHING,
    "evaluation.samples=2": NOTHING,
    "evaluation.bootstrap=51": EVALUATIONS,
    "evaluation.embedder=COPY": EVALUATIONS,
    "evaluation.against=null": NOTHING,  # goes with stage=evaluate
    "evaluation.harness=[]": NOTHING,
    "evaluation.harness_include=null": NOTHING,
    "evaluation.harness_limit=3": NOTHING,
    "evaluation.harness_batch_size=3": NOTHING,
    "evaluation.questions=null": NOTHING,
    "evaluation.judge=null": NOTHING,
    "evaluation.judge_model=a": NOTHING,
    "evaluation.judge_timeout=9": NOTHING,
    "store.path=COPY": NOTHING,
    "cache.path=COPY": NOTHING,
    "checkpoint.minutes=1": NOTHING,
    "checkpoint.steps=3": NOTHING,
    "checkpoint.shard_size=5": NOTHING,
    "tracking.wandb=offline": NOTHING,
    "tracking.project=other": NOTHING,
    "tracking.entity=other": NOTHING,
}


@pytest.fixture(scope="module")
def played(tmp_path_factory, games):
    place = Place(tmp_path_factory.mktemp("keys"), games)
    place.play()
    return place


def plan(place: Place, *words: str) -> list:
    given = {word.lstrip("+").split("=")[0] for word in words}
    settings = {
        "cache.path": place.folder / "cache",
        "store.path": place.folder / "store",
        "tracking.wandb": "disabled",
        "evaluation.bootstrap": 50,
    }
    config = load("experiment=smoke", *(f"{k}={v}" for k, v in settings.items() if k not in given), *words)
    stages = Stages(config, place.folder / "none", Tracker(place.folder / "none", name="", config={}, rank=1))
    return look_up(turns, config, stages)


def made_concrete(word: str, place: Place, tmp_path) -> str:
    key, _, value = word.partition("=")
    if value == "OTHER":
        here = plan_precision(place)
        return f"{key}={'fp32' if here == 'bfloat16' else 'bf16'}"
    if value not in ("COPY", "CHANGED", "SHUFFLED"):
        return word
    if key == "data.path":
        lines = (schema_assets() / "pairs.jsonl").read_text().splitlines()
        (tmp_path / "mine.jsonl").write_text("\n".join(lines[::-1] if value == "SHUFFLED" else lines) + "\n")
        return f"{key}={tmp_path}/mine.jsonl"
    if key == "evaluation.embedder":
        return f"{key}={next((place.folder / 'cache').glob('tiny-*[0-9]'))}"
    if key == "model.path":
        copy = tmp_path / "model"
        shutil.copytree(next((place.folder / "cache").glob("tiny-*[0-9]")), copy)
        if value == "CHANGED":
            weights = load_file(copy / "model.safetensors")
            weights["model.norm.weight"][0] += 0.5
            save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return f"{key}={copy}"
    shutil.copytree(place.folder / key.split(".")[0], tmp_path / "copy")
    return f"{key}={tmp_path}/copy"


def schema_assets():
    from spin.data.sources import ASSETS

    return ASSETS


def plan_precision(place: Place) -> str:
    from spin.engines.base import select_device, select_dtype

    engine = load("experiment=smoke").engine
    return str(select_dtype(engine, select_device(engine))).removeprefix("torch.")


@pytest.mark.parametrize(("word", "kind"), TABLE.items(), ids=TABLE)
def test_what_must_change_a_key_does_and_what_must_not_does_not(played, tmp_path, word, kind):
    planned = plan(played, made_concrete(word, played, tmp_path))
    again = [(one.stage, one.of) for one in planned if one.status != "reuse"]
    if kind == "iteration 1's training":
        assert again == ORDER[ORDER.index(("train", "iter 1")) :]
    else:
        assert again == PLAYED_AGAIN[kind]
    if kind == REFERENCE:
        assert [one.status for one in planned if (one.stage, one.of) == ("score", "iter 1")] == ["reuse", "play"]
    elif word != "evaluation.enabled=false":
        assert [(one.stage, one.of) for one in planned] == ORDER


def test_every_setting_is_in_the_table():
    groups = {name for name, value in load() if isinstance(value, schema.Section)}
    assert {word.split("=")[0] for word in TABLE} == set(schema.settings()) - groups


@pytest.mark.parametrize("words", [["iter=0"], ["iter=2"], ["iter=5"]])
def test_more_iterations_reuse_what_is_there(played, words):
    planned = plan(played, *words)
    reused = [(one.stage, one.of) for one in planned if one.status == "reuse"]
    assert reused == ORDER[: len(reused)] and len(reused) == min(len(ORDER), len(planned))


def test_the_number_of_threads_changes_no_key(played):
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(one.status == "reuse" for one in plan(played))
    finally:
        torch.set_num_threads(before)
