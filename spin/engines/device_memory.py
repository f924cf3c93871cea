"""Free and used memory of a device."""

import contextlib
import ctypes
import re
import resource
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

GIB = 2**30
LIBRARIES = 0.35 * GIB  # main memory for libraries that are imported later


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory in bytes: `free` for this process, `total`, and in use `before` weights are loaded."""

    free: float
    total: float
    before: float


def free_memory(device: torch.device, processes: int = 1) -> DeviceMemory:
    """Return the current memory of `device`. For a CPU it includes swap and is divided by the number of `processes`."""
    if device.type == "cuda":
        return DeviceMemory(*torch.cuda.mem_get_info(device), before=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # psutil warns if /proc lacks statistics that are not used here
        memory, swap, resident = psutil.virtual_memory(), psutil.swap_memory(), resident_bytes()
    free, total = float(memory.available + swap.free), float(memory.total + swap.total)
    with contextlib.suppress(OSError, ValueError, IndexError):  # no container, or no limit ("max")
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        used -= float(re.findall(r"^inactive_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.M)[0])
        free, total = min(free, limit - used), min(total, limit)
    return DeviceMemory(free / processes + resident, total / processes, resident + LIBRARIES)


def release_free_memory() -> None:
    """Return freed memory to the system.

    glibc keeps the gaps between small tensors, which can be most of the memory in training; torch caches GPU memory.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: on the GPU if it used one, else resident."""
    devices = range(torch.cuda.device_count())
    if on_gpu := max((torch.cuda.max_memory_allocated(device) for device in devices), default=0):
        return on_gpu / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB on Linux
