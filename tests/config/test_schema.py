"""The validation of settings, before any heavy import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from spin.config import hydra, schema
from spin.config.load import changed_settings, load_config
from spin.config.schema import CONF
from spin.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


composed, load = hydra.compose, hydra.load


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.beta=abc", "loss.beta=abc: must be a valid number"),
        ("loss.beta=-1", "loss.beta=-1: must be greater than 0"),
        ("loss.beta=.nan", "loss.beta"),
        ("loss.beta=null", "loss.beta=null"),
        ("loss.beta=true", "loss.beta=True"),
        ("loss.link=foo", "loss.link=foo: must be 'logistic', 'hinge', 'exponential' or 'correlation'"),
        ("optimizer.lr=0", "optimizer.lr=0: must be greater than 0"),
        ("optimizer.lr=[1e-6,x]", "optimizer.lr=x: must be a valid number"),
        ("optimizer.lr=[1e-6]", "optimizer.lr=[1e-06]: must have 2 entries or more, one per iteration"),
        ("iter=-1", "iter=-1: must be greater than or equal to 0"),
        ("iter=2.5", "iter=2.5: must be a valid integer"),
        ("seed=x", "seed=x: must be a valid integer"),
        ("data.max_length=20", "must exceed data.max_prompt_length"),
        ("data.template=plain", "data.template=plain: must be chat, paper, or a text with {prompt} in it"),
        ("schedule.iterations=-1", "schedule.iterations=-1: must be greater than or equal to 0"),
        ("generation.temperature=-1", "generation.temperature=-1"),
        ("generation.top_p=0", "generation.top_p=0: must be greater than 0"),
        ("generation.top_p=1.5", "generation.top_p=1.5: must be less than or equal to 1"),
        ("schedule.warmup_ratio=1", "schedule.warmup_ratio=1: must be less than 1"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay=inf: must be a finite number"),
        ("model.merge=x", "model.merge=x: must be a valid boolean"),
        ("model.lora_targets=[]", "model.lora_targets=[]: "),
        ("optimizer.betas=[0.9,0.99]", "optimizer.betas=[0.9, 0.99]: has no effect with optimizer=rmsprop"),
        ("engine.zero_stage=1", "engine.zero_stage=1: has no effect with engine=single"),
        ("+foo=1", "foo: there is no such setting."),
        ("+loss.betta=1", "loss.betta: there is no such setting. Did you mean loss.beta?"),
        ("~loss.beta", "loss.beta: has no value; a file of your own in conf/loss/ begins with"),
        ("data=local", "data.path=null: must name the data"),
        ("model.path=", "model.path=: must not be empty (a shell variable may be unset)."),
        ("evaluation.against=", "evaluation.against=: must not be empty"),
        ("model.lora_rank=4", "model.lora_rank=4: has no effect with model.adapter=none"),
        ("loss.alpha=0.2", "loss.alpha=0.2: has no effect with loss.reference=opponent"),
    ],
)
def test_bad_value(override, message):
    with pytest.raises(UserError) as error:
        load(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.betta=1"], "loss.betta: there is no such setting. Did you mean loss.beta?"),
        (
            ["optimizer=sgdd"],
            "optimizer=sgdd: there is no such choice. There are: adamw, adamw8bit, rmsprop, rmsprop8bit",
        ),
        (["loss.beta=-1"], "loss.beta=-1: must be greater than 0."),
        (["loss.beta=[1"], "no viable alternative"),
        (["iter=x"], "iter=x: must be a valid integer"),
        (["model.path=/nowhere/at/all", "data=tiny"], "model.path=/nowhere/at/all: no such folder."),
        (
            ["model.path=some/name", "data=tiny"],
            "no such folder, and the Hugging Face hub does not have it or cannot be reached",
        ),
        (["model=tiny", "data=local", "data.path=gone.jsonl"], "gone.jsonl"),
    ],
)
def test_command_error(words, message, tmp_path):
    folders = [f"hydra.run.dir={tmp_path}/run", f"store.path={tmp_path}/store", f"cache.path={tmp_path}/cache"]
    result = subprocess.run(
        [sys.executable, "run.py", *words, *folders], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not result.stdout


OPTIONS = [path for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name != "experiment" and path.stem != "base"]


@pytest.mark.parametrize("path", [*OPTIONS, *sorted(CONF.glob("experiment/*.yaml"))], ids=lambda path: path.stem)
def test_option_composes(path):
    load(f"{path.parent.name}={path.stem}", *(["data.path=x"] if path.stem == "local" else []))


@pytest.mark.parametrize(
    "words",
    [["generation=vllm", "generation.num_answers=4"], ["evaluation=open_llm_leaderboard", "evaluation.judge=x"]],
)
def test_every_option_takes_every_key(words):
    load(*words)


def uncommented(text: str) -> list[str]:
    """Return the keys with a value and the list items without a comment on their line or above their block."""
    missing, explained = [], False
    for line in text.splitlines():
        if "|-" in line:  # a multi-line text, the last key
            break
        key, _, value = line.partition(": ")
        if re.match(r"\s*#", line):
            explained = True
        elif " #" in line or not value:
            explained = False
        elif not explained:
            missing.append(key.strip())
    return missing


@pytest.mark.parametrize("path", [CONF / "config.yaml", *sorted(CONF.glob("*/base.yaml"))], ids=lambda path: str(path))
def test_keys_have_comments(path):
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith(("#", "  - override")))
    assert uncommented(text) == []


def test_uncommented():
    assert uncommented("a: 1  # why\nb: 2\ngroup:\n  c: 3\n  d: 4  # why\n") == ["b", "c"]


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_option_begins_with_a_comment(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")


def repeated(option: dict, base: dict) -> list[str]:
    """Return the keys of `option` whose value equals that in `base`."""
    return [key for key, value in option.items() if key in base and base[key] == value]


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_option_repeats_no_default(path):
    group = path.parent.name
    option, base = (OmegaConf.to_container(OmegaConf.load(file)) for file in (path, path.with_name("base.yaml")))
    assert "defaults" in option
    assert repeated(option.get(group, option), base) == []
    assert repeated({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["a"]


def test_base_is_complete():
    for path in CONF.glob("*/base.yaml"):
        section = schema.Config.model_fields[path.parent.name].annotation
        assert list(OmegaConf.load(path)) and set(OmegaConf.load(path)) == set(section.model_fields)


def test_section_from_defaults():
    greedy = schema.GenerationConfig.from_defaults(temperature=0.0)
    assert greedy == load("generation.temperature=0").generation
    with pytest.raises(UserError, match=r"^generation\.top_p=2: must be less than or equal to 1\.$"):
        schema.GenerationConfig.from_defaults(top_p=2)
    with pytest.raises(ValueError, match="frozen"):
        greedy.top_p = 0.5


# --- renamed keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["generation.answers=3", "generation.answers=3,4", "+generation.answers=3"])
def test_old_key_on_the_command_line(word, capsys):
    assert hydra.rename(word) == word.replace("answers", "num_answers")
    note = "note: generation.answers is now called generation.num_answers; the old name still works.\n"
    assert capsys.readouterr().out == note
    assert hydra.rename("generation.num_answers=3") == "generation.num_answers=3" and not capsys.readouterr().out


# --- the run's folder -------------------------------------------------------------------------------------------------


def test_old_key_in_a_yaml_file(capsys):
    settings = composed("experiment=smoke")
    with open_dict(settings):
        settings.generation.answers = 3
    assert load_config(settings).generation.num_answers == 3
    assert capsys.readouterr().out.startswith("note: generation.answers is now called generation.num_answers")


def folder(*words: str) -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [hydra.quote(hydra.rename(word)) for word in words]
        settings = compose("config", words, return_hydra_config=True)
        return settings.hydra.run.dir


def test_folder_of_the_default_run():
    assert folder() == folder("iter=1") == folder("iter=2", "plan=true") == "outputs/smollm2-sharegpt"
    unrelated = ["store.path=x", "cache.path=y", "tracking.project=z", "checkpoint.minutes=1", "engine.device=cpu"]
    assert folder(*unrelated, "generation.python=p", "schedule.stop=no_gain", "schedule.patience=2") == folder()
    assert folder("experiment=smoke", "iter=1") == "outputs/smoke"
    assert folder("model=zephyr", "iter=2") == "outputs/zephyr-sharegpt"


def test_folder_order():
    assert folder("loss.beta=0.2", "seed=1") == folder("seed=1", "iter=3", "loss.beta=0.1", "loss.beta=0.2")
    assert folder("seed=1", "loss.beta=0.2") == "outputs/smollm2-sharegpt-loss.beta-0.2-seed-1"
    assert folder("stage=evaluate", "model.path=x") == "outputs/x-sharegpt-evaluation"
    assert folder("generation.answers=2") == folder("generation.num_answers=2")


@pytest.mark.parametrize(
    "words",
    [
        ["loss.beta=0.2"],
        ["loss=hinge"],
        ["model=zephyr"],
        ["seed=1"],
        ["optimizer.lr=[1e-6,1e-7]"],
        ["model.path=a/X"],
        ["model.path=b/X"],
        ["experiment=smoke"],
        ["experiment=smoke", "model=smollm2"],
        ["data=local", "data.path=x.jsonl"],
        ["data=local", "data.path=x.json"],
        ["evaluation.bootstrap=9"],
        ["model.path=c/X-2"],
        ["model.path=" + "c/" * 60 + "X"],
    ],
)
def test_folders_differ(words):
    configurations = [
        [],
        ["loss.beta=0.3"],
        ["optimizer.lr=[1e-6,1e-8]"],
        ["model.path=c/X"],
        ["data=local", "data.path=y.jsonl"],
        ["data=local", "data.path=z/x.jsonl"],
        ["model.path=" + "c/" * 61 + "X"],
    ]
    assert len(folder(*words).removeprefix("outputs/")) < 100
    assert folder(*words) not in [folder(*configuration) for configuration in configurations]


def test_folder_in_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert folder("hydra.run.dir=~/runs/a") == folder("hydra.run.dir='~/runs/a'") == "/home/me/runs/a"
    assert hydra.rename("hydra.sweep.dir=~/s") == "hydra.sweep.dir=/home/me/s"


def test_iter():
    assert load("iter=2").iterations == 3
    assert load("iter=0").iterations == 1
    assert load().iterations == 2
    assert load("model=zephyr", "iter=2", "loss.beta=0.1").model.path == "alignment-handbook/zephyr-7b-sft-full"


def test_paper_schedule():
    paper = load("schedule=paper", "model=zephyr", "data=ultrachat")
    assert [schema.value_at_iteration(paper.optimizer.lr, t) for t in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [schema.value_at_iteration(paper.loss.beta, t) for t in range(4)] == [0.1, 0.1, 0.1, 5.0]
    assert paper.iterations == 4 and paper.schedule.sft_epochs == 0 and paper.schedule.replay == "previous"
    assert paper.optimizer.name == "rmsprop" and paper.schedule.batch_size == 64
    flat = load("schedule=paper", "loss.beta=0.1")
    assert [schema.value_at_iteration(flat.loss.beta, t) for t in range(4)] == [0.1] * 4


def test_default_sft_epochs():
    assert load().schedule.sft_epochs == 1
    assert load("model=zephyr").schedule.sft_epochs == 0
    assert load("model=zephyr", "schedule.sft_epochs=2").schedule.sft_epochs == 2


def test_max_new_tokens():
    assert load().max_new_tokens == load().data.max_response_length
    assert load("generation.max_new_tokens=7").max_new_tokens == 7
    assert load("data.max_response_length=null").max_new_tokens == 256


def test_help():
    result = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    for word in ("model: ", "schedule: ", "zephyr", "python run.py model=zephyr iter=2 loss.beta=0.1", "--cfg job"):
        assert word in result.stdout


def test_run_name():
    assert load().name == "smollm2-sharegpt"
    assert load("model=zephyr").name == "zephyr-sharegpt"
    assert load("model.path=org/My-Model", "data=local", "data.path=/x/my pairs.jsonl").name == "My-Model-my_pairs"
    assert hydra.basename(".", "x") == Path.cwd().name and hydra.basename("/", "x") == "x"
    assert hydra.basename("a/pairs.ndjson", "x") == hydra.basename("pairs.JSON", "x") == "pairs"


def test_sweep_folders():
    long = ",".join(f"loss.beta={i}" for i in range(40))
    names = {
        hydra.slug(text) for text in ("model.path=org/A", "model.path=org_A", "model.path=org/B", long, long + "1")
    }
    assert len(names) == 5 and all(len(name) < 100 and "/" not in name for name in names)
    assert hydra.slug("loss.beta=0.1,optimizer.lr=1e-06") == "loss.beta=0.1,optimizer.lr=1e-06"


def test_default_learning_rate():
    assert load().optimizer.lr == 5e-6
    assert load("model=zephyr").optimizer.lr == 5e-7
    assert load("model=zephyr", "optimizer.lr=[1e-6,1e-7]").optimizer.lr == [1e-6, 1e-7]


def shell_output(words: str, **env: str) -> str:
    """Return the output of a shell command that Hydra handles."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "--norc", "-c", words],
        cwd=ROOT,
        env={**os.environ, **env, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and not result.stderr, result.stdout + result.stderr
    return result.stdout


def test_tab_completion():
    """Completion works in a shell after `eval "$(python run.py -sc install=bash)"`."""
    script = 'eval "$(python run.py -sc install=bash)"; COMP_CWORD=2; for word in "loss=" "loss.b"; do '
    script += (
        'COMP_LINE="python run.py $word"; COMP_POINT=${#COMP_LINE}; hydra_bash_completion; echo "${COMPREPLY[@]}"; done'
    )
    links = [f"loss={path.stem}" for path in sorted((ROOT / "conf" / "loss").glob("*.yaml"))]
    assert shell_output(script).splitlines() == [" ".join(links), "loss.beta="]


def test_show_configuration():
    config = OmegaConf.create(shell_output("python run.py model=zephyr loss=hinge --cfg job"))
    assert config.model.lr == 5e-7 and config.loss.link == "hinge" and set(config) >= set(schema.Config.model_fields)
    assert re.search(r"\| loss/hinge +\| loss ", shell_output("python run.py loss=hinge --info defaults"))


def test_verbose_library(tmp_path):
    folders = f"cache.path={tmp_path}/c store.path={tmp_path}/s hydra.run.dir={tmp_path}/r tracking.wandb=disabled"
    output = shell_output(f"python run.py experiment=smoke plan=true 'hydra.verbose=[filelock]' {folders} 2>&1")
    assert re.search(r"^\[.*\]\[filelock\]\[DEBUG\] Lock \d+ acquired", output, re.M) and "0 stages to reuse" in output
    assert "24 training, 0 validation and 8 held-out examples (48 read, 32 kept, 16 not needed)" in output


# --- values as users type them ----------------------------------------------------------------------------------------

TEXTS = (
    """
~/x|a b|é-modèle|日本|br[1]|pa(r)|cu{r}ly|$HOME|q'uote|d"quote|both'"|back\\slash|end\\|h#ash|semi;x|am&p|lt<x|^x|ex!c|b`t
x=1,y=2|outputs/a-sweep/loss.beta=0.1,optimizer.lr=1e-06/iter0/policy|### {prompt}
""".strip()
    .replace("\n", "|")
    .split("|")
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_needs_no_hydra_quotes(text):
    for key in ("model.path", "evaluation.judge_model"):
        assert OverridesParser.create().parse_override(hydra.quote(f"{key}={text}")).value() == text
    if "=" in text or text[0] == "~":
        assert load(f"model.path={text}").model.path == text


def test_file_named_like_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1e3", "007", "a,b", "[x]", "true", "0.1", " end "):
        (tmp_path / name).mkdir()
        assert load(f"model.path={name}").model.path == name
    assert load("loss.beta=0.1").loss.beta == 0.1 and load("loss.mu=null").loss.mu is None


def test_quoted_words_stay():
    for word in (
        "a='x y'",
        'a="x y"',
        "a=[1,2]",
        "a={b: 1}",
        "a=1,2",
        "a=choice(1,2)",
        "~a",
        "-m",
        "a=${b.c}",
        "a=null",
        "a=",
    ):
        assert hydra.quote(word) == hydra.quote(word, True) == word


def test_values_of_a_sweep(tmp_path):
    assert hydra.quote("a=~/x,é,3", True) == "a='~/x','é',3"
    (tmp_path / "x=1,y=2").mkdir()
    assert hydra.quote(f"model.path={tmp_path}/x=1,y=2", True) == f"model.path='{tmp_path}/x=1,y=2'"


def test_commas_without_a_sweep(tmp_path):
    """The error shows two commands for a shell, and both work."""

    def run(word: str) -> subprocess.CompletedProcess:
        ending = f"seed=-1 hydra.run.dir={tmp_path}/r"  # an invalid seed ends each valid command
        command = f"{sys.executable} run.py {word} {ending}"
        return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)

    line = run("data.splits=train,test").stderr
    assert line.startswith("error: data.splits=train,test: for a list type ") and len(line.splitlines()) == 1
    words = re.search("for a list type (.+), for one text (.+), and for a sweep add -m", line)
    assert [run(word).stderr for word in words.groups()] == [
        "error: seed=-1: must be greater than or equal to 0.\n"
    ] * 2


def test_one_value_for_a_list():
    assert load("data.splits=train").data.splits == ["train"] and load().data.splits is None
    assert load("evaluation.harness=arc", "evaluation=none").evaluation.harness == ["arc"]
    assert load("optimizer.lr=1e-6").optimizer.lr == 1e-6


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_environment_is_stored_unresolved(monkeypatch):
    for name, value in {"RATIO": "0.25", "PLACE": "/data/x"}.items():
        monkeypatch.setenv(name, value)
    words = ["schedule.warmup_ratio=${oc.env:RATIO}", "evaluation.judge_model=${oc.env:NONE,x}"]
    config = load("model.path=${oc.env:PLACE}/m", *words)
    assert (config.schedule.warmup_ratio, config.model.path, config.evaluation.judge_model) == (0.25, "/data/x/m", "x")
    stored = config.shown
    assert (stored["schedule"]["warmup_ratio"], stored["model"]["path"]) == ("${oc.env:RATIO}", "${oc.env:PLACE}/m")
    assert OmegaConf.create(stored).evaluation.judge_model == "x" and stored["data"]["name"] == config.data.name
    assert load().shown["loss"] == load().loss.model_dump()


def test_changed_settings(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(load("loss.beta=0.1", "optimizer.lr=1e-6").shown)))
    config = load(
        "loss.beta=0.1", "optimizer.lr=1e-6", "iter=7", "tracking.project=x", "store.path=y", "engine.device=cpu"
    )
    assert changed_settings(path, config) == []
    assert changed_settings(path, load("loss.beta=0.2", "optimizer.lr=1e-6")) == ["loss.beta=0.1, not 0.2"]
    assert len(changed_settings(path, load("seed=3"))) == 2
    for text in ("", "{", "a: [", "- 1", "3", "\x00", "loss: 3"):
        path.write_text(text)
        assert changed_settings(path, load()) == []
    assert changed_settings(tmp_path / "none", load()) == []
