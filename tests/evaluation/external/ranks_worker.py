"""One rank of test_ranks.py, which runs `torchrun -m tests.evaluation.external.ranks_worker FOLDER`.

FOLDER/jobs.json lists policies' folders and tasks. Each rank writes rank-<i>.json: for each job the row, the number of its
batches and the messages; then the outcome of shards that fail on the second rank, and the outcome of the first job if the
second rank receives SIGTERM in its first batch.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from spin.config.hydra import load
from spin.evaluation.external import harness
from spin.models.load import load_model, load_tokenizer
from spin.runtime import signals
from spin.runtime.errors import UserError
from spin.runtime.process_group import ProcessGroup, exit_process, join_group, leave_group
from spin.runtime.shards import ResumableShards, Shard
from tests.games import ROOT


def run(folder: str, entry: str, ranks: ProcessGroup, stop: bool = False) -> dict:
    """Return a task's row, this process's number of batches, and the messages. `stop` sends SIGTERM in the first batch."""
    from lm_eval.models.huggingface import HFLM

    batches, messages = [], []
    [task] = harness.parse_tasks([entry])
    model, tokenizer = load_model(Path(folder), torch.float32, torch.device("cpu")), load_tokenizer(Path(folder))
    originals = {name: getattr(HFLM, name) for name in ("_model_call", "_model_generate")}

    def counted(name: str):
        def method(self, *args, **options):
            batches.append(name)
            if stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return originals[name](self, *args, **options)

        return method

    for name in originals:
        setattr(HFLM, name, counted(name))
    settings = load(
        f"evaluation.harness_include={ROOT / 'tests' / 'tasks'}", "evaluation.harness_batch_size=5"
    ).evaluation
    try:
        row = harness.run_task(task, model, tokenizer, settings, 0, messages.append, ranks)
    except signals.Interrupted as stopped:
        return {"stopped": stopped.signal.name, "batches": len(batches)}
    finally:
        for name, method in originals.items():
            setattr(HFLM, name, method)
    return {"row": row, "batches": len(batches), "messages": messages}


def failed_shards(folder: Path, ranks: ProcessGroup) -> dict:
    """Return the error of a hundred shards that the second rank cannot compute, and the number of computed shards."""

    def rows(number: int) -> list[dict]:
        time.sleep(0.05)
        if ranks.rank == 1:
            raise UserError("rank 1 can't")
        return [{"number": number}]

    shards = [Shard([number], partial(rows, number)) for number in range(100)]
    try:
        list(ResumableShards(folder, print, ranks=ranks)(shards))
    except UserError as error:
        return {"error": str(error), "computed": len(list(folder.glob("0*")))}
    return {}


def main(folder: Path) -> None:
    from lm_eval import evaluator

    evaluator.add_env_info = lambda results: None  # skips the description of the machine, which takes seconds
    ranks = join_group("deepspeed", "cpu")
    signals.install_handlers()
    jobs = json.loads((folder / "jobs.json").read_text())
    with signals.deferred():
        results = [run(*job, ranks) for job in jobs]
        results += [failed_shards(folder / "shards", ranks), run(*jobs[0], ranks, stop=ranks.rank == 1)]
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(results))
    leave_group()
    exit_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
