"""What several servers of one federation tell each other, through the database: that it has changed, who was heard of.

Each of them has its own copy of the state, and never answers from one that was out of date when the call came: it looks
at the database first. What one of them changed wakes those who wait at another within `LOOK_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from pfed_server.clock import Clock
from pfed_server.liveness import Liveness
from pfed_server.store import SharedStore
from pfedsecure.wire.peer import Peer

LOOK_SECONDS = 0.2
"""Between two looks of a server at what others have changed, for the sake of those who wait at it."""
SHARES_A_HEARTBEAT = 2
"""So often a server tells the others whom it has heard of: they take nobody for gone who called it in time."""
BACK_AFTER_HEARTBEATS = 2
"""When no server heard of anybody for so long none was there to hear, and every member counts as just heard of."""

_logger = logging.getLogger(__name__)


class Looks:
    """Runs one `look` at a time. Whoever asks gets one that began after he did, with all others who asked meanwhile."""

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        self._look = look
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Raises what the look raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running))
            self._next.add_done_callback(_seen)
        await asyncio.shield(self._next)

    async def keep_looking(self) -> None:
        """Look again and again, for ever. A database that is away is told once, and when it is back."""
        away = False
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self()
            except Exception as error:
                if not away:
                    _logger.warning("the database cannot be used; calls fail until it can: %s", _first_line(error))
                away = True
            else:
                if away:
                    _logger.info("the database can be used again")
                away = False

    async def end(self) -> None:
        """Return when no look is under way."""
        under_way = {task for task in (self._running, self._next) if task is not None}
        if under_way:
            await asyncio.wait(under_way)

    async def _after(self, running: asyncio.Task[None] | None) -> None:
        if running is not None:
            await asyncio.wait({running})
        self._running, self._next = self._next, None
        await self._look()


class Presence:
    """Who was heard of, by this server and the others. `share` and `begin` only while this server has the lock."""

    def __init__(self, store: SharedStore, liveness: Liveness, clock: Clock, heartbeat_seconds: float) -> None:
        self._store = store
        self._liveness = liveness
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds
        self._untold: set[str] = set()
        self._told_at = -heartbeat_seconds

    def heard(self, name: str) -> None:
        """Have the others told at the next occasion that this server heard of `name`."""
        self._untold.add(name)

    def is_due(self, known: Collection[str]) -> bool:
        """Whether it is time to share, or somebody was heard of who is not `known` to be there."""
        return not self.seconds_until_due() or not self._untold <= set(known)

    def seconds_until_due(self) -> float:
        """Until the next time to share."""
        return max(self._told_at + self._heartbeat_seconds / SHARES_A_HEARTBEAT - self._clock.monotonic(), 0.0)

    async def begin(self, members: Collection[str]) -> None:
        """Find out who of `members` is there, when a server starts."""
        silence = await asyncio.to_thread(self._store.hear, {})
        if min(silence.values(), default=float("inf")) > BACK_AFTER_HEARTBEATS * self._heartbeat_seconds:
            silence = dict.fromkeys(members, 0.0)
        self._liveness.learn(silence)

    async def share(self, members: Collection[str]) -> None:
        """Tell the other servers whom of `members` this one has heard of since the last time, and learn of theirs."""
        telling = self._untold
        self._untold = set()
        try:
            ages = {name: self._liveness.silence(name) for name in telling if name in members}
            silence = {name: seconds for name, seconds in ages.items() if seconds is not None}
            self._liveness.learn(await asyncio.to_thread(self._store.hear, silence))
        except BaseException:
            self._untold |= telling
            raise
        self._told_at = self._clock.monotonic()


def up_to_date(look: Callable[[], Awaitable[None]]) -> Callable[[Peer], AbstractAsyncContextManager[None]]:
    """A `Guard` that lets every call through, once this server knows what the others had changed when it came."""

    @asynccontextmanager
    async def guard(_peer: Peer) -> AsyncIterator[None]:
        await look()
        yield

    return guard


def _seen(task: asyncio.Task[None]) -> None:
    """Whoever waited was told of an error; there may be nobody left."""
    if not task.cancelled():
        task.exception()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
