"""Ctrl-C and SIGTERM while the demo has children: noticed at once, obeyed where nothing is half done.

An exception out of a signal handler comes wherever the interpreter happens to be. In the midst of gRPC's own code that
left a channel behind which crashed the process at its end; while children are being stopped it left children behind.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A `with` block, in the main thread, in which the first signal ends only `wait`, `check` or the block itself.

    How it ends: KeyboardInterrupt after SIGINT, SystemExit with status 128 + n after another.
    """

    def __init__(self) -> None:
        self._came = threading.Event()
        self._number = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise when a signal came."""
        if self._came.is_set():
            if self._number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + self._number)

    def wait(self, seconds: float) -> None:
        """Sleep so long, or until a signal comes, which is raised."""
        self._came.wait(seconds)
        self.check()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._number = self._number or number
        self._came.set()
