"""What the server's interceptors have in common: each does one thing around every call, whatever the method's shape.

gRPC has a handler of its own for each shape of a method (one message or many, one reply or many). What an interceptor
does around a call, and to what goes in and out, is the same for all of them; `AroundCalls` makes handlers of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import grpc
import grpc.aio

from pfedsecure.wire.peer import ServicerContext

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True)
class Call:
    """One call. `method` is one that the server has, never what a caller made up."""

    method: str
    context: ServicerContext
    decode: Callable[[bytes], Any]
    """How a message of the caller is read, and a reply written; what an interceptor of bytes needs."""
    encode: Callable[[Any], bytes]


class Passage:
    """What goes through an interceptor in one call. Nothing of it is changed here."""

    def into(self, message: Any) -> Any:
        """A message of the caller, on its way in."""
        return message

    def out(self, reply: Any) -> Any:
        """A reply, on its way out."""
        return reply


class AroundCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """An interceptor: `around` every call, its `Passage` at everything that goes in and out.

    `takes_bytes`: its `Passage.into` gets what the caller sent as it came, and gives what is next what that expects.
    `gives_bytes`: its `Passage.out` makes bytes of a reply.
    """

    takes_bytes: ClassVar[bool] = False
    gives_bytes: ClassVar[bool] = False

    @abstractmethod
    def around(self, call: Call) -> AbstractAsyncContextManager[Passage]:
        """The context that a call runs in. It may refuse the call by raising before it, or end it while it runs."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return handler if handler is None else self._surrounded(handler, handler_call_details.method)

    def _surrounded(self, handler: Any, method: str) -> Handler:
        def around(context: ServicerContext) -> AbstractAsyncContextManager[Passage]:
            return self.around(Call(method, context, handler.request_deserializer, handler.response_serializer))

        async def unary_unary(message: Any, context: ServicerContext) -> Any:
            async with around(context) as passage:
                return passage.out(await handler.unary_unary(passage.into(message), context))

        # Writes by itself, so that the call can be ended also while it waits for a slow caller to take a reply.
        async def unary_stream(message: Any, context: ServicerContext) -> None:
            async with around(context) as passage:
                writing = _Writing(context, passage)
                replies = handler.unary_stream(passage.into(message), writing)
                if not isinstance(replies, AsyncGenerator):  # gRPC's other way: it writes to the context by itself
                    await replies
                    return
                async for reply in replies:
                    await writing.write(reply)

        async def stream_unary(messages: AsyncIterator[Any], context: ServicerContext) -> Any:
            async with around(context) as passage, aclosing(_each(messages, passage)) as arriving:
                return passage.out(await handler.stream_unary(arriving, context))

        decode = None if self.takes_bytes else handler.request_deserializer
        encode = None if self.gives_bytes else handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(stream_unary, decode, encode)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(unary_stream, decode, encode)
        return grpc.unary_unary_rpc_method_handler(unary_unary, decode, encode)


class _Writing:
    """A call's context whose replies go through a passage; everything else is the context's own."""

    def __init__(self, context: ServicerContext, passage: Passage) -> None:
        self._context = context
        self._passage = passage

    async def write(self, reply: Any) -> None:
        await self._context.write(self._passage.out(reply))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


async def _each(messages: AsyncIterator[Any], passage: Passage) -> AsyncGenerator[Any]:
    async with aclosing(aiter(messages)) as arriving:  # type: ignore[type-var]
        async for message in arriving:
            yield passage.into(message)
