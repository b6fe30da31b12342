"""Large payloads as a stream of chunks: a header with size and digest, then the data.

The receiver bounds the size before it keeps anything, and gives out a payload only when it is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from pfedsecure.errors import MessageRejected
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk, PayloadHeader

CHUNK_BYTES = 256 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_MESSAGE_BYTES = 1024 * 1024
"""Limit of a single gRPC message; every unary message and every chunk is smaller."""

OnHeader = Callable[[PayloadHeader], None]
"""Sees a header before any of its data is taken; raises to refuse the payload."""


@dataclass(frozen=True)
class Payload:
    """One whole payload that arrived."""

    round: int
    data: bytes
    expert_id: str = ""
    step: int = 0
    epoch: int = 0


def split(payload: Payload) -> Iterator[PayloadChunk]:
    """The chunks of one payload: its header, then pieces of at most CHUNK_BYTES."""
    yield PayloadChunk(
        header=PayloadHeader(
            round=payload.round,
            size=len(payload.data),
            sha256=hashlib.sha256(payload.data).digest(),
            expert_id=payload.expert_id,
            step=payload.step,
            epoch=payload.epoch,
        )
    )
    for start in range(0, len(payload.data), CHUNK_BYTES):
        yield PayloadChunk(data=payload.data[start : start + CHUNK_BYTES])


async def join(
    chunks: AsyncIterable[PayloadChunk],
    *,
    max_bytes: int = MAX_PAYLOAD_BYTES,
    max_payloads: int = 1,
    on_header: OnHeader | None = None,
) -> AsyncIterator[Payload]:
    """The payloads of a stream of chunks, each given out when it is whole.

    Raises MessageRejected for data without a header, a payload larger than `max_bytes`, more payloads than
    `max_payloads`, an empty chunk of data, more or fewer bytes than announced, or a digest that does not match; and
    what `on_header` raises, before any data is taken.
    """
    header: PayloadHeader | None = None
    data = bytearray()
    count = 0
    async for chunk in chunks:
        part = chunk.WhichOneof("part")
        if part == "header":
            if header is not None:
                raise MessageRejected(f"a payload ended after {len(data)} of {header.size} bytes")
            count += 1
            if count > max_payloads:
                raise MessageRejected(f"more than {max_payloads} payloads in one stream")
            if chunk.header.size > max_bytes:
                raise MessageRejected(f"a payload of {chunk.header.size} bytes is over the limit of {max_bytes}")
            if on_header is not None:
                on_header(chunk.header)
            header = chunk.header
        elif part == "data" and header is not None:
            if not chunk.data:  # such a stream would never end
                raise MessageRejected("a chunk of a payload is empty")
            data += chunk.data
            if len(data) > header.size:
                raise MessageRejected(f"a payload is longer than the {header.size} bytes announced")
        else:
            raise MessageRejected("a stream does not begin with the header of a payload")
        if len(data) == header.size:
            yield _verified(header, bytes(data))
            header, data = None, bytearray()
    if header is not None:
        raise MessageRejected(f"a payload ended after {len(data)} of {header.size} bytes")


async def join_one(
    chunks: AsyncIterable[PayloadChunk], *, max_bytes: int = MAX_PAYLOAD_BYTES, on_header: OnHeader | None = None
) -> Payload:
    """The only payload of a stream. Raises as `join` does, and MessageRejected when there is none."""
    payloads = [payload async for payload in join(chunks, max_bytes=max_bytes, on_header=on_header)]
    if not payloads:
        raise MessageRejected("the stream holds no payload")
    return payloads[0]


def _verified(header: PayloadHeader, data: bytes) -> Payload:
    if hashlib.sha256(data).digest() != header.sha256:
        raise MessageRejected("a payload does not match its digest; it was damaged on the way")
    return Payload(round=header.round, data=data, expert_id=header.expert_id, step=header.step, epoch=header.epoch)
