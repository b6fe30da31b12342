"""Every call as seen from outside of what answers it: for the audit log who was refused, for the metrics the rest.

What TLS itself refuses, such as a certificate of another authority, ends in the handshake: no call, nobody is told.
"""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol, TypeAlias

import grpc
import grpc.aio

from pfed_server import events
from pfedsecure.errors import IdentityError, PfedError
from pfedsecure.pki.certificates import fingerprint, parse_certificate, read_subject
from pfedsecure.wire.peer import ServicerContext
from pfedsecure.wire.status import ERROR_KEY

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_CLASSES = {cls.wire_code() for cls in PfedError.__subclasses__()}


class Calls(Protocol):
    """What is counted of calls. `method` is one that the server has, never what a caller made up."""

    def ended(self, method: str, code: str, seconds: float, received: int, sent: int) -> None:
        """A call ended with a gRPC code; bytes of messages both ways."""

    def refused(self, reason: str) -> None:
        """It ended because the caller made a mistake, or may not call. `reason`: the class of the error."""


class CallObserver(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Stands before all other interceptors. Changes nothing of a call."""

    def __init__(self, tell: events.Listener, calls: Sequence[Calls] = ()) -> None:
        self._tell = tell
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return handler if handler is None else self._observed(handler, handler_call_details.method)

    def _observed(self, handler: Any, method: str) -> Handler:
        async def unary_unary(data: bytes, context: ServicerContext) -> Any:
            async with self._watched(method, context) as traffic:
                traffic.received += len(data)
                return traffic.counted(await handler.unary_unary(data, context), handler.response_serializer)

        async def unary_stream(data: bytes, context: ServicerContext) -> None:
            async with self._watched(method, context) as traffic:
                traffic.received += len(data)
                await handler.unary_stream(data, _Counting(context, traffic, handler.response_serializer))

        async def stream_unary(messages: AsyncIterator[bytes], context: ServicerContext) -> Any:
            async with self._watched(method, context) as traffic, aclosing(_counted(messages, traffic)) as arriving:
                return traffic.counted(await handler.stream_unary(arriving, context), handler.response_serializer)

        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(stream_unary)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(unary_stream)
        return grpc.unary_unary_rpc_method_handler(unary_unary)

    @asynccontextmanager
    async def _watched(self, method: str, context: ServicerContext) -> AsyncIterator[_Traffic]:
        traffic, began = _Traffic(), time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield traffic
        except Exception:
            code = _code(context)
            await self._judge(method, context)
            raise
        except BaseException:  # the caller gave up, or the server is going down
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            seconds = time.monotonic() - began
            for calls in self._calls:
                calls.ended(method, code.name, seconds, traffic.received, traffic.sent)

    async def _judge(self, method: str, context: ServicerContext) -> None:
        metadata: Any = context.trailing_metadata() or ()
        reason = dict(metadata).get(ERROR_KEY, "")
        if reason not in _CLASSES or reason == "ServerUnreachable":  # that one is the server's own fault
            return
        for calls in self._calls:
            calls.refused(reason)
        name, key = _caller(context)
        details: Any = context.details() or ""
        why = details.decode(errors="replace") if isinstance(details, bytes) else details
        await self._tell(events.refused(method, reason, why, name, key, _host(context.peer())))


class _Traffic:
    """Bytes of messages of one call."""

    def __init__(self) -> None:
        self.received = 0
        self.sent = 0

    def counted(self, reply: Any, serialize: Callable[[Any], bytes]) -> bytes:
        data = serialize(reply)
        self.sent += len(data)
        return data


class _Counting:
    """A call's context whose replies are counted; everything else is the context's own."""

    def __init__(self, context: ServicerContext, traffic: _Traffic, serialize: Callable[[Any], bytes]) -> None:
        self._context = context
        self._traffic = traffic
        self._serialize = serialize

    async def write(self, reply: Any) -> None:
        await self._context.write(self._traffic.counted(reply, self._serialize))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


async def _counted(messages: AsyncIterator[bytes], traffic: _Traffic) -> AsyncGenerator[bytes]:
    async for data in messages:
        traffic.received += len(data)
        yield data


def _code(context: ServicerContext) -> grpc.StatusCode:
    """Of a call that was ended with an error."""
    code: Any = context.code()
    ended = next((status for status in grpc.StatusCode if code in (status, status.value[0])), grpc.StatusCode.OK)
    return grpc.StatusCode.UNKNOWN if ended is grpc.StatusCode.OK else ended


def _caller(context: ServicerContext) -> tuple[str, str]:
    """Name and key fingerprint of the caller's certificate, which TLS has checked; empty where there is none."""
    pem = list(context.auth_context().get("x509_pem_cert", ()))
    if len(pem) != 1:
        return "", ""
    try:
        certificate = parse_certificate(pem[0], "the certificate of the caller")
        key = fingerprint(certificate.public_key())
    except (IdentityError, ValueError):
        return "", ""
    try:
        return read_subject(certificate).name, key
    except IdentityError:
        return "", key


def _host(address: str) -> str:
    """The host in a peer address of gRPC such as `ipv4:127.0.0.1:1234`."""
    _family, _, rest = address.partition(":")
    return urllib.parse.unquote(rest).rpartition(":")[0]
