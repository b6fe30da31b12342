"""An upload has the server's answer, also where the server refuses it before it was sent to the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio._call import StreamUnaryCall

from pfedsecure.errors import MessageRejected, ServerUnreachable
from pfedsecure.wire.payloads import Payload
from pfedsecure.wire.status import abort
from pfedsecure.wire.upload import ATTEMPTS, upload
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk

from .conftest import call_error

_LOST_ANSWER = "Internal error from Core"
LARGE = Payload(1, bytes(2**22))
AT_ONCE, TIMES = 32, 4
"""Of as many uploads, a fifth lose their answer when nothing is done about it."""


class Refusing(grpc.GenericRpcHandler):
    """Refuses every upload `after` so many chunks, without reading the others; None: after all of them."""

    def __init__(self, after: int | None) -> None:
        self._after = after

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def behaviour(chunks: AsyncIterator[bytes], context: Any) -> bytes:
            number = 0
            async for _ in chunks:
                number += 1
                if number == self._after:
                    break
            await abort(context, MessageRejected("too large"))

        return grpc.stream_unary_rpc_method_handler(behaviour)


@asynccontextmanager
async def refusing(after: int | None = 1) -> AsyncIterator[grpc.aio.StreamUnaryMultiCallable[PayloadChunk, bytes]]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Refusing(after),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel.stream_unary("/test/Upload", request_serializer=PayloadChunk.SerializeToString)
    finally:
        await server.stop(None)


async def test_the_refusal_arrives_however_the_writes_race_with_it() -> None:
    async def answer() -> str | None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(method, LARGE)
        return caught.value.details()

    async with refusing() as method:
        for _ in range(TIMES):
            assert await asyncio.gather(*(answer() for _ in range(AT_ONCE))) == ["too large"] * AT_ONCE


async def test_the_refusal_arrives_also_where_the_end_of_the_upload_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC cancels its call then, of which the one that waits for it must not be the victim."""
    failures, inner = ["execute_batch"] * 3, StreamUnaryCall._done_writing

    async def done_writing(call: StreamUnaryCall[Any, Any]) -> None:
        if failures:
            raise RuntimeError(failures.pop())
        await inner(call)

    monkeypatch.setattr(StreamUnaryCall, "_done_writing", done_writing)
    async with refusing(after=None) as method:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(method, Payload(1, b"content"))
    assert (caught.value.details(), failures) == ("too large", [])


async def test_whoever_gives_an_upload_up_is_obeyed() -> None:
    started = asyncio.Event()

    async def waiting(_chunks: Iterator[PayloadChunk]) -> bytes:
        assert not started.is_set(), "it was tried again"
        started.set()
        return await asyncio.Future()

    task = asyncio.create_task(upload(waiting, Payload(1, b"content")))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("error", [asyncio.CancelledError(), call_error(grpc.StatusCode.INTERNAL, _LOST_ANSWER)])
async def test_an_answer_that_is_lost_again_and_again_is_a_server_that_cannot_be_reached(error: BaseException) -> None:
    made = []

    async def failing(chunks: Iterator[PayloadChunk], *, number: int) -> bytes:
        made.append(b"".join(chunk.data for chunk in chunks))
        raise error

    with pytest.raises(ServerUnreachable, match="the server's answer to an upload was lost 10 times"):
        await upload(partial(failing, number=1), Payload(1, b"content"))
    assert made == [b"content"] * ATTEMPTS


async def test_a_connection_that_is_closed_under_an_upload_cancels_it() -> None:
    errors = [asyncio.CancelledError(), grpc.aio.UsageError("Channel is closed.")]

    async def closed(_chunks: Iterator[PayloadChunk]) -> bytes:
        raise errors.pop(0)

    with pytest.raises(asyncio.CancelledError):
        await upload(closed, Payload(1, b"content"))
    assert not errors


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.INTERNAL, "the server's own"),
        (grpc.StatusCode.UNAVAILABLE, _LOST_ANSWER),
    ],
)
async def test_what_the_server_said_is_not_asked_for_again(code: grpc.StatusCode, details: str) -> None:
    made = []

    async def failing(chunks: Iterator[PayloadChunk], *, number: int) -> bytes:
        made.append(b"".join(chunk.data for chunk in chunks))
        raise call_error(code, details)

    with pytest.raises(grpc.aio.AioRpcError):
        await upload(partial(failing, number=1), Payload(1, b"content"))
    assert made == [b"content"]
