"""An event loop whose time passes only while everybody waits, and then at once; threads are not used."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """What is meant for another thread is done at once, so that the order of events is always the same."""

    def __init__(self) -> None:
        self._virtual = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self._virtual

    def jump(self, seconds: float) -> None:
        self._virtual += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everybody waits, and for nothing")
            self._loop.jump(timeout)
        return ready


class VirtualClock:
    """`pfed_server.clock.Clock` of a `VirtualTimeLoop`; `offset` is by how much the machine's clock is wrong."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop
        self.offset = 0.0

    def now(self) -> float:
        return 1.7e9 + self._loop.time() + self.offset

    def monotonic(self) -> float:
        return self._loop.time()

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
