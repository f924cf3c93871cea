"""Tests of the report page and of the table at the end of a run, from the folder of a fabricated run."""

import io
import json
import re
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from spin.evaluation.external.harness import PAPER
from spin.evaluation.measure_table import COMPARED, MEASURES
from spin.reporting.report import describe_selection, verdict, write_report
from spin.reporting.summary import print_summary
from spin.reporting.text import code_block

FIGURES = {"measures", "logps", "margins", "lengths"}
NASTY = "Is a | b?\n\n```python\nx = [bold]1[/bold]\n```\n# no heading\n<b>&amp;</b> $x$ ![i](u) \x1b[31mred"


def with_interval(name, value, half):
    return {name: value, f"{name}_interval": [value - half, value + half]}


def evaluation(policy, iteration, better, interval=0.01):
    """Return the measures of a policy, which improve by 0.02 times `better`."""
    row = {"policy": policy, "iter": iteration, "n": 50}
    for name, value in (
        ("nll_per_token", 2.1 - 0.02 * better),
        ("human_likelier", 0.2 + 0.02 * better),
        ("length_auc", 0.8 - 0.02 * better),
        ("rouge_l", 0.2 + 0.02 * better),
        ("classifier_auc", 0.9 - 0.02 * better),
        ("mauve", 0.6 + 0.02 * better),
        ("diversity", 0.8),
        ("model_length", 20.0 + better),
        ("human_length", 31.0),
        ("finished", 0.9),
        ("distinct_2", 0.5),
    ):
        row |= with_interval(name, value, interval)
    if iteration is not None:
        row |= with_interval("margin", 1.5, 0.2) | with_interval("accuracy", 0.7, 0.05)
    return row


def difference(policy, against, **verdicts):
    """Return a comparison of two policies in all measures, with the given verdicts and "same" for the others."""
    names = [measure.name for measure in COMPARED if measure.name != "exact_match"]
    change = {"first": 2.0, "last": 1.9, "change": -0.1, "interval": [-0.15, 0.02], "verdict": "same"}
    rows = {name: {**change, "verdict": verdicts.get(name, "same")} for name in names}
    return {"policy": policy, "against": against, "n": 50, "measures": rows}


def write_fake_run(folder, iterations=2, steps=60, margins=True):
    """Write the folder of a run with `iterations` iterations and return the content of its game.json."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"iter": None, "step": 0, "stage": "sft", "loss": 2.0, "logps/real": -40.0}]
    game = {
        "command": "python run.py experiment=smoke iter=1",
        "name": "a|b *c* [red]",
        "model": "some/model",
        "data": {"train": 80, "held_out": 50, "validation": 0, "counts": {"prompt | too long": 3}},
        "iterations": [],
        "evaluations": [evaluation("start", None, 0), evaluation("sft", None, 1)],
        "selected": None,
        "validations": [],
        "external": [],
        "given_up": {},
        "differences": [difference("iter1", "sft", nll_per_token="better"), difference("iter1", "iter0")],
        "seconds": {"generate": 47.2, "train": 192.0},
        "peak_memory_gib": 1.234,
    }
    for t in range(iterations):
        iteration_folder = folder / f"iter{t}"
        iteration_folder.mkdir()
        real, generated = ([[5] * int(n) for n in rng.integers(1, high, 80)] for high in (60, 40))
        columns = {
            "id": [str(i) for i in range(80)],
            "prompt": [NASTY] * 80,
            "real": ["r"] * 80,
            "generated": ["g"] * 80,
            "finish_reason": ["stop"] * 80,
            "prompt_ids": [[1, 2]] * 80,
            "real_ids": real,
            "generated_ids": generated,
            "opponent_logp_real": [-1.0] * 80,
            "opponent_logp_generated": [-1.0] * 80,
        }
        pq.write_table(pa.table(columns), iteration_folder / "pairs.parquet")
        if margins:
            (iteration_folder / "margins.json").write_text(json.dumps({"margin": rng.normal(1, 2, 50).tolist()}))
        for s in range(steps):
            done = s / steps
            rewards = {"rewards/real": -0.1 * done, "rewards/generated": -0.3 * done, "rewards/margins": 0.2 * done}
            logps = {"logps/real": -40 - done, "logps/generated": -30 - 3 * done}
            row = {"iter": t, "step": s, "stage": "train", "loss": 0.69 - done / 10, **rewards, **logps}
            rows.append(row)
        record = {
            "iter": t,
            "beta": 0.1,
            "objective": {"beta": 0.1},
            "lr": 1e-5,
            "pairs": 78,
            "dropped": {"same": 2, "empty": 0},
        }
        game["iterations"].append(record | {"policy": f"iter{t}/policy", "opponent": f"iter{t - 1}" if t else "sft"})
        game["evaluations"].append(evaluation(f"iter{t}", t, 2 + t))
    answers = {row["policy"]: f"{NASTY} {row['policy']}" for row in game["evaluations"]}
    game["samples"] = [{"prompt": NASTY, "real": "a human | answer", "answers": answers}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return game


def outside_fences(page):
    """Return the page's Markdown without its code blocks, which are found by the rules of CommonMark."""
    prose, fence = [], None
    for line in page.splitlines():
        opening = re.match(r"(`{3,})", line)
        if fence is None and opening:
            fence = opening[1]
        elif fence is not None and line.strip() and set(line) == {"`"} and len(line) >= len(fence):
            fence = None
        elif fence is None:
            prose.append(line)
    assert fence is None
    return "\n".join(prose)


def figures(folder):
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_full_run(tmp_path):
    game = write_fake_run(tmp_path)
    json.dumps(game)
    page = write_report(tmp_path, game)
    assert page == tmp_path / "report.md"
    assert figures(tmp_path) == FIGURES
    text = page.read_text()
    assert "python run.py experiment=smoke iter=1" in text
    assert "| 1 | iter0 | beta 0.1 | 1e-5 | 78 | 2 same | `iter1/policy` |" in text
    assert "2.060 [2.050, 2.070]" in text
    assert "| train | 3 min 12 s |" in text
    assert "Peak memory: 1.23 GiB" in text
    assert "Why log p(real) can fall" in text and "An SFT anchor (`loss.sft_weight`)" in text
    for link in re.findall(r"\]\((figures/[^)]*)\)", text):
        assert (tmp_path / link).exists()
    for path in (tmp_path / "figures").iterdir():
        header = path.read_bytes()[:24]
        width, height = struct.unpack(">II", header[16:])
        assert width == 1080
        assert 300 < height < 1200


def test_texts_are_escaped(tmp_path):
    text = write_report(tmp_path, write_fake_run(tmp_path)).read_text()
    prose = outside_fences(text)
    for piece in ("no heading", "[bold]", "<b>", "![i]", "x = "):
        assert piece in text
        assert piece not in prose
    assert "\x1b" not in text
    assert prose.splitlines()[0] == r"# a\|b \*c\* \[red\]"
    assert r"| prompt \| too long | 3 |" in prose
    for block in re.findall(r"(?:^\|.*\|\n)+", prose, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block


def test_code_block_wraps_and_keeps_indentation():
    fenced = code_block("    code\n\n" + "word " * 60 + "\n" + "文" * 250)
    lines = fenced.splitlines()
    assert lines[:3] == ["```text", "    code", ""]
    assert max(len(line) for line in lines) <= 100
    assert "".join(lines).count("文") == 250


def test_stale_figures_are_removed(tmp_path):
    game = write_fake_run(tmp_path)
    write_report(tmp_path, game)
    for path in tmp_path.glob("iter*/margins.json"):
        path.unlink()
    text = write_report(tmp_path, game).read_text()
    assert figures(tmp_path) == {"measures", "logps", "lengths"}
    assert "margins.png" not in text


def test_no_training_steps(tmp_path):
    game = write_fake_run(tmp_path, steps=0)
    text = write_report(tmp_path, game).read_text()
    assert "No training steps are on record" in text
    assert "logps" not in figures(tmp_path)


def test_almost_nothing(tmp_path):
    """A report is written without evaluations, samples, times and metrics."""
    game = write_fake_run(tmp_path, iterations=1, steps=1, margins=False)
    game |= {"evaluations": [], "samples": [], "seconds": {}}
    text = write_report(tmp_path, game).read_text()
    assert figures(tmp_path) == {"logps", "lengths"}
    assert "Nothing was evaluated" in text
    assert "nothing was computed" in text
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "iter0" / "pairs.parquet").unlink()
    write_report(tmp_path, game)
    assert figures(tmp_path) == set()
    output = io.StringIO()
    print_summary(game, Console(file=output, width=100))
    assert output.getvalue() == ""


def test_unknown_numbers(tmp_path):
    game = write_fake_run(tmp_path)
    game["evaluations"][0] |= {
        "margin": None,
        "margin_interval": None,
        "rouge_l": None,
        "rouge_l_interval": [None, None],
    }
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows[5] |= {"rewards/real": None, "logps/real": None}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(tmp_path, game).read_text()
    assert "| – | – |" in text
    assert "nan" not in text
    assert figures(tmp_path) == FIGURES


def test_no_explanation_of_another_loss(tmp_path):
    game = write_fake_run(tmp_path)
    for played in game["iterations"]:
        played["objective"] = {"objective": "space", "mu": 1.0}
    assert "Why log p(real) can fall" not in write_report(tmp_path, game).read_text()


def external(**results):
    """Return the external results of iter0."""
    row = {"policy": "iter0", "iter": 0, "harness": None, "mt_bench": None, "comparison": None}
    return row | {"paper": PAPER["iter0"]} | results


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({}, True), ({"shots": 0}, False), ({"metric": "acc"}, False), ({"limit": 10}, False), ({"task": "piqa"}, False)],
)
def test_paper_values_of_the_same_tasks(changes, shown, tmp_path):
    task = {"task": "arc_challenge", "shots": 25, "metric": "acc_norm", "limit": None, "value": 0.6, "stderr": None}
    game = write_fake_run(tmp_path) | {"external": [external(harness=[task | {"n": 1172} | changes])]}
    assert ("| paper: iter0 | 63.40 | 63.40 |" in write_report(tmp_path, game).read_text()) == shown


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "F. The verdict depended on the order of the answers for 25 % of the judged prompts."),
        ({"inconsistent": None}, "F."),
        ({"inconsistent": None, "unparsed": 3}, "F. Prompts left out, because a verdict could not be read: 3."),
        ({"inconsistent": None, "unparsed": 3, "n": 0}, "F."),
    ],
)
def test_reliability_of_a_judge(changes, line, tmp_path):
    comparison = {"finding": "F.", "n": 40, "inconsistent": 0.25, "unparsed": 0} | changes
    game = write_fake_run(tmp_path) | {"external": [external(comparison=comparison)]}
    assert f"## A judge's preference\n\n{line}\n\nThe judge compared" in write_report(tmp_path, game).read_text()


def test_selection_by_benchmarks():
    selected = {"policy": "iter0", "last": "iter0", "measure": "harness", "value": 0.5, "interval": None, "n": 9}
    assert describe_selection(selected) == "iter0, the last policy; mean of the benchmarks 0.500 on 9 questions"


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_equal_margins(constant, tmp_path):
    game = write_fake_run(tmp_path, iterations=1)
    (tmp_path / "iter0" / "margins.json").write_text(json.dumps({"margin": [constant] * 5}))
    write_report(tmp_path, game)
    assert "margins" in figures(tmp_path)


# --- verdicts on the last policy --------------------------------------------------------------------------------------


def test_verdicts_better_and_same():
    differences = [difference("iter1", "sft", nll_per_token="better"), difference("iter1", "iter0")]
    against_start, against_first = map(verdict, differences)
    assert against_start.startswith("iter1 against sft, n=50: better in NLL of human answers (2.000 → 1.900); ")
    assert "worse" not in against_start
    assert against_first == "iter1 against iter0, n=50: no difference seen, the intervals of all differences contain 0."


def test_verdicts_worse():
    sentence = verdict(difference("iter0", "start", human_likelier="worse", rouge_l="better", mauve="same"))
    assert "better in ROUGE-L (2.000 → 1.900); " in sentence
    assert "worse in human likelier (2.000 → 1.900); " in sentence
    assert sentence.endswith("no difference seen in classifier AUC, NLL of human answers, MAUVE, length AUC.")


# --- the table at the end of a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_summary_fits(width, tmp_path):
    output = io.StringIO()
    print_summary(write_fake_run(tmp_path, iterations=4), Console(file=output, width=width))
    text = output.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "[bold]1[/bold]" in text
    assert "\x1b" not in text
    if width >= 80:
        assert "…" not in text
        for cell in ("2.100", "20", "31", "likelier", "margin"):
            assert cell in text
    for interval in ("2.090, 2.110", "1.30, 1.70", "0.59, 0.61"):
        assert (interval in text) == (width >= 100)
    if width >= 100:
        for name in ("human", "start", "sft", "iter0", "iter3"):
            assert re.search(rf"┃ {name} ", text)


def test_too_few_prompts_are_noted(tmp_path):
    game = write_fake_run(tmp_path)
    for row in game["evaluations"]:
        row["n"] = 8
    note = f"MAUVE: needs {MEASURES['mauve'].min_prompts} held-out prompts, there are 8"
    assert note in write_report(tmp_path, game).read_text()
    output = io.StringIO()
    print_summary(game, Console(file=output, width=100))
    assert note in output.getvalue()


def test_summary_answers_side_by_side(tmp_path):
    output = io.StringIO()
    print_summary(write_fake_run(tmp_path, iterations=1), Console(file=output, width=100))
    header_lines = [line for line in output.getvalue().splitlines() if line.startswith("┃ ")]
    assert [re.findall(r"\w+", line) for line in header_lines] == [["human", "start"], ["sft", "iter0"]]


def test_no_torch():
    code = "import sys, spin.reporting.report; assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
