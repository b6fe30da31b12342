"""How much memory a process has, and ever had, in MiB, and how much processor time it took."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def resident_mib(pid: int) -> float:
    """Resident memory of a process, on Linux."""
    return _of_status(str(pid), "VmRSS")


def peak_resident_mib(pid: int) -> float:
    """The most that it ever was, on Linux."""
    return _of_status(str(pid), "VmHWM")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, its threads and the children that it waited for, on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """Peak resident memory of this process. Not `ru_maxrss` on Linux: that starts with the parent's."""
    if sys.platform.startswith("linux"):
        return _of_status("self", "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _of_status(process: str, name: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
