"""How those who wait for news are woken: soon where there is something for them to do, otherwise not too often.

Every member that joins, leaves or falls silent changes what all others may see, and they do nothing about it but show
how many there are. If each such change woke everybody, one member that joins and leaves again and again would keep the
server busy with all others, and a thousand that join one after the other would cost half a million answers.

When a step of a round begins everybody has something to do. They are woken in groups with a pause in between, so that
what others ask meanwhile is answered between two groups and not behind all of them. A server that is busy wakes more
slowly by itself: its next group waits with everything else.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

WOKEN_A_SECOND = 25.0
"""Callers, in the long run, for news that nobody acts on: a few hear of each change at once, a thousand when they ask
again, as they do with every heartbeat."""
GROUP = 10
PAUSE_SECONDS = 0.01
"""Between two groups: a thousand are woken within a second."""


class News:
    """What is new, by version, for those who wait for it. To be used inside one event loop, whose time it goes by.

    Guaranteed: whoever waits hears of an urgent change in its turn, and of any other in the end.
    """

    def __init__(self, version: int) -> None:
        self._newest = self._told = version
        self._groups: list[_Group] = []
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
        for group in self._groups:
            group.woken.set()
        if self._telling is not None:
            self._telling.cancel()

    def must_wait(self, version: int) -> bool:
        """Whether there is nothing to be told to somebody who has seen `version`."""
        return self._told <= version <= self._newest and not self._over

    @contextmanager
    def change(self) -> Iterator[asyncio.Event]:
        """What a caller is to wait for, once: it is set when that caller is woken."""
        if not self._groups or self._groups[-1].members >= GROUP:
            self._groups.append(_Group())
        group = self._groups[-1]
        group.members += 1
        try:
            yield group.woken
        finally:
            group.members -= 1
            if not group.members and group in self._groups:
                self._groups.remove(group)

    def _wake(self) -> None:
        self._told = self._newest
        groups, self._groups = self._groups, []
        # Also after urgent news: it is the same work.
        waiting = sum(group.members for group in groups)
        self._due_at = asyncio.get_running_loop().time() + waiting / WOKEN_A_SECOND
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._wake_in_turn(deque(groups))

    def _wake_in_turn(self, groups: deque[_Group]) -> None:
        if groups:
            groups.popleft().woken.set()
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._wake_in_turn, groups)


@dataclass(eq=False)
class _Group:
    """Callers that wait and are woken together."""

    members: int = 0
    woken: asyncio.Event = field(default_factory=asyncio.Event)
