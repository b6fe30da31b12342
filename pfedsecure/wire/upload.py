"""A payload to the server, and the server's answer also when it ends the call before all of the payload was sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import grpc.aio

from pfedsecure.wire.payloads import Payload, split
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk

T = TypeVar("T")

ATTEMPTS = 10
_LOST_ANSWER = "Internal error from Core"


async def upload(call: Callable[[Iterator[PayloadChunk]], Awaitable[T]], payload: Payload) -> T:
    """The reply to `payload` sent through `call`, which may be made several times. Raises AioRpcError.

    A chunk that gRPC writes just as the server's refusal arrives fails, and gRPC then puts that failure in the place of
    the refusal (grpc issue 36066). What the server said is lost, so it is asked again, at once: nothing else goes by
    this status and these words.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return await call(split(payload))
        except grpc.aio.AioRpcError as error:
            if not lost_answer(error):
                raise
    return await call(split(payload))


def lost_answer(error: grpc.aio.AioRpcError) -> bool:
    """Whether gRPC has put its own failure to write in the place of what the server said.

    Nothing else goes by this status and these words.
    """
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == _LOST_ANSWER
