"""What is done to every call: the caller is identified, messages are decoded and errors told, whatever the method.

gRPC's own way with a message that cannot be decoded is a traceback here and an unknown error there; to us it is a
client's mistake like any other.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from pfed_server.admission import ArrivalLimits
from pfed_server.around import AroundCalls, Call, Passage
from pfed_server.faults import STORAGE_FAULTS
from pfed_server.refusals import Refusals
from pfed_server.service import Identify
from pfedsecure.errors import MessageRejected, PfedError, ServerUnreachable
from pfedsecure.wire.status import abort, abort_code, end

_logger = logging.getLogger(__name__)


class CallInterceptor(AroundCalls):
    """Lets in only callers that `identify` knows, in any role, decodes messages and reports what methods raise.

    No service, health included, answers anybody else, whether or not it asks for its caller itself.
    """

    takes_bytes = True

    def __init__(
        self, identify: Identify, refusals: Refusals | None = None, limits: ArrivalLimits | None = None
    ) -> None:
        """`limits`: of calls that are identified at all; None where callers have no certificates to count by."""
        self._identify = identify
        self._refusals = refusals or Refusals()
        self._limits = limits

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[Passage]:
        async with self._reported(call):
            with self._identified(call):
                yield _Decoding(call)

    def _identified(self, call: Call) -> AbstractContextManager[None]:
        if self._limits is not None:
            return self._limits.identified(call.context, self._identify)
        self._identify(call.context)
        return nullcontext()

    @asynccontextmanager
    async def _reported(self, call: Call) -> AsyncIterator[None]:
        """Turn what is raised inside into a gRPC status: a caller's mistake in words, anything else without details.

        A fault of the storage may pass: clients are told to try again.
        """
        method, context = call.method, call.context
        try:
            yield
        except PfedError as error:
            if abort_code(error) is not grpc.StatusCode.INTERNAL:
                if not isinstance(error, ServerUnreachable):  # that one is the server's own fault
                    await self._refusals.note(call, error)  # first: what comes after the answer may come too late
                await abort(context, error)
            await _abort_internal(call)
        except STORAGE_FAULTS:
            _logger.exception("%s failed for now", method)
            await abort(context, ServerUnreachable("the server cannot use its storage at the moment; its log says why"))
        except NotImplementedError:  # a method that its service has only on paper, such as List of gRPC's health
            await end(context, grpc.StatusCode.UNIMPLEMENTED)
        except Exception:
            await _abort_internal(call)


class _Decoding(Passage):
    """A message that cannot be decoded is a mistake of the caller."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def into(self, message: bytes) -> Any:
        try:
            return self._call.decode(message)
        except DecodeError:
            raise MessageRejected(f"a message of {self._call.method} cannot be decoded") from None


async def _abort_internal(call: Call) -> None:
    _logger.exception("%s failed", call.method)
    await end(call.context, grpc.StatusCode.INTERNAL)
