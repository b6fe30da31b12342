"""What SIGTERM and Ctrl-C do to a client: end what it does, in order, and give the exit status."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine

from pfedsecure.console import INTERRUPTED


async def until_stopped(work: Coroutine[None, None, None]) -> int:
    """Exit status of `work`: 0, also when SIGTERM ended it, and 130 after SIGINT. A second signal ends it at once."""
    signals: list[int] = []
    task = asyncio.ensure_future(work)

    def stop(number: int) -> None:
        if signals:
            os._exit(128 + number)  # what is on disk is whole at any instant
        signals.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not signals:
            raise
        return INTERRUPTED if signals[0] == signal.SIGINT else 0
    return 0
