"""Files that are read again when they change, and again when they could not be read: tried often, told once."""

from __future__ import annotations

import time
from pathlib import Path

TRY_AGAIN_SECONDS = 1.0

Stamp = list[tuple[int, int, int] | None]
"""What tells one version of the files from the next; None for a file that is not there."""


class WatchedFiles:
    """`paths` as they are now count as taken. May be asked from any thread, at any rate."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._seen = self._stamp()
        self._failed, self._try_again, self._told = self._seen, 0.0, ""

    def changed(self) -> Stamp | None:
        """The stamp of files that are to be read now; None where nothing is new, or reading has just failed."""
        stamp = self._stamp()
        if stamp == self._seen or (stamp == self._failed and time.monotonic() < self._try_again):
            return None
        return stamp

    def taken(self, stamp: Stamp) -> None:
        """What was read at `stamp` is in use."""
        self._seen, self._told = stamp, ""

    def refused(self, stamp: Stamp, problem: str) -> bool:
        """What was read at `stamp` cannot be used; whether that is news.

        It may be possible soon, with nothing of the files changed: by their mode, or free descriptors.
        """
        known = stamp == self._failed and problem == self._told
        self._failed, self._told, self._try_again = stamp, problem, time.monotonic() + TRY_AGAIN_SECONDS
        return not known

    def _stamp(self) -> Stamp:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
