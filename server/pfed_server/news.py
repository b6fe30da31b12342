"""How those who wait for news are woken: at once where there is something for them to do, otherwise not too often.

Every member that joins, leaves or falls silent changes what all others may see, and they do nothing about it but show
how many there are. If each such change woke everybody, one member that joins and leaves again and again would keep the
server busy with all others, and a thousand that join one after the other would cost half a million answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

WOKEN_A_SECOND = 100.0
"""Callers, in the long run, for news that nobody acts on: a few hear of each change, a thousand every ten seconds."""


class News:
    """What is new, by version, for those who wait for it. To be used inside one event loop, whose time it goes by.

    Guaranteed: whoever waits hears of an urgent change at once, and of any other in the end.
    """

    def __init__(self, version: int) -> None:
        self._newest = self._told = version
        self._changed = asyncio.Event()
        self._waiting = 0
        self._due_at = -math.inf
        self._telling: asyncio.TimerHandle | None = None
        self._over = False

    def tell(self, version: int, *, urgent: bool) -> None:
        """There is a newer version; those who wait for one are woken now or, if that is too early, once it is due."""
        self._newest = version
        loop = asyncio.get_running_loop()
        if urgent or loop.time() >= self._due_at:
            self._wake()
        elif self._telling is None:
            self._telling = loop.call_at(self._due_at, self._wake)

    def end(self) -> None:
        """Nobody waits any more."""
        self._over = True
        self._wake()

    def must_wait(self, version: int) -> bool:
        """Whether there is nothing to be told to somebody who has seen `version`."""
        return self._told <= version <= self._newest and not self._over

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Entered by a caller while it waits, again and again, for `changed`."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    @property
    def changed(self) -> asyncio.Event:
        """Is set when those who wait now are woken."""
        return self._changed

    def _wake(self) -> None:
        self._told = self._newest
        # Also after urgent news: it is the same work.
        self._due_at = asyncio.get_running_loop().time() + self._waiting / WOKEN_A_SECOND
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._changed.set()
        self._changed = asyncio.Event()
