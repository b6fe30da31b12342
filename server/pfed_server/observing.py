"""Every call as seen from outside of what answers it, for the metrics.

What TLS itself refuses, such as a certificate of another authority, ends in the handshake: no call, nobody is told.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc

from pfed_server.around import AroundCalls, Call, Passage
from pfedsecure.wire.peer import ServicerContext


class Calls(Protocol):
    """What is counted of calls. `method` is one that the server has, never what a caller made up."""

    def ended(self, method: str, code: str, seconds: float, received: int, sent: int) -> None:
        """A call ended with a gRPC code; bytes of messages both ways."""

    def refused(self, reason: str) -> None:
        """It ended because the caller made a mistake, or may not call. `reason`: the class of the error."""


class CallObserver(AroundCalls):
    """Stands before all other interceptors. Changes nothing of a call."""

    gives_bytes = True

    def __init__(self, calls: Sequence[Calls] = ()) -> None:
        self._calls = calls

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[Passage]:
        traffic, began = _Traffic(call), time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield traffic
        except Exception:
            code = _code(call.context)
            raise
        except BaseException:  # the caller gave up, or the server is going down
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            seconds = time.monotonic() - began
            for calls in self._calls:
                calls.ended(call.method, code.name, seconds, traffic.received, traffic.sent)


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
