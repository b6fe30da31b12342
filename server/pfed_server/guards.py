"""Guards: what goes on around every call of a known caller, whatever the method.

A guard is an asynchronous context in which the call runs. It may refuse it, by raising a PfedError before it, or end
it, by raising one while it runs. Behind `CallInterceptor`, which has identified the caller and reports what is raised.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeAlias

from pfed_server.around import AroundCalls, Call, Passage
from pfed_server.service import Identify
from pfedsecure.wire.peer import Peer

Guard: TypeAlias = Callable[[Peer], AbstractAsyncContextManager[None]]


class GuardInterceptor(AroundCalls):
    """Runs every call inside `guards`, the first outermost, which are told the caller that `identify` finds."""

    def __init__(self, identify: Identify, guards: Sequence[Guard]) -> None:
        self._identify = identify
        self._guards = guards

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[Passage]:
        peer = self._identify(call.context)
        async with AsyncExitStack() as stack:
            for guard in self._guards:
                await stack.enter_async_context(guard(peer))
            yield Passage()
