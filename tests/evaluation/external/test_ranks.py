"""Tests of benchmarks in two real processes (gloo, on a CPU) against one process."""

import json
import shutil

import pytest
import torch

from spin.runtime.process_group import SINGLE_PROCESS
from tests.engines.test_deepspeed import GAME, errors, torchrun
from tests.evaluation.external.ranks_worker import run
from tests.evaluation.external.test_harness import _fast, policy  # noqa: F401 (fixtures)

TASKS = [
    "spin_choice:3:acc_norm",
    "spin_logps:2:logp",
    "spin_rolling:0:logp",
    "spin_written:1:crc",
    "spin_sampled:0:crc",
]


def test_benchmarks_of_two_ranks_match_one(policy, tmp_path):  # noqa: F811
    """In fp32 the results are equal up to rounding. A failure or stop of one rank ends the work of both."""
    short = shutil.copytree(policy, tmp_path / "short")
    settings = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 48}
    (short / "config.json").write_text(json.dumps(settings))
    jobs = [(str(policy), entry) for entry in TASKS]
    jobs += [(str(short), entry) for entry in ("spin_rolling:0:logp", "spin_written:2:crc")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(2, "-m", "tests.evaluation.external.ranks_worker", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    main, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for results in (main, second):
        assert results[-2]["error"] == "rank 1 can't" and 1 <= results[-2]["computed"] < 20
        assert results[-1]["stopped"] == "SIGTERM"
    assert second[-1]["batches"] == 1  # although more batches remained
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # like each rank
    expected = [run(*job, SINGLE_PROCESS) for job in jobs]
    torch.set_num_threads(before)
    for (_, entry), of_main, of_second, single in zip(jobs, main[:-2], second[:-2], expected, strict=True):
        assert of_main["row"] == of_second["row"], entry
        assert of_main["messages"] == of_second["messages"] == single["messages"], entry
        if entry.startswith("spin_sampled"):  # answered by the main process
            assert of_main["batches"] == single["batches"] and of_second["batches"] == 0
        else:
            assert max(of_main["batches"], of_second["batches"]) <= 0.8 * single["batches"], entry
        numbers = [[result["row"].pop(key) for key in ("value", "stderr")] for result in (of_main, single)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6), entry
        assert of_main["row"] == single["row"], entry
    assert any("cut from the left" in line for line in expected[-1]["messages"])


@pytest.mark.slow
@pytest.mark.parametrize(("task", "reason"), [("spin_lost", "nowhere.jsonl"), ("spin_memory", "out of memory")])
def test_failure_of_the_main_process(place, task, reason):
    words = [*GAME, "stage=evaluate", f"evaluation.harness=[{task}:0:acc]", "evaluation.harness_include=tests/tasks"]
    done = torchrun(2, "run.py", *place.words(*words))
    assert done.returncode == 1 and len(errors(done)) == 1 and reason in errors(done)[0], done.stderr
