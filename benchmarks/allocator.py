"""Memory that was freed stays with the process. Convolutions on a CPU ask for the same large buffers again and again,
and glibc's habit of handing them back to the kernel each time takes more than half of MobileNetV2's time.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, from <malloc.h>, with the values that were measured.
_SETTINGS = {
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: never shrink the heap
    -2: 256 * 2**20,  # M_TOP_PAD: grow it by so much at once
    -3: 2**31 - 1,  # M_MMAP_THRESHOLD: take nothing from outside the heap
}


def keep_freed_memory() -> bool:
    """Set glibc's allocator so; False on other systems, where nothing is changed."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library on Linux is glibc
    return mallopt is not None and all(mallopt(key, value) == 1 for key, value in _SETTINGS.items())
