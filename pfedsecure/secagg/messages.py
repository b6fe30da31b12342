"""Reading messages from anybody: bounded, of exactly the lengths that the round prescribes, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected

M = TypeVar("M", bound=Message)

Members = NDArray[np.bool_]
"""A set of clients: for each of the roster, whether it belongs."""


def parse(kind: type[M], data: bytes, limit: int, what: str) -> M:
    """The message in `data`, of at most `limit` bytes; `what` names it in the error. Raises MessageRejected."""
    if len(data) > limit:
        raise MessageRejected(f"{what} has {len(data)} bytes, at most {limit} are allowed")
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise MessageRejected(f"{what} cannot be decoded") from None
    return message


def serialised(message: Message) -> bytes:
    """The bytes of a message: the same each time, so that they can be signed and sent again."""
    return message.SerializeToString(deterministic=True)


def require_bytes(data: bytes, expected: int, what: str) -> bytes:
    """`data` if it has `expected` bytes. Raises MessageRejected."""
    if len(data) != expected:
        raise MessageRejected(f"{what} has {len(data)} bytes, expected {expected}")
    return data


def records(data: bytes, size: int, count: int, what: str) -> list[bytes]:
    """`count` records of `size` bytes. Raises MessageRejected for any other length of `data`."""
    require_bytes(data, size * count, what)
    return [data[start : start + size] for start in range(0, len(data), size)]


def ascending(indices: Sequence[int], clients: int, what: str) -> NDArray[np.int64]:
    """`indices` if they are distinct clients of the roster in ascending order. Raises MessageRejected."""
    array = np.array(indices, np.int64)
    if (np.diff(array) <= 0).any() or (array >= clients).any():
        raise MessageRejected(f"{what} are not distinct clients of the roster in ascending order")
    return array


def members(indices: Iterable[int], clients: int) -> Members:
    """The set of these clients."""
    chosen = np.zeros(clients, np.bool_)
    chosen[list(indices)] = True
    return chosen


def to_bitmap(chosen: Members) -> bytes:
    """One bit for each client of the roster, the first in the lowest bit of the first byte; `from_bitmap` reads it."""
    return np.packbits(chosen, bitorder="little").tobytes()


def from_bitmap(data: bytes, clients: int, what: str) -> Members:
    """The set in a bitmap. Raises MessageRejected unless it has the one right length and no bit beyond the roster."""
    require_bytes(data, -(-clients // 8), what)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[clients:].any():
        raise MessageRejected(f"{what} names clients beyond the roster")
    return bits[:clients].astype(np.bool_)
