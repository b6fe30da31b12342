"""Whether what lies on disk can have been written by others than its reader, and root."""

from __future__ import annotations

import os

_WRITABLE_BY_OTHERS = 0o022


def others_can_write(status: os.stat_result) -> bool:
    """Of a file or folder: whether another user owns it, or may write to it."""
    return status.st_uid not in (os.geteuid(), 0) or bool(status.st_mode & _WRITABLE_BY_OTHERS)
