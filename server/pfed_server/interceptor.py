"""What is done to every call of ours: messages are decoded and errors told in the same way, whatever the method.

gRPC's own way with a message that cannot be decoded is a traceback here and an unknown error there; to us it is a
client's mistake like any other.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from pfedsecure.console import one_line
from pfedsecure.errors import MessageRejected, PfedError
from pfedsecure.wire.peer import ServicerContext
from pfedsecure.wire.status import abort, abort_code

OUR_SERVICES = "/pfedsecure."

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_logger = logging.getLogger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Decodes the messages of our services and reports what their methods raise."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OUR_SERVICES):
            return handler
        return _wrapped(handler, method)


def _wrapped(handler: Any, method: str) -> Handler:
    def decode(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError:
            raise MessageRejected(f"a message of {method} cannot be decoded") from None

    async def unary_unary(data: bytes, context: ServicerContext) -> Any:
        async with _reported(method, context):
            return await handler.unary_unary(decode(data), context)

    async def unary_stream(data: bytes, context: ServicerContext) -> AsyncIterator[Any]:
        async with _reported(method, context):
            async for reply in handler.unary_stream(decode(data), context):
                yield reply

    async def stream_unary(messages: AsyncIterator[bytes], context: ServicerContext) -> Any:
        async with _reported(method, context):
            return await handler.stream_unary((decode(data) async for data in messages), context)

    serializer = handler.response_serializer
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(stream_unary, None, serializer)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(unary_stream, None, serializer)
    return grpc.unary_unary_rpc_method_handler(unary_unary, None, serializer)


@asynccontextmanager
async def _reported(method: str, context: ServicerContext) -> AsyncIterator[None]:
    """Turn what is raised inside into a gRPC status: a caller's mistake in words, anything else without details."""
    try:
        yield
    except PfedError as error:
        if abort_code(error) is not grpc.StatusCode.INTERNAL:
            _logger.info("%s refused to %s: %s", method, context.peer(), one_line(str(error)))
            await abort(context, error)
        await _abort_internal(method, context)
    except Exception:
        await _abort_internal(method, context)


async def _abort_internal(method: str, context: ServicerContext) -> None:
    _logger.exception("%s failed", method)
    await context.abort(grpc.StatusCode.INTERNAL)
