"""EleutherAI's lm-evaluation-harness on a stored policy: what the paper measured its models with.

Optional: `pip install lm-eval==0.4.13`, imported only when it is asked for. Prompts are what the tasks write, no chat
template around them, as in the paper. The log-softmax is never taken below fp32, where the harness would take it in the
model's type. A task is `name:shots:metric`, with `:filter` behind it where the harness filters answers in several ways.

The paper's harness is 0.4.0 (its authors' repository names commit 46c7966 and adds that versions differ in scores and
agree in trends). Between that and 0.4.13: GSM8K's answers end at `Question:` and no more at an empty line,
TruthfulQA and others have new versions, few-shot examples are drawn otherwise. Compare with PAPER by differences.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spin.models.load import load_policy, load_tokenizer
from spin.models.policy import Policy
from spin.runtime.errors import UserError, brief, user_message

VERSION = "0.4.13"  # what follows leans on its inner parts, and versions differ in scores
INSTALL = f"pip install lm-eval=={VERSION}"
KEY = "evaluation.harness"

# The paper's six, with the shots and metrics of the Open LLM Leaderboard of 2023. GSM8K by the strict filter: harness
# 0.4.0 looked for "#### <number>" only, as the older one whose "acc" the Leaderboard gave; the flexible one came later.
OPEN_LLM_LEADERBOARD = (
    "arc_challenge:25:acc_norm",
    "truthfulqa_mc2:0:acc",
    "winogrande:5:acc",
    "gsm8k:5:exact_match:strict-match",
    "hellaswag:10:acc_norm",
    "mmlu:5:acc",
)

# Percent; arXiv 2401.01335, the table of Open LLM Leaderboard results by iteration. "sft" is zephyr-7b-sft-full.
_COLUMNS = (*(entry.split(":")[0] for entry in OPEN_LLM_LEADERBOARD), "average")
PAPER: dict[str, dict[str, float]] = {
    label: dict(zip(_COLUMNS, row, strict=True))
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
    """A task or group of the harness, how many examples stand before each question, and `metric` or `metric:filter`."""

    name: str
    shots: int
    metric: str


def parse_tasks(entries: Sequence[str]) -> list[Task]:
    """Tasks from `name:shots:metric` or `name:shots:metric:filter`. Raises UserError: malformed, or named twice."""
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


def check_tasks(tasks: Sequence[Task], include: str | None) -> None:
    """Before anything long is begun, and without data: can these tasks be had?

    Raises UserError: no harness or another version of it, no folder `include`, a task that it does not know, a metric
    or filter that the task does not have, shots before a task that has none by its definition, a task that runs what
    the model writes.
    """
    _version()
    try:
        import lm_eval.evaluator  # noqa: F401 (with all that it needs)
    except ImportError as error:
        raise UserError(f"{KEY}: lm-evaluation-harness is not whole ({brief(error)}): {INSTALL}") from error
    index = _index(tasks, include)
    for task in tasks:
        if task.name not in index:
            _explain_unknown(task, index, include)
        try:
            leaves = list(_leaves(index, task.name))
            known = _known_metrics(index[task.name], leaves)
        except (LookupError, TypeError, AttributeError, RecursionError) as error:  # of what a user wrote
            raise UserError(f"{index[task.name].yaml_path}: no task can be made of it ({brief(error)}).") from error
        if known is not None and not known:
            names = brief(", ".join(str(leaf.get("task")) for leaf in leaves))
            raise UserError(
                f"{KEY}: {task.name} stands for several tasks and has no value of its own; name them: {names}"
            )
        if known is not None and _pick(task.metric, known) is None:
            shown = ", ".join(_shown(key, known) for key in known)
            raise UserError(f"{KEY}: {task.name} has no metric {brief(task.metric)}; it has {brief(shown, 300)}.")
        for leaf in leaves:
            if task.shots and leaf.get("num_fewshot") == 0:
                raise UserError(
                    f"{KEY}: {leaf.get('task')} is defined without examples: say {task.name}:0:{task.metric}."
                )
            if leaf.get("unsafe_code"):
                raise UserError(f"{KEY}: {leaf.get('task')} runs code that the model writes; this is not done here.")


def identity(tasks: Sequence[Task], include: str | None) -> dict[str, Any]:
    """What decides the results, for a cache key, beside the other arguments of `run`: the harness's version, the tasks,
    and a hash of the content of all files under `include`. Data of the hub are taken to stay as they are.

    Raises UserError: no harness or another version of it, no folder `include`.
    """
    digest = None
    if (folder := _folder(include)) is not None:
        whole = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if not {"__pycache__", ".ipynb_checkpoints"} & set(name.parts):  # the harness passes them over, too
                with path.open("rb") as file:
                    whole.update(f"{name.as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
        digest = whole.hexdigest()
    return {"lm_eval": _version(), "tasks": [[t.name, t.shots, t.metric] for t in tasks], "include": digest}


def run_tasks(
    policy: Policy,
    tasks: Sequence[Task],
    include: str | None,
    limit: int | None,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A policy, its weights in `dtype`, on tasks that `check` has passed; a row for each, in their order.

    A row has task, shots, metric, value and stderr in the harness's unit (a share in [0, 1] for acc and exact_match;
    stderr None where it knows none), n (questions; of a group: of all its tasks), version (of the
    task). `limit`: so many questions of each task, from the first on; None for all. `seed` draws the
    few-shot examples. Relative data files of tasks in `include` lie beside the file of the task that names them.

    Nothing is written but data that the hub sends, to its usual cache. All random states are afterwards as they were.

    Raises UserError: data that cannot be had, or anything else that the harness finds wrong with a task.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    index = _index(tasks, include)
    asked = dict.fromkeys((task.name, task.shots) for task in tasks)  # two metrics of one task are one run
    results: dict[tuple[str, int], dict] = {}
    with tempfile.TemporaryDirectory(prefix="spin-harness-") as converted, _contained() as cut:
        _seed(seed)
        loaded = {(name, shots): _load(index, name, shots, seed, converted) for name, shots in asked}
        model = load_policy(policy, dtype, device)
        lm = HFLM(
            model,
            tokenizer=load_tokenizer(policy.tokenizer),
            batch_size=batch_size,
            # In bf16 the sums over an answer would be rounded to what tells the choices apart.
            softmax_dtype=torch.promote_types(dtype, torch.float32),
        )
        say(f"lm-evaluation-harness {VERSION}: {len(asked)} tasks, no chat template")
        for (name, shots), task_dict in loaded.items():
            _seed(seed)  # whatever other tasks are asked for
            with _told(name, batch_size):
                results[name, shots] = evaluate(
                    lm=lm, task_dict=task_dict, limit=limit, bootstrap_iters=1000, log_samples=False
                )
            if cut.times:
                say(
                    f"note: {name}, {shots} shots: prompts were cut from the left to fit the context of {lm.max_length}"
                )
                cut.times = 0
    return [_row(task, results[task.name, task.shots]) for task in tasks]


def _row(task: Task, results: dict) -> dict[str, Any]:
    found = results["results"][task.name]
    keys = [key for key in found if "," in key and not key.partition(",")[0].endswith("_stderr")]
    if (key := _pick(task.metric, keys)) is None:
        shown = ", ".join(_shown(key, keys) for key in keys)
        raise UserError(f"{KEY}: {task.name} reports no {task.metric}, but {brief(shown, 300)}.")
    stderr = found.get(key.replace(",", "_stderr,", 1))
    return {
        "task": task.name,
        "shots": task.shots,
        "metric": task.metric,
        "value": float(found[key]),
        "stderr": None if stderr is None or isinstance(stderr, str) else float(stderr),  # "N/A"
        "n": int(found["sample_len"]),
        "version": str(results["versions"].get(task.name)),
    }


# --- what tasks there are ---------------------------------------------------------------------------------------------


def _version() -> str:
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{KEY}: lm-evaluation-harness is not installed: {INSTALL}") from error
    if found != VERSION:
        raise UserError(f"{KEY}: lm-evaluation-harness {found} is installed; scores differ by version: {INSTALL}")
    return found


def _folder(include: str | None) -> Path | None:
    if include is None:
        return None
    folder = Path(include).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"evaluation.harness_include={include}: no such folder.")
    return folder


def _index(tasks: Sequence[Task], include: str | None) -> dict[str, Any]:
    """The harness's entries (its `Entry`) by name; those in `include` go before its own."""
    from lm_eval.tasks._index import Kind, TaskIndex

    folder = _folder(include)
    own = TaskIndex.build([folder]) if folder else {}
    if all(task.name in own and own[task.name].kind is Kind.TASK for task in tasks):
        return own  # the harness's own are 15,000 files, several seconds
    return {**_built_in(), **own}


@functools.cache
def _built_in() -> dict[str, Any]:
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    return TaskIndex.build([Path(lm_eval.tasks.__file__).parent])


def _explain_unknown(task: Task, index: dict[str, Any], include: str | None) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = _folder(include)
    for path in sorted(folder.rglob("*.yaml")) if folder else []:
        try:  # the harness passes over files that it can't read, and with them their tasks
            load_yaml(path, resolve_func=False)
        except Exception as error:
            raise UserError(f"{path}: no task can be read from it ({brief(error)}).") from error
    near = difflib.get_close_matches(task.name, index, 3)
    hint = f"near it: {', '.join(near)}" if near else "`lm_eval ls tasks` lists all"
    raise UserError(f"{KEY}: the harness knows no task {brief(task.name)}; {hint}.")


def _leaves(index: dict[str, Any], item: str | dict) -> Iterator[dict]:
    """The configurations of the tasks that an item of a group (or a task's, group's or tag's name) stands for."""
    from lm_eval.tasks._index import Kind

    changes = {} if isinstance(item, str) else dict(item)
    name: Any = item if isinstance(item, str) else item.get("group", item.get("task"))
    if (entry := index.get(name)) is None:
        config: dict = changes  # written out in the group
    else:
        changes = {key: value for key, value in changes.items() if key not in ("group", "task")}
        config = {**(entry.cfg or {}), **changes}
    members: Any = sorted(entry.tags) if entry is not None and entry.kind is Kind.TAG else config.get("task")
    if not isinstance(members, list):
        yield config
        return
    for member in members:
        for leaf in _leaves(index, member):
            yield {**leaf, **changes}


def _known_metrics(entry: Any, leaves: Iterable[dict]) -> list[str] | None:
    """The harness's keys ("metric,filter") that an entry will have by its configuration; None if only its code says."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
    from lm_eval.tasks._index import Kind

    of_leaves: dict[str, None] = {}
    for leaf in leaves:
        if "class" in leaf:
            return None
        listed = leaf.get("metric_list")
        kind = leaf.get("output_type", "generate_until")
        names = DEFAULT_METRIC_REGISTRY[kind] if listed is None else [str(one["metric"]) for one in listed]
        filters = [one["name"] for one in leaf.get("filter_list") or [{"name": "none"}]]
        # A function is named by its path here, by its own name in the results.
        of_leaves |= dict.fromkeys(
            f"{name.rpartition('.')[2] if '/' in name else name},{one}" for name in names for one in filters
        )
    if entry.kind is Kind.TASK:
        return list(of_leaves)
    found: list[str] = []
    for one in (entry.cfg or {}).get("aggregate_metric_list") or []:
        only = one.get("filter_list")
        filters = [key.partition(",")[2] for key in of_leaves if key.partition(",")[0] == one["metric"]]
        found += [f"{one['metric']},{f}" for f in ([only] if isinstance(only, str) else only or filters)]
    return found


def _pick(metric: str, keys: Iterable[str]) -> str | None:
    """The one of the harness's keys that `metric` or `metric:filter` means, None if it is none of them or several."""
    name, _, chosen = metric.partition(":")
    found = [key for key in keys if key == f"{name},{chosen}" or (not chosen and key.partition(",")[0] == name)]
    return found[0] if len(found) == 1 else None


def _shown(key: str, keys: Iterable[str]) -> str:
    """One of the harness's keys as a user writes it: without the filter where it needs none."""
    name = key.partition(",")[0]
    return name if _pick(name, keys) else key.replace(",", ":", 1)


# --- running them -----------------------------------------------------------------------------------------------------


def _load(index: dict[str, Any], name: str, shots: int, seed: int, converted: str) -> Any:
    """The harness's task objects for `name`, with their data."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._factory import TaskFactory

    source = ""

    class Factory(TaskFactory):
        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict:
            nonlocal source
            config = super()._load_full_config(entry, overrides)
            source = " ".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
            _find_beside(config, entry.yaml_path, converted)
            return config

    manager = TaskManager(include_defaults=False)
    manager._index, manager._factory = dict(index), Factory()
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            if (pool := getattr(task, "sampler", None)) is not None and len(pool.df) < shots:
                raise UserError(f"{KEY}: {task.task_name} has {len(pool.df)} examples, too few for {shots} shots.")
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=seed)
    except Exception as error:  # a library reads a user's files, or the hub's: whatever it raises is about them
        if user_message(error) is not None:  # a full disk is no missing data
            raise
        if isinstance(error, OSError) or "Couldn't find cache" in str(error):
            raise UserError(
                f"{KEY}: {name}: its data, {brief(source)}, can't be had ({brief(error)}). Check the path; for data of "
                "the hub run once with the network, without HF_HUB_OFFLINE and HF_DATASETS_OFFLINE."
            ) from error
        raise UserError(f"{KEY}: {name}: the harness can't build it ({brief(error, 300)}).") from error
    return loaded


def _find_beside(config: dict, path: Path | None, converted: str) -> None:
    """Make the local data files of a task relative to its own file `path`: where the process stands decides nothing.

    Their Arrow form goes to the folder `converted`, so that a cache never gives them out after they were changed.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

    def beside(value: Any) -> Any:
        if isinstance(value, dict):
            return {split: beside(files) for split, files in value.items()}
        if isinstance(value, list):
            return [beside(file) for file in value]
        return str(path.parent / Path(value).expanduser()) if path else value

    settings = config.get("dataset_kwargs") or {}
    local = {key: settings[key] for key in ("data_files", "data_dir") if settings.get(key)}
    if config.get("dataset_path") in FORMATS and local and "://" not in str(local):
        config["dataset_kwargs"] = {**settings, **beside(local), "cache_dir": converted}


@contextlib.contextmanager
def _told(name: str, batch_size: int) -> Iterator[None]:
    """What goes wrong inside becomes one line: it is about the task, if not about the machine."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise UserError(f"{KEY}: {name}: memory is short: lower {KEY}_batch_size={batch_size}.") from error
        if user_message(error) is not None:
            raise
        raise UserError(f"{KEY}: {name}: the harness can't run it ({brief(error, 300)}).") from error


class _Cut(logging.Handler):
    """Counts what the harness says of prompts that do not fit; of all else that it logs, nothing is shown."""

    times = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.times += "runcat" in record.getMessage()


@contextlib.contextmanager
def _contained() -> Iterator[_Cut]:
    """The random states, the harness's log, and Python's habit of writing bytecode: put back after."""
    cut, log = _Cut(), logging.getLogger("lm_eval")
    states, bytecode, propagate = (random.getstate(), np.random.get_state()), sys.dont_write_bytecode, log.propagate
    log.addHandler(cut)
    log.propagate = False
    sys.dont_write_bytecode = True  # of tasks' own functions, beside them
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield cut
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        sys.dont_write_bytecode, log.propagate = bytecode, propagate
        log.removeHandler(cut)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
