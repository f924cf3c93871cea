"""Free memory of a device."""

import contextlib
import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
LIBRARIES = 0.35 * GIB  # what libraries that are imported later take of a CPU's memory


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device: `free` for this process, `total`, and `before`: what the process holds before weights are loaded."""

    free: float
    total: float
    before: float


def free_memory(device: torch.device, processes: int = 1) -> DeviceMemory:
    """The memory of `device` now; a CPU's is divided by the `processes` that share it."""
    if device.type == "cuda":
        return DeviceMemory(*torch.cuda.mem_get_info(device), before=0.0)
    resident = resident_bytes()
    free, total = _cpu_memory()
    return DeviceMemory(free / processes + resident, total / processes, resident + LIBRARIES)


def release_free_memory() -> None:
    """Return freed memory to the system: glibc keeps the holes between small tensors, which add up to most of a training's
    memory, and torch keeps freed GPU memory."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _cpu_memory() -> tuple[float, float]:
    """Free and total bytes, swap included, of this machine or of its container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        return total, total
    sizes = {name: 1024 * float(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    free, total = sizes["MemAvailable"] + sizes["SwapFree"], sizes["MemTotal"] + sizes["SwapTotal"]
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        free, total = min(free, limit - used), min(total, limit)
    return free, total


def resident_bytes() -> float:
    """Bytes that this process holds in memory; outside Linux its peak."""
    with contextlib.suppress(OSError):
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


def peak_memory_gib() -> float:
    """The peak memory of this process: allocated on the GPU if it computed there, else resident."""
    devices = range(torch.cuda.device_count())
    if on_gpu := max((torch.cuda.max_memory_allocated(device) for device in devices), default=0):
        return on_gpu / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB on Linux
