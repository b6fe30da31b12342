"""A payload to the server, and the server's answer also when it ends the call before all of the payload was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import grpc.aio

from pfedsecure.errors import ServerUnreachable
from pfedsecure.wire.payloads import Payload, split
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk

T = TypeVar("T")

ATTEMPTS = 10
_LOST_ANSWER = "Internal error from Core"


async def upload(call: Callable[[Iterator[PayloadChunk]], Awaitable[T]], payload: Payload) -> T:
    """The reply to `payload` sent through `call`, which may be made several times. Raises AioRpcError, and
    ServerUnreachable where nothing of what the server says arrives.

    What gRPC writes just as the server's refusal arrives fails, and the refusal is lost with it (`lost_answer`), so the
    server is asked again, at once.
    """
    lost: grpc.aio.AioRpcError | asyncio.CancelledError | None = None
    for _ in range(ATTEMPTS):
        try:
            return await call(split(payload))
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            if not lost_answer(error):
                raise
            lost = error
        except grpc.aio.UsageError:
            if lost is None:
                raise
            raise lost from None  # the connection was closed, which cancels its calls
    raise ServerUnreachable(f"the server's answer to an upload was lost {ATTEMPTS} times")


def lost_answer(error: grpc.aio.AioRpcError | asyncio.CancelledError) -> bool:
    """Whether an upload of this task ended with `error` because gRPC lost what the server said (its issue 36066).

    A chunk that cannot be written: gRPC puts that failure in the place of the answer; nothing else goes by this status
    and these words. The end of the upload that cannot be written: gRPC cancels the call, which nobody asked for.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == _LOST_ANSWER
