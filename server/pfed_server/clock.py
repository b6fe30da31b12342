"""Time as the coordinator sees it, so that tests and simulations can drive it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Protocol


class Clock(Protocol):
    """Wall-clock time for what must survive a restart, monotonic time for what need not, and waiting."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        """Return when `event` is set, or after `seconds` at the latest; None: however long it takes."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
