"""How much memory a process has, and ever had, in MiB."""

from __future__ import annotations

import sys
from pathlib import Path


def resident_mib(pid: int) -> float:
    """Resident memory of a process, on Linux."""
    return _of_status(str(pid), "VmRSS")


def peak_mib() -> float:
    """Peak resident memory of this process. Not `ru_maxrss` on Linux: that starts with the parent's."""
    if sys.platform.startswith("linux"):
        return _of_status("self", "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _of_status(process: str, name: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
