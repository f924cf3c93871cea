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

LIBRARIES = 0.35 * GIB  # of a process on the CPU: what is imported on the way (the two-sample tests, say)


# --- is there enough? -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device: those that are free for this run, what it has in all, and what the run takes there before any
    weight is loaded."""

    free: float
    total: float
    before: float


def free_memory(device: torch.device, processes: int = 1) -> DeviceMemory:
    """What the device has now, for each of so many processes that share it: on a CPU those of one machine."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(free, total, 0.0)
    resident = resident_bytes()
    available, everything = _memory()
    return DeviceMemory(available / processes + resident, everything / processes, resident + LIBRARIES)


def release_free_memory() -> None:
    """Return to the system what is free: glibc keeps what small tensors leave, of a training most of its memory."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _memory() -> tuple[float, float]:
    """Free and all memory of this machine, or of the container that it is."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value, *_ = line.replace(":", " ").split()
            found[name] = 1024 * float(value)
    if not found:  # no Linux
        total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        return total, total
    free, total = found["MemAvailable"] + found["SwapFree"], found["MemTotal"] + found["SwapTotal"]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        free, total = min(free, limit - used), min(total, limit)
    return free, total


def resident_bytes() -> float:
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
