"""Every call as seen from outside of what answers it: for the audit log who was refused, for the metrics the rest.

What TLS itself refuses, such as a certificate of another authority, ends in the handshake: no call, nobody is told.
"""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc

from pfed_server import events
from pfed_server.around import AroundCalls, Call, Passage
from pfedsecure.errors import IdentityError, PfedError
from pfedsecure.pki.certificates import fingerprint, parse_certificate, read_subject
from pfedsecure.wire.peer import ServicerContext
from pfedsecure.wire.status import ERROR_KEY

_CLASSES = {cls.wire_code() for cls in PfedError.__subclasses__()}


class Calls(Protocol):
    """What is counted of calls. `method` is one that the server has, never what a caller made up."""

    def ended(self, method: str, code: str, seconds: float, received: int, sent: int) -> None:
        """A call ended with a gRPC code; bytes of messages both ways."""

    def refused(self, reason: str) -> None:
        """It ended because the caller made a mistake, or may not call. `reason`: the class of the error."""


class CallObserver(AroundCalls):
    """Stands before all other interceptors. Changes nothing of a call."""

    gives_bytes = True

    def __init__(self, tell: events.Listener, calls: Sequence[Calls] = ()) -> None:
        self._tell = tell
        self._calls = calls

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[Passage]:
        traffic, began = _Traffic(call), time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield traffic
        except Exception:
            code = _code(call.context)
            await self._judge(call.method, call.context)
            raise
        except BaseException:  # the caller gave up, or the server is going down
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            seconds = time.monotonic() - began
            for calls in self._calls:
                calls.ended(call.method, code.name, seconds, traffic.received, traffic.sent)

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


class _Traffic(Passage):
    """Bytes of messages of one call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.received = 0
        self.sent = 0

    def into(self, message: bytes) -> bytes:
        self.received += len(message)
        return message

    def out(self, reply: Any) -> bytes:
        data = self._call.encode(reply)
        self.sent += len(data)
        return data


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
