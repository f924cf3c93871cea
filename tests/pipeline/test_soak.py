"""Tests that memory and other resources do not grow in games of many iterations and sweeps of many points."""

import json
from statistics import median

import pytest

from tests.games import Place

WORDS = ("data.size=8", "data.held_out=4", "generation.max_new_tokens=8", "schedule.batch_size=4")
# PyTorch caches 1024 CPU kernels by shape, some hundred MiB, which would hide other growth.
NO_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
# After each call of a function: resident memory in MiB, bytes of live tensors, mapped files of the game, open files,
# threads, children, bytes in the store.
MEASURE = """
import ctypes, gc, json, os, resource, torch
from pathlib import Path
import {module} as module
from spin.runtime.artifacts import folder_size
function = module.{name}
def wrapper(*args, **kwargs):
    try:
        return function(*args, **kwargs)
    finally:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        usage = dict(
            memory=int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20,
            files=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            children=sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children")),
            tensors=sum(tensor.nbytes for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor)),
            mapped=Path("/proc/self/maps").read_text().count({folder!r}),
            store=folder_size(Path({store!r})),
        )
        with open({log!r}, "a") as file:
            file.write(json.dumps(usage) + "\\n")
module.{name} = wrapper
"""


def measure(place: Place, function: str, *words: str) -> dict[str, list[float]]:
    """Play, and return the process's use of every resource after each call of `function`."""
    module, _, name = function.rpartition(".")
    log = place.folder / "usage.jsonl"
    code = MEASURE.format(
        module=module, name=name, folder=str(place.folder), store=str(place.folder / "store"), log=str(log)
    )
    done = place.start(*WORDS, *words, code=code, env=NO_KERNEL_CACHES).wait(timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    usage = {name: [row[name] for row in rows] for name in rows[0]}
    for quantity, values in usage.items():
        print(f"{quantity}: {', '.join(f'{value:.0f}' for value in values)}")
    return usage


def assert_flat(usage: dict[str, list[float]], steps: int, max_growth: float) -> None:
    assert {len(values) for values in usage.values()} == {steps}
    first, later = ({name: values[part] for name, values in usage.items()} for part in (slice(5), slice(5, None)))
    for quantity in ("files", "children", "mapped"):
        assert max(later[quantity]) <= max(first[quantity]), quantity
    assert max(later["tensors"]) <= max(first["tensors"]) + 50_000  # log-probs are kept; one policy has 400,000 bytes
    assert max(later["threads"]) <= max(first["threads"]) + 4  # pools of libraries start threads when they need them
    per_step = (median(later["memory"][-5:]) - median(later["memory"][:5])) / (steps - 10)
    print(f"memory grows by {per_step:.2f} MiB per step after the fifth")
    assert per_step < max_growth


@pytest.mark.slow
def test_many_iterations(place):
    usage = measure(place, "spin.game.write_record", "iter=29")
    usage = {quantity: values[2:] for quantity, values in usage.items()}  # without those of the start and SFT
    assert_flat(usage, 30, max_growth=2.0)  # the report grows, and with it the memory that Python keeps
    sizes = [after - before for before, after in zip(usage["store"], usage["store"][1:], strict=False)]
    print(f"the store grows by {min(sizes)} to {max(sizes)} bytes per iteration")
    assert max(sizes) < 1.05 * min(sizes)


@pytest.mark.slow
def test_many_points(place):
    words = ("-m", "iter=0", "seed=range(40)", "evaluation=none", f"hydra.sweep.dir={place.folder}/sweep")
    usage = measure(place, "spin.pipeline.points.play_point", *words)
    assert_flat(usage, 40, max_growth=0.5)  # Hydra keeps the settings of each point
