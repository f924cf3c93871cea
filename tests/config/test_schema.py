"""The boundary: what a user types is checked before anything heavy is even imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.config import hydra, schema
from spin.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


composed, load = hydra.compose, hydra.load


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loss.beta=abc", "loss.beta=abc: must be a number"),
        ("loss.beta=-1", "loss.beta=-1: must be above 0"),
        ("loss.beta=.nan", "loss.beta"),
        ("loss.beta=null", "loss.beta=null"),
        ("loss.beta=true", "loss.beta=True"),
        ("loss.link=foo", "loss.link=foo: must be one of logistic, hinge, exponential, correlation"),
        ("optimizer.lr=0", "optimizer.lr=0: must be above 0"),
        ("optimizer.lr=[1e-6,x]", "optimizer.lr=x: must be a number"),
        ("optimizer.lr=[1e-6]", "has 1 entries, but 2 iterations are played"),
        ("iter=-1", "iter=-1: must be 0 or more"),
        ("iter=2.5", "iter: Value '2.5'"),
        ("seed=x", "seed: Value 'x'"),
        ("data.max_length=20", "must exceed data.max_prompt_length"),
        ("data.template=plain", "data.template=plain: must be chat, paper, or a text with {prompt}"),
        ("engine.tokens_per_batch=8", "must be engine.tokens_per_row"),
        ("schedule.iterations=0", "schedule.iterations=0: must be 1 or more"),
        ("generation.temperature=-1", "generation.temperature=-1"),
        ("generation.top_p=0", "generation.top_p=0"),
        ("+foo=1", "foo"),
        ("+loss.foo=1", "foo"),
        ("data=local", "data.path=null: must name the data"),
    ],
)
def test_bad_values_are_named_in_one_line(override, says):
    with pytest.raises(UserError) as error:
        load(override)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["loss.betta=1"], "loss.betta: there is no such setting. Did you mean loss.beta?"),
        (
            ["optimizer=sgdd"],
            "optimizer=sgdd: there is no such choice. There are: adamw, adamw8bit, rmsprop, rmsprop8bit",
        ),
        (["loss.beta=-1"], "loss.beta=-1: must be above 0."),
        (["loss.beta=[1"], "no viable alternative"),
        (["iter=x"], "iter: Value 'x'"),
        (["model.path=/nowhere/at/all", "data=tiny"], "model.path=/nowhere/at/all: no such folder."),
        (
            ["model.path=some/name", "data=tiny"],
            "no such folder, and the Hugging Face hub does not have it or cannot be reached",
        ),
        (["model=tiny", "data=local", "data.path=gone.jsonl"], "gone.jsonl"),
    ],
)
def test_the_command_answers_with_one_line_and_status_1(words, says, tmp_path):
    where = [f"hydra.run.dir={tmp_path}/run", f"store.path={tmp_path}/store", f"cache.path={tmp_path}/cache"]
    done = subprocess.run(
        [sys.executable, "run.py", *words, *where], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not done.stdout


def test_every_choice_of_every_group_composes_into_the_schema():
    for group in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        for choice in sorted(group.glob("*.yaml")):
            load(f"{group.name}={choice.stem}", *(["data.path=x"] if choice.stem == "local" else []))


def test_every_key_has_a_comment():
    for path in (ROOT / "conf").rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        head = path.read_text().startswith("#")
        for line in lines:
            key, _, rest = line.strip().partition(":")
            if (
                rest.strip()
                and not line.strip().startswith("-")
                and key.isidentifier()
                and "job_logging" not in path.parts
            ):
                assert "#" in rest or head, f"{path.name}: {line}"


def test_iter_is_a_value_and_plays_up_to_and_including_it():
    assert load("iter=2").iterations == 3
    assert load("iter=0").iterations == 1
    assert load().iterations == 2
    assert load("model=zephyr", "iter=2", "loss.beta=0.1").model.path == "alignment-handbook/zephyr-7b-sft-full"


def test_the_papers_schedule_and_a_number_that_holds_for_all():
    paper = load("schedule=paper", "model=zephyr", "data=ultrachat")
    assert [schema.value_at_iteration(paper.optimizer.lr, t) for t in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [schema.value_at_iteration(paper.loss.beta, t) for t in range(4)] == [0.1, 0.1, 0.1, 5.0]
    assert paper.iterations == 4 and paper.schedule.sft_epochs == 0 and paper.schedule.replay == "previous"
    assert paper.optimizer.name == "rmsprop" and paper.schedule.batch_size == 64
    flat = load("schedule=paper", "loss.beta=0.1")
    assert [schema.value_at_iteration(flat.loss.beta, t) for t in range(4)] == [0.1] * 4


def test_sft_comes_first_where_the_start_has_not_seen_the_data():
    assert load().schedule.sft_epochs == 1
    assert load("model=zephyr").schedule.sft_epochs == 0
    assert load("model=zephyr", "schedule.sft_epochs=2").schedule.sft_epochs == 2


def test_generation_may_be_as_long_as_the_human_answers():
    assert load().max_new_tokens == load().data.max_response_length
    assert load("generation.max_new_tokens=7").max_new_tokens == 7
    assert load("data.max_response_length=null").max_new_tokens == 256


def test_the_defaults_of_schema_and_files_name_the_same_keys():
    keys = set(OmegaConf.to_container(composed(), resolve=False))
    assert keys - {"experiment"} == set(schema.Config.__dataclass_fields__)


def test_help_shows_the_groups_and_the_commands():
    done = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("model: ", "schedule: ", "zephyr", "python run.py model=zephyr iter=2 loss.beta=0.1", "--cfg job"):
        assert word in done.stdout


def test_imports_run_one_way():
    """run -> game -> {opponent, train, evaluate} -> {logps, model, pairs, data} -> loss; heavy optional ones inside."""
    text = {path.stem: path.read_text() for path in (ROOT / "spin").glob("*.py")}

    def imports(name: str, *modules: str) -> bool:
        lines = [line for line in text[name].splitlines() if line.startswith(("import ", "from "))]
        return any(module in line.split() or f"spin.{module}" in line.split() for line in lines for module in modules)

    assert not any("spin" in line for line in text["loss"].splitlines() if line.startswith(("import", "from")))
    for name in text:
        assert not imports(name, "wandb", "deepspeed", "vllm", "lm_eval", "peft", "bitsandbytes"), name
        assert name == "config" or not imports(name, "omegaconf", "hydra"), name
        assert not imports(name, "game"), name
        assert not imports(name, "stages") or name in ("game", "plan"), name
    for low in ("logps", "model", "pairs", "data", "readers", "packages", "track", "loss", "engine", "report", "sweep"):
        assert not imports(low, "opponent", "train", "evaluate"), low
    for service in ("sealed", "checkpoint", "store", "interrupt", "ranks"):  # they know nothing of the game
        own = {line.split()[1] for line in text[service].splitlines() if line.startswith("from spin")}
        assert own <= {"spin.sealed", "spin.errors", "spin.interrupt", "spin.ranks"}, service
    assert "utils" not in text


def test_runs_are_named_after_the_users_own_model_and_data():
    assert load().name == "smollm2-sharegpt"
    assert load("model=zephyr").name == "zephyr-sharegpt"
    assert load("model.path=org/My-Model", "data=local", "data.path=/x/my pairs.jsonl").name == "My-Model-my_pairs"


def test_sweep_points_have_folders_of_their_own():
    long = ",".join(f"loss.beta={i}" for i in range(40))
    names = {
        hydra.slug(text) for text in ("model.path=org/A", "model.path=org_A", "model.path=org/B", long, long + "1")
    }
    assert len(names) == 5 and all(len(name) <= 120 and "/" not in name for name in names)
    assert hydra.slug("loss.beta=0.1,optimizer.lr=1e-06") == "loss.beta=0.1,optimizer.lr=1e-06"


def test_the_learning_rate_suits_the_model():
    assert load().optimizer.lr == 5e-6
    assert load("model=zephyr").optimizer.lr == 5e-7
    assert load("model=zephyr", "optimizer.lr=[1e-6,1e-7]").optimizer.lr == [1e-6, 1e-7]


def hydras(words: str, **env: str) -> str:
    """What a shell prints for a command that Hydra answers."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", words],
        cwd=ROOT,
        env={**os.environ, **env, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


def test_tab_completes_choices_and_keys():
    """Through the function that `eval "$(python run.py -sc install=bash)"` leaves in a shell."""
    ask = 'eval "$(python run.py -sc install=bash)"; COMP_CWORD=2; for word in "loss=" "loss.b"; do '
    ask += (
        'COMP_LINE="python run.py $word"; COMP_POINT=${#COMP_LINE}; hydra_bash_completion; echo "${COMPREPLY[@]}"; done'
    )
    links = [f"loss={path.stem}" for path in sorted((ROOT / "conf" / "loss").glob("*.yaml"))]
    assert hydras(ask).splitlines() == [" ".join(links), "loss.beta="]


def test_the_configuration_is_shown_as_composed_and_where_it_comes_from():
    shown = OmegaConf.create(hydras("python run.py model=zephyr loss=hinge --cfg job"))
    assert (
        shown.model.lr == 5e-7 and shown.loss.link == "hinge" and set(shown) >= set(schema.Config.__dataclass_fields__)
    )
    assert re.search(r"\| loss/hinge +\| loss ", hydras("python run.py loss=hinge --info defaults"))


def test_log_lines_of_a_library_are_shown_on_demand(tmp_path):
    here = f"cache.path={tmp_path}/c store.path={tmp_path}/s hydra.run.dir={tmp_path}/r tracking.wandb=disabled"
    shown = hydras(f"python run.py experiment=smoke plan=true 'hydra.verbose=[filelock]' {here} 2>&1")
    assert re.search(r"^\[.*\]\[filelock\]\[DEBUG\] Lock \d+ acquired", shown, re.M) and "0 stages to reuse" in shown
