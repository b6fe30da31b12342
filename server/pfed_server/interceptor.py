"""What is done to every call: the caller is identified, messages are decoded and errors told, whatever the method.

gRPC's own way with a message that cannot be decoded is a traceback here and an unknown error there; to us it is a
client's mistake like any other.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pfed_server.refusal_log import RefusalLog
from pfed_server.service import Identify
from pfed_server.store import StateOvertaken
from pfedsecure.errors import MessageRejected, PfedError, ServerUnreachable, TooManyCalls
from pfedsecure.wire.peer import ServicerContext
from pfedsecure.wire.status import abort, abort_code

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_STORAGE_FAULTS = (OperationalError, InterfaceError, InternalError, PoolTimeout, StateOvertaken, OSError)
"""A full disk, a locked database or one that is away, and a change that another server was faster with."""

_logger = logging.getLogger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets in only callers that `identify` knows, in any role, decodes messages and reports what methods raise.

    No service, health included, answers anybody else, whether or not it asks for its caller itself.
    """

    def __init__(self, identify: Identify) -> None:
        self._identify = identify
        self._refusals = RefusalLog()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return (
            handler
            if handler is None
            else _wrapped(handler, handler_call_details.method, self._identify, self._refusals)
        )


def _wrapped(handler: Any, method: str, identify: Identify, refusals: RefusalLog) -> Handler:
    def decode(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError:
            raise MessageRejected(f"a message of {method} cannot be decoded") from None

    async def unary_unary(data: bytes, context: ServicerContext) -> Any:
        async with _reported(method, context, refusals):
            identify(context)
            return await handler.unary_unary(decode(data), context)

    async def unary_stream(data: bytes, context: ServicerContext) -> None:
        async with _reported(method, context, refusals):
            identify(context)
            replies = handler.unary_stream(decode(data), context)
            if not isinstance(replies, AsyncGenerator):  # gRPC's other way: it writes to the context by itself
                await replies
                return
            async for reply in replies:
                await context.write(reply)

    async def decoded(messages: Any) -> AsyncGenerator[Any]:
        async with aclosing(aiter(messages)) as arriving:
            async for data in arriving:
                yield decode(data)

    async def stream_unary(messages: AsyncIterator[bytes], context: ServicerContext) -> Any:
        async with _reported(method, context, refusals), aclosing(decoded(messages)) as requests:
            identify(context)
            return await handler.stream_unary(requests, context)

    serializer = handler.response_serializer
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(stream_unary, None, serializer)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(unary_stream, None, serializer)
    return grpc.unary_unary_rpc_method_handler(unary_unary, None, serializer)


@asynccontextmanager
async def _reported(method: str, context: ServicerContext, refusals: RefusalLog) -> AsyncIterator[None]:
    """Turn what is raised inside into a gRPC status: a caller's mistake in words, anything else without details.

    A fault of the storage may pass: clients are told to try again.
    """
    try:
        yield
    except PfedError as error:
        if abort_code(error) is not grpc.StatusCode.INTERNAL:
            if not isinstance(error, TooManyCalls):  # `admission` tells of those, and not of each
                refusals.tell(method, context.peer(), error)
            await abort(context, error)
        await _abort_internal(method, context)
    except _STORAGE_FAULTS:
        _logger.exception("%s failed for now", method)
        await abort(context, ServerUnreachable("the server cannot use its storage at the moment; its log says why"))
    except NotImplementedError:  # a method that its service has only on paper, such as List of gRPC's health
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)
    except Exception:
        await _abort_internal(method, context)


async def _abort_internal(method: str, context: ServicerContext) -> None:
    _logger.exception("%s failed", method)
    await context.abort(grpc.StatusCode.INTERNAL)
