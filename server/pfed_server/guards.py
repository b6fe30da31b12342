"""Guards: what goes on around every call of a known caller, whatever the method.

A guard is an asynchronous context in which the call runs. It may refuse it, by raising a PfedError before it, or end
it, by raising one while it runs. Behind `CallInterceptor`, which has identified the caller and reports what is raised.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio

from pfed_server.service import Identify
from pfedsecure.wire.peer import Peer, ServicerContext

Guard: TypeAlias = Callable[[Peer], AbstractAsyncContextManager[None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GuardInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Runs every call inside `guards`, the first outermost, which are told the caller that `identify` finds."""

    def __init__(self, identify: Identify, guards: Sequence[Guard]) -> None:
        self._identify = identify
        self._guards = guards

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return handler if handler is None else _guarded(handler, self._inside)

    @asynccontextmanager
    async def _inside(self, context: ServicerContext) -> AsyncIterator[None]:
        peer = self._identify(context)
        async with AsyncExitStack() as stack:
            for guard in self._guards:
                await stack.enter_async_context(guard(peer))
            yield


def _guarded(handler: Any, guard: Callable[[ServicerContext], AbstractAsyncContextManager[None]]) -> Handler:
    async def unary_unary(request: Any, context: ServicerContext) -> Any:
        async with guard(context):
            return await handler.unary_unary(request, context)

    # Writes by itself, so that the guard can end it also while it waits for a slow caller to take a reply.
    async def unary_stream(request: Any, context: ServicerContext) -> None:
        async with guard(context):
            replies = handler.unary_stream(request, context)
            if not isinstance(replies, AsyncGenerator):
                await replies
                return
            async for reply in replies:
                await context.write(reply)

    async def stream_unary(requests: AsyncIterator[Any], context: ServicerContext) -> Any:
        async with guard(context):
            return await handler.stream_unary(requests, context)

    serializers = handler.request_deserializer, handler.response_serializer
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(stream_unary, *serializers)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(unary_stream, *serializers)
    return grpc.unary_unary_rpc_method_handler(unary_unary, *serializers)
