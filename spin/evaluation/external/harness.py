"""Benchmarks of EleutherAI's lm-evaluation-harness, with which the paper measured its models.

Prompts are what the tasks write, without a chat template, as in the paper. Its harness was 0.4.0; since then GSM8K's stop
words, TruthfulQA and the choice of few-shot examples have changed: compare with `PAPER` by differences.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import itertools
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin.runtime.errors import UserError, brief, user_message
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.signals import pending_signal

VERSION = "0.4.13"  # scores differ between versions
INSTALL = f"pip install lm-eval=={VERSION}"
KEY = "evaluation.harness"
LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")

# Percent; arXiv 2401.01335, the table of Open LLM Leaderboard results by iteration. "sft" is zephyr-7b-sft-full.
LEADERBOARD = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu")
PAPER: dict[str, dict[str, float]] = {
    label: dict(zip((*LEADERBOARD, "average"), row, strict=True))
    for label, row in {
        "sft": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92, 58.14),
        "iter0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03, 60.80),
        "iter1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34, 62.12),
        "iter2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93, 62.97),
        "iter3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99, 63.16),
    }.items()
}


@dataclass(frozen=True)
class Task:
    """A task or group of the harness, the number of few-shot examples, and `metric` or `metric:filter`."""

    task: str
    shots: int
    metric: str


def parse_tasks(entries: Sequence[str]) -> list[Task]:
    """Tasks from `name:shots:metric` or `name:shots:metric:filter`. Raises UserError for malformed and repeated ones."""
    tasks: list[Task] = []
    for entry in entries:
        parts = str(entry).split(":")
        if not (3 <= len(parts) <= 4 and all(parts) and parts[1].isascii() and parts[1].isdigit()):
            raise UserError(
                f"{KEY}: {brief(repr(entry))} must be task:shots:metric, as arc_challenge:25:acc_norm, or with a "
                "filter behind it, as gsm8k:5:exact_match:strict-match."
            )
        task = Task(parts[0], int(parts[1]), ":".join(parts[2:]))
        if task in tasks:
            raise UserError(f"{KEY}: {entry} is named twice.")
        tasks.append(task)
    return tasks


def identity(task: Task, include: str | None) -> dict[str, Any]:
    """The part of a cache key that stands for a task: the harness's version, the task, a hash of all files in `include`.

    Data from the hub are taken to be constant. Raises UserError: no such version of the harness, no such folder.
    """
    folder = _folder(include)
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder else []:
        if folder and path.is_file() and "__pycache__" not in path.parts:
            content.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    tasks = [[task.task, task.shots, task.metric]]
    return {"lm_eval": _installed_version(), "tasks": tasks, "include": content.hexdigest() if folder else None}


# --- checks before anything is computed -------------------------------------------------------------------------------


def check_tasks(tasks: Sequence[Task], include: str | None) -> None:
    """Raise UserError if a task cannot be run; needs neither the model nor the task's data.

    Reasons: the harness is missing or of another version; no folder `include`; an unknown task, metric or filter; shots
    for a task that is defined without; a task that executes what the model writes.
    """
    _installed_version()
    folder = _folder(include)
    for task in tasks:
        index = _task_manager(task.task, folder).task_index
        if task.task not in index:
            near = difflib.get_close_matches(task.task, index, 3)
            hint = f"near it: {', '.join(near)}" if near else "`lm_eval ls tasks` lists all that can be read"
            raise UserError(f"{KEY}: the harness knows no task {brief(task.task)}; {hint}.")
        try:
            _check_task(task, index)
        except (LookupError, TypeError, AttributeError, RecursionError) as error:  # in what a user wrote
            raise UserError(f"{KEY}: {task.task}: its file does not define a task ({brief(error)}).") from error


def _check_task(task: Task, index: dict[str, Any]) -> None:
    leaves = list(_leaf_configs(task.task, index))
    for leaf in leaves:
        if task.shots and leaf.get("num_fewshot") == 0:
            raise UserError(f"{KEY}: {leaf.get('task')} is defined without examples: say {task.task}:0:{task.metric}.")
        if leaf.get("unsafe_code"):
            raise UserError(f"{KEY}: {leaf.get('task')} runs code that the model writes; this is not done here.")
    config = index[task.task].cfg or {}  # a tag has none
    values = _listed_values(config, leaves)
    if (values or config not in leaves) and _pick(task.metric, values) is None:
        names = (
            ", ".join(values) or f"none of its own, name its tasks: {', '.join(str(leaf['task']) for leaf in leaves)}"
        )
        raise UserError(f"{KEY}: {task.task} has no metric {brief(task.metric)}; it has {brief(names, 300)}.")


def _leaf_configs(member: str | dict, index: dict[str, Any]) -> Iterator[dict]:
    """The configurations of the tasks below `member`: the name of a task, tag or group, or a group's changes to one."""
    changes = member if isinstance(member, dict) else {}
    entry = index.get(member if isinstance(member, str) else str(member.get("group", member.get("task"))))
    config = {**(entry.cfg or {} if entry else {}), **changes}
    children = sorted(entry.tags) if entry and entry.cfg is None else config.get("task")
    if isinstance(children, list):
        for child in children:
            yield from _leaf_configs(child, index)
    else:
        yield config


def _listed_values(config: dict, leaves: Iterable[dict]) -> list[str]:
    """The values (`metric:filter`) that a configuration lists; none where only code or the output type decides."""
    filters = list(dict.fromkeys(f["name"] for leaf in leaves for f in leaf.get("filter_list") or [{"name": "none"}]))
    values = []
    for listed in config.get("aggregate_metric_list") or config.get("metric_list") or []:
        metric = str(listed["metric"]).rpartition(".")[2]  # a function is given by its path
        chosen = listed.get("filter_list") or filters
        values += [f"{metric}:{name}" for name in ([chosen] if isinstance(chosen, str) else chosen)]
    return values


def _pick(metric: str, values: Iterable[str]) -> str | None:
    """The one of `values` (`metric:filter`) that `metric`, with or without a filter, means; None if it is not exactly one."""
    found = [value for value in values if metric in (value, value.partition(":")[0])]
    return found[0] if len(found) == 1 else None


def _installed_version() -> str:
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{KEY}: lm-evaluation-harness is not installed: {INSTALL}") from error
    if version != VERSION:
        raise UserError(f"{KEY}: lm-evaluation-harness {version} is installed; scores differ by version: {INSTALL}")
    return version


def _folder(include: str | None) -> Path | None:
    folder = Path(include).expanduser().absolute() if include is not None else None
    if folder and not folder.is_dir():
        raise UserError(f"evaluation.harness_include={include}: no such folder.")
    return folder


def _task_manager(name: str, folder: Path | None) -> Any:
    """The harness's TaskManager for the task `name`; files in `folder` go before the harness's own."""
    from lm_eval.tasks import TaskManager

    if folder and name in (manager := TaskManager(include_path=folder, include_defaults=False)).all_subtasks:
        return manager
    return _full_task_manager(folder)


@functools.cache
def _full_task_manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)  # reads 15,000 files, which takes seconds


# --- a task's run -----------------------------------------------------------------------------------------------------


def run_task(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    include: str | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    say: Callable[[str], None],
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """The model's result on a task: task, shots, metric, value, stderr, n (questions), version.

    Value and stderr are in the harness's unit (a share in [0, 1] for acc and exact_match); stderr is None where the
    harness has none. `limit`: only the first questions of each task. `seed` draws the few-shot examples. Relative data
    files of tasks in `include` are relative to that folder. The tokenizer may get a padding token.

    Nothing is written but data from the hub, to its usual cache; random states are restored.
    Raises UserError: data are missing, memory is short, or the harness cannot run the task.
    """
    from lm_eval.models.huggingface import HFLM

    with _contained(task.task, batch_size) as log:
        # Sums of log-probs are never rounded to bf16, which would make choices tie.
        softmax_dtype = torch.promote_types(model.dtype, torch.float32)
        lm = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=softmax_dtype)
        if ranks.is_main_process:
            result = ranks.broadcast(_evaluate(task, lm, _folder(include), limit, seed, ranks))
        else:
            while isinstance(result := ranks.broadcast(), tuple):
                _answer_share(lm, ranks, *result)
    if ranks.all_reduce_max(any("runcat" in record.getMessage() for record in log)):
        say(f"note: {task.task}, {task.shots} shots: prompts were cut from the left to fit the model's context")
    keys = {key.replace(",", ":", 1): key for key in result if "," in key and "_stderr," not in key}
    if (value := _pick(task.metric, keys)) is None:
        raise UserError(f"{KEY}: {task.task} reports no {task.metric}, but {brief(', '.join(keys), 300)}.")
    stderr = result.get(keys[value].replace(",", "_stderr,", 1))
    return {
        **asdict(task),
        "value": float(result[keys[value]]),
        "stderr": None if stderr is None or isinstance(stderr, str) else float(stderr),  # "N/A"
        "n": int(result["sample_len"]),
        "version": str(result["version"]),
    }


def _evaluate(task: Task, lm: Any, folder: Path | None, limit: int | None, seed: int, ranks: ProcessGroup) -> dict:
    """The harness's row for a task, and the task's version; all ranks answer the requests."""
    from lm_eval import simple_evaluate

    if ranks.size > 1:
        for name in EMPTY_ANSWERS:
            setattr(lm, name, functools.partial(_answer_requests, lm, ranks, name))
    manager = _task_manager(task.task, folder)
    with tempfile.TemporaryDirectory(prefix="spin-") as cache:
        results = simple_evaluate(
            model=lm,
            tasks=[_load(task.task, manager, folder, cache)],
            num_fewshot=task.shots,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed % 2**32,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {**results["results"][task.task], "version": results["versions"].get(task.task)}


def _load(name: str, manager: Any, folder: Path | None, cache: str) -> Any:
    """The harness's Task or Group with its data; local files are read anew, for they may change under the same name."""
    leaves = _leaf_configs(name, manager.task_index)
    is_local = all(leaf.get("dataset_path") in LOCAL_FORMATS for leaf in leaves)
    cache_folder = mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache)
    with contextlib.chdir(folder or "."), cache_folder if is_local else contextlib.nullcontext():
        loaded = manager.load([name])
    return loaded["groups"].get(name) or loaded["tasks"][name]


# --- requests that all ranks answer -----------------------------------------------------------------------------------

# The kinds of requests, and the answer that a rank gives to those of other ranks: it adds nothing to theirs.
EMPTY_ANSWERS = {"loglikelihood": (0.0, False), "loglikelihood_rolling": (0.0, False), "generate_until": ""}


def _answer_requests(lm: Any, ranks: ProcessGroup, name: str, requests: Sequence[Any]) -> list:
    """The answers of all ranks to the harness's requests of the kind `name`. Called on the main process."""
    from lm_eval.models.utils import normalize_gen_kwargs

    arguments = [request.args for request in requests]
    if name == "generate_until" and any(normalize_gen_kwargs(options).get("do_sample") for _, options in arguments):
        return getattr(type(lm), name)(lm, requests)  # each batch goes on with the random numbers of the one before
    ranks.broadcast((name, arguments))
    return _answer_share(lm, ranks, name, arguments)


def _answer_share(lm: Any, ranks: ProcessGroup, name: str, arguments: Sequence[tuple]) -> list:
    """The answers of all ranks to requests with these arguments. Called on all ranks.

    Batches are those of one process, and each is computed by one rank: the answers have the same bits. Only where the
    context cuts a text of `loglikelihood_rolling` into several windows, their sum may be taken in another order.
    """
    from lm_eval.models import huggingface

    numbers = itertools.count()

    class Share(huggingface.Collator):
        _reorder_indices: list[int]

        def get_batched(self, *args: Any, **options: Any) -> Iterator[list]:
            kept: list[int] = []
            end = 0
            for batch in super().get_batched(*args, **options):
                start, end = end, end + len(batch)
                if next(numbers) % ranks.size == ranks.rank and not pending_signal():
                    kept += range(start, end)
                    yield batch
            if self._group_by != "contexts":  # else only the answers that were made are counted
                self._reorder_indices = [self._reorder_indices[i] for i in kept]

        def get_original(self, newarr: list) -> list:
            made = dict(zip(self._reorder_indices, newarr, strict=True))
            return [made.get(i, EMPTY_ANSWERS[name]) for i in range(len(self))]

    with mock.patch.object(huggingface, "Collator", Share):
        share = getattr(type(lm), name)(lm, [SimpleNamespace(args=args) for args in arguments])
    ranks.raise_if_stopped()
    return [_add(parts) for parts in zip(*ranks.gather(share), strict=True)]


def _add(parts: Sequence[Any]) -> Any:
    """One answer from what each rank has of it."""
    if isinstance(parts[0], tuple):
        return sum(logp for logp, _ in parts), any(is_greedy for _, is_greedy in parts)
    return "".join(parts) if isinstance(parts[0], str) else sum(parts)


@contextlib.contextmanager
def _contained(name: str, batch_size: int) -> Iterator[list[logging.LogRecord]]:
    """Collect the harness's log and show none of it, restore random states and settings, and give errors one line."""
    log, handler, records = logging.getLogger("lm_eval"), logging.Handler(), list[logging.LogRecord]()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    before = random.getstate(), np.random.get_state(), sys.dont_write_bytecode, log.propagate
    log.addHandler(handler)
    log.propagate = False
    sys.dont_write_bytecode = True  # of tasks' functions, in the user's folder
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield records
    except Exception as error:  # a library computes with a user's task and data
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"{KEY}: {name}: memory is short: lower {KEY}_batch_size={batch_size}.") from error
        if user_message(error) is not None:  # a full disk, say
            raise
        is_about_data = isinstance(error, OSError) or "Couldn't find cache" in str(error)
        hint = "; for data of the hub run once without HF_HUB_OFFLINE and HF_DATASETS_OFFLINE" if is_about_data else ""
        raise UserError(f"{KEY}: {name}: the harness can't run it ({brief(error, 300)}){hint}.") from error
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        sys.dont_write_bytecode, log.propagate = before[2:]
        log.removeHandler(handler)
