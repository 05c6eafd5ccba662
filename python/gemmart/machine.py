"""What this process may use of the machine: cores and memory, cgroup limits respected."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores that this process may run on: its affinity mask, at most the cgroup's quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    logical, physical = psutil.cpu_count() or 1, psutil.cpu_count(logical=False) or 1
    cores = max(1, allowed * physical // logical)
    quota = _cgroup_words("cpu.max")  # "max 100000", or microseconds of CPU a period
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def available_memory() -> int:
    """Bytes that can still be allocated: the system's, at most what the cgroup leaves."""
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup_words("memory.max"), _cgroup_words("memory.current")
    if limit and used and limit[0] != "max":
        available = min(available, max(0, int(limit[0]) - int(used[0])))
    return available


def _cgroup_words(name: str) -> list[str]:
    """The words of a cgroup v2 file of this process's group; none where there is no such file."""
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        return (CGROUP / group / name).read_text().split()
    except OSError:
        return []
