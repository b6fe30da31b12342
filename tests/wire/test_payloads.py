"""Payloads in chunks: they arrive whole and in order, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected
from pfedsecure.wire.payloads import CHUNK_BYTES, MAX_MESSAGE_BYTES, Payload, join, join_one, split
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk, PayloadHeader

payloads = st.builds(Payload, st.integers(0, 2**64 - 1), st.binary(max_size=100), st.text(max_size=10))


async def stream(chunks: Iterable[PayloadChunk]) -> AsyncIterator[PayloadChunk]:
    for chunk in chunks:
        yield chunk


def received(chunks: Iterable[PayloadChunk], *, max_bytes: int = 10**9, max_payloads: int = 1) -> list[Payload]:
    async def collect() -> list[Payload]:
        joined = join(stream(chunks), max_bytes=max_bytes, max_payloads=max_payloads)
        return [payload async for payload in joined]

    return asyncio.run(collect())


def header(data: bytes, **changes: object) -> PayloadChunk:
    chunk = next(split(Payload(1, data)))
    chunk.header.MergeFrom(PayloadHeader(**changes))
    return chunk


def piece(data: bytes) -> PayloadChunk:
    return PayloadChunk(data=data)


@pytest.mark.slow
@given(st.lists(payloads, max_size=4))
def test_what_is_split_is_joined_again(sent: Sequence[Payload]) -> None:
    chunks = [chunk for payload in sent for chunk in split(payload)]
    assert received(chunks, max_payloads=4) == list(sent)


@given(st.binary(max_size=60), st.data())
def test_any_division_of_the_data_will_do(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=5)))
    bounds = [0, *cuts, len(data)]
    pieces = [piece(data[start:end]) for start, end in pairwise(bounds) if end > start]
    assert received([header(data), *pieces]) == [Payload(1, data)]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_chunks_are_bounded_and_none_is_empty(size: int) -> None:
    first, *rest = split(Payload(1, bytes(size)))
    assert first.header.size == size
    assert [len(chunk.data) for chunk in rest] == [CHUNK_BYTES] * (size // CHUNK_BYTES) + [size % CHUNK_BYTES] * bool(
        size % CHUNK_BYTES
    )
    assert all(chunk.ByteSize() < MAX_MESSAGE_BYTES for chunk in (first, *rest))
    assert received([first, *rest]) == [Payload(1, bytes(size))]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([piece(b"ab")], "does not begin with the header"),
        ([PayloadChunk()], "does not begin with the header"),
        ([header(b"ab"), PayloadChunk()], "does not begin with the header"),
        ([header(b"ab")], "ended after 0 of 2 bytes"),
        ([header(b"ab"), piece(b"a")], "ended after 1 of 2 bytes"),
        ([header(b"ab"), piece(b"a"), header(b"c")], "ended after 1 of 2 bytes"),
        ([header(b"ab"), piece(b"a"), piece(b""), piece(b"b")], "a chunk of a payload is empty"),
        ([header(b"ab"), piece(b"abc")], "longer than the 2 bytes announced"),
        ([header(b"ab"), piece(b"ab"), piece(b"c")], "does not begin with the header"),
        ([header(b"ab"), piece(b"ba")], "does not match its digest"),
        ([header(b"ab", sha256=b"short"), piece(b"ab")], "does not match its digest"),
        ([header(b"", sha256=b"short")], "does not match its digest"),
        ([header(b"x" * 101)], "a payload of 101 bytes is over the limit of 100"),
        ([*split(Payload(1, b"a")), *split(Payload(1, b"b")), *split(Payload(1, b"c"))], "more than 2 payloads"),
    ],
)
def test_a_stream_that_is_not_of_whole_payloads_is_refused(chunks: list[PayloadChunk], message: str) -> None:
    with pytest.raises(MessageRejected, match=message):
        received(chunks, max_bytes=100, max_payloads=2)


def test_a_payload_too_large_is_refused_before_any_of_it_is_read() -> None:
    read = []

    async def endless() -> AsyncIterator[PayloadChunk]:
        yield header(b"", size=2**62)
        while True:
            read.append(1)
            yield piece(b"x" * 1000)

    with pytest.raises(MessageRejected, match="over the limit"):
        asyncio.run(join_one(endless(), max_bytes=1000))
    assert read == []


def test_a_header_that_is_refused_is_all_that_is_read() -> None:
    sent = split(Payload(7, b"data", "id"))

    def refuse(seen: PayloadHeader) -> None:
        raise MessageRejected(f"no round {seen.round} here")

    with pytest.raises(MessageRejected, match="no round 7 here"):
        asyncio.run(join_one(stream(sent), on_header=refuse))
    assert next(sent) == piece(b"data"), "the data was not asked for"


def test_exactly_one_payload() -> None:
    assert asyncio.run(join_one(stream(split(Payload(7, b"data", "id"))))) == Payload(7, b"data", "id")
    with pytest.raises(MessageRejected, match="holds no payload"):
        asyncio.run(join_one(stream([])))
    with pytest.raises(MessageRejected, match="more than 1 payloads"):
        asyncio.run(join_one(stream([*split(Payload(1, b"a"))] * 2)))
