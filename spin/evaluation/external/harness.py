"""Benchmarks of EleutherAI's lm-evaluation-harness, which the paper used to evaluate its models.

Prompts are those of the tasks, without a chat template, as in the paper. The paper used version 0.4.0; since then
GSM8K's stop words, TruthfulQA and the choice of few-shot examples have changed: compare only differences with `PAPER`.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import json
import logging
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin.config.schema import EvaluationConfig
from spin.runtime.errors import UserError, brief, explaining
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.signals import pending_signal

VERSION = "0.4.13"  # scores differ between versions
KEY = "evaluation.harness"
LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")

# Percent by policy and `task:shots:metric`, from arXiv 2401.01335, table by iteration. "sft" is zephyr-7b-sft-full.
PAPER: dict[str, dict[str, float]] = json.loads((Path(__file__).parent / "assets" / "paper.json").read_text())


@dataclass(frozen=True)
class Task:
    """A task or group of the harness, the number of few-shot examples, and `metric` or `metric:filter`."""

    task: str
    shots: int
    metric: str


def parse_tasks(entries: Sequence[str]) -> list[Task]:
    """Parse `name:shots:metric[:filter]` entries. Raises UserError for malformed entries and repeated tasks."""
    tasks: list[Task] = []
    for entry in entries:
        parts = re.fullmatch(r"([^:]+):([0-9]+):([^:]+(?::[^:]+)?)", str(entry))
        if parts is None:
            raise UserError(
                f"{KEY}: {brief(repr(entry))} must be task:shots:metric, as arc_challenge:25:acc_norm, or with a "
                "filter, as gsm8k:5:exact_match:strict-match."
            )
        if parts[1] in (task.task for task in tasks):
            raise UserError(f"{KEY}: {parts[1]} is named twice; name each task once.")
        tasks.append(Task(parts[1], int(parts[2]), parts[3]))
    return tasks


def identity(task: Task, include: str | None) -> dict[str, Any]:
    """Return a task's part of a cache key: the harness's version, the task, and a hash of all files in `include`.

    Data from the hub are assumed constant. Raises UserError: missing harness or wrong version, missing folder.
    """
    result = {"lm_eval": _installed_version(), "tasks": [[task.task, task.shots, task.metric]], "include": None}
    if folder := _folder(include):
        content = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                content.update(f"{path.relative_to(folder)}\0{digest}\0".encode())
        result["include"] = content.hexdigest()
    return result


# --- checks before anything is computed -------------------------------------------------------------------------------


def check_tasks(tasks: Sequence[Task], include: str | None) -> None:
    """Raise UserError if a task cannot be run. This needs neither the model nor the task's data.

    Reasons are a missing harness or a wrong version, a missing folder `include`, an unknown task, metric or filter, a
    metric whose lower values are better, few-shot examples for a zero-shot task, and a task that executes the model's code.
    """
    _installed_version()
    for task in tasks:
        index = _task_manager(task.task, _folder(include)).task_index
        if task.task not in index:
            near = difflib.get_close_matches(task.task, index, 3)
            hint = f"similar names: {', '.join(near)}" if near else "`lm_eval ls tasks` lists all that can be read"
            raise UserError(f"{KEY}: there is no task {brief(task.task)}; {hint}.")
        with explaining(f"{KEY}: {task.task}: its file does not define a task"):
            _check_task(task, index)


def _check_task(task: Task, index: dict[str, Any]) -> None:
    from lm_eval.api.registry import higher_is_better_registry

    leaves = list(_leaf_configs(task.task, index))
    for leaf in leaves:
        if task.shots and leaf.get("num_fewshot") == 0:
            raise UserError(f"{KEY}: {leaf.get('task')} is defined without examples: use {task.task}:0:{task.metric}.")
        if leaf.get("unsafe_code"):
            raise UserError(f"{KEY}: {leaf.get('task')} runs code that the model writes; spin does not run such tasks.")
    config = index[task.task].cfg or {}  # None for a tag
    values = _listed_values(config, leaves)
    if (values or config not in leaves) and _pick(task.metric, values) is None:
        members = ", ".join(str(leaf["task"]) for leaf in leaves)
        names = ", ".join(values) or f"none of its own, name its tasks: {members}"
        raise UserError(f"{KEY}: {task.task} has no metric {brief(task.metric)}; it has {brief(names, 300)}.")
    name = task.metric.partition(":")[0]
    listed = [row for leaf in leaves for row in leaf.get("metric_list") or [{"metric": name}] if row["metric"] == name]
    if any(row.get("higher_is_better", higher_is_better_registry.get(name, True)) is False for row in listed):
        raise UserError(f"{KEY}: {task.task}: lower values of {name} are better; a metric must be a share.")


def _leaf_configs(member: str | dict, index: dict[str, Any]) -> Iterator[dict]:
    """Yield the configurations of the tasks in `member`: a task, tag or group by name, or a group's changes to one."""
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
    """Return the values (`metric:filter`) that a configuration lists; none if code or output type determine them."""
    filters = list(dict.fromkeys(f["name"] for leaf in leaves for f in leaf.get("filter_list") or [{"name": "none"}]))
    values = []
    for listed in config.get("aggregate_metric_list") or config.get("metric_list") or []:
        metric = str(listed["metric"]).rpartition(".")[2]  # functions are given by their paths
        chosen = listed.get("filter_list") or filters
        values += [f"{metric}:{name}" for name in ([chosen] if isinstance(chosen, str) else chosen)]
    return values


def _pick(metric: str, values: Iterable[str]) -> str | None:
    """Return the only one of `values` (`metric:filter`) that matches `metric`, with or without a filter, else None."""
    matches = [value for value in values if metric in (value, value.partition(":")[0])]
    return matches[0] if len(matches) == 1 else None


def _installed_version() -> str:
    """Return the harness's version. Raises UserError unless it is `VERSION`."""
    version = "not installed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("lm_eval")
    if version != VERSION:
        install = f"pip install lm-eval=={VERSION}"
        raise UserError(f"{KEY}: lm-evaluation-harness: {version}; scores differ by version: {install}")
    return version


def _folder(include: str | None) -> Path | None:
    folder = Path(include).expanduser().absolute() if include is not None else None
    if folder and not folder.is_dir():
        raise UserError(f"evaluation.harness_include={include}: no such folder.")
    return folder


def _task_manager(name: str, folder: Path | None) -> Any:
    """Return the harness's TaskManager for the task `name`. Files in `folder` take precedence over the harness's."""
    from lm_eval.tasks import TaskManager

    if folder and name in (manager := TaskManager(include_path=folder, include_defaults=False)).all_subtasks:
        return manager
    return _full_task_manager(folder)


@functools.cache
def _full_task_manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)  # reads 15,000 files, which takes seconds


# --- running a task ---------------------------------------------------------------------------------------------------


def run_task(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
    seed: int,
    say: Callable[[str], None],
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Return the model's result on a task: task, shots, metric, value, stderr, n (questions), limit, version.

    Value and stderr are in the harness's unit (a share in [0, 1] for acc and exact_match); stderr may be None. `seed`
    determines the few-shot examples. Data files of tasks in `harness_include` are relative to that folder. Nothing is
    written but data from the hub, to its usual cache. A padding token may be added to the tokenizer.

    Raises UserError: missing data, too little memory, or a task that the harness cannot run.
    """
    from lm_eval.models.huggingface import HFLM

    batch_size = settings.harness_batch_size
    with _contained(task.task, batch_size) as log:
        # Log-probs are at least float32, because rounding to bf16 would cause ties between choices.
        softmax_dtype = torch.promote_types(model.dtype, torch.float32)
        lm: Any = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=softmax_dtype)
        if ranks.is_main_process:
            for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(lm, name, functools.partial(_answer_requests, lm, ranks, name))
            result = ranks.broadcast(_evaluate(task, lm, settings, seed))
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
        "limit": settings.harness_limit,
        "version": str(result["version"]),
    }


def _evaluate(task: Task, lm: Any, settings: EvaluationConfig, seed: int) -> dict:
    """Return the harness's results for a task, with the task's version."""
    from lm_eval import simple_evaluate

    folder = _folder(settings.harness_include)
    manager = _task_manager(task.task, folder)
    with tempfile.TemporaryDirectory(prefix="spin-") as cache:
        results = simple_evaluate(
            model=lm,
            tasks=[_load(task.task, manager, folder, cache)],
            num_fewshot=task.shots,
            limit=settings.harness_limit,
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
    """Return the harness's Task or Group with its data. Local files are not cached, since their content may change."""
    leaves = _leaf_configs(name, manager.task_index)
    is_local = all(leaf.get("dataset_path") in LOCAL_FORMATS for leaf in leaves)
    cache_folder = mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache)
    with contextlib.chdir(folder or "."), cache_folder if is_local else contextlib.nullcontext():
        loaded = manager.load([name])
    return loaded["groups"].get(name) or loaded["tasks"][name]


def _answer_requests(lm: Any, ranks: ProcessGroup, name: str, requests: Sequence[Any]) -> list:
    """Return the answers of all ranks to the harness's requests of type `name`. Only the main process calls this."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if name == "generate_until" and any(normalize_gen_kwargs(request.args[1]).get("do_sample") for request in requests):
        return getattr(type(lm), name)(lm, requests)  # each batch continues the previous one's random numbers
    ranks.broadcast((name, requests))
    return _answer_share(lm, ranks, name, requests)


def _answer_share(lm: Any, ranks: ProcessGroup, name: str, requests: Sequence[Any]) -> list:
    """Return the answers of all ranks, each of which answers every n-th question. All ranks must call this."""
    share = [request for request in requests if request.doc_id % ranks.size == ranks.rank]
    answers = []
    with contextlib.suppress(InterruptedError), lm.model.register_forward_pre_hook(_stop_if_pending):
        answers = getattr(type(lm), name)(lm, share)
    ranks.raise_if_stopped()
    parts = [iter(part) for part in ranks.gather(answers)]
    return [next(parts[request.doc_id % ranks.size]) for request in requests]


def _stop_if_pending(*_: object) -> None:
    """Raise InterruptedError before a batch if a stop signal is pending; all ranks stop after their shares."""
    if pending_signal():
        raise InterruptedError


@contextlib.contextmanager
def _contained(name: str, batch_size: int) -> Iterator[list[logging.LogRecord]]:
    """Collect the harness's log silently, restore random states and settings, and convert errors to UserError."""
    log, handler, records = logging.getLogger("lm_eval"), logging.Handler(), list[logging.LogRecord]()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    states = random.getstate(), np.random.get_state()
    with (
        mock.patch.multiple(log, handlers=[handler], propagate=False),
        mock.patch.object(sys, "dont_write_bytecode", True),  # for task functions in the user's folder
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
    ):
        try:
            yield records
        except Exception as error:  # the user's task and data can cause any error
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise UserError(f"{KEY}: {name}: out of memory: lower {KEY}_batch_size={batch_size}.") from error
            is_about_data = isinstance(error, OSError) or "Couldn't find cache" in str(error)
            advice = "for data of the hub run once without HF_HUB_OFFLINE and HF_DATASETS_OFFLINE" * is_about_data
            with explaining(f"{KEY}: {name}: the harness can't run it", advice):
                raise
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
