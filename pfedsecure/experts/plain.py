"""Experts in the clear.

Guarantee: none. The server reads every prompt that is lent and can lend out others. It is the baseline.
"""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.experts.claim import Claim
from pfedsecure.wire.tensors import check_norm, from_tensor, to_tensor
from pfedsecure.wire.v1.expert_pb2 import PlainExpert

_FRAMING_BYTES = 64


class PlainExperts:
    """Both sides, for contexts of `shape (n, d)` and Euclidean norm up to `max_norm`."""

    epoch = 0

    def __init__(self, shape: tuple[int, int], max_norm: float) -> None:
        self._shape = shape
        self._max_norm = max_norm
        self.max_bytes = _max_bytes(shape)

    def claim(self, caller: str) -> Claim:
        """An empty claim: without sealed experts there are no pseudonyms that a certificate vouches for."""
        return Claim()

    def pack(self, context: NDArray[np.float32], round_number: int) -> bytes:
        """The context as it is, float32, readable by the server and whoever it is lent to."""
        return write_expert(context)

    def unpack(self, content: bytes, expert_id: str, round_number: int) -> NDArray[np.float32]:
        """The context `(n, d)`. Raises MessageRejected for another shape, numbers that are not finite, or too large a
        norm.
        """
        return read_expert(content, self._shape, self._max_norm, f"expert {expert_id[:8]}")

    def check(self, content: bytes, expert_id: str, round_number: int) -> int:
        """0, the epoch of what is not sealed. Raises MessageRejected as `unpack`."""
        read_expert(content, self._shape, self._max_norm, "the expert")
        return self.epoch


def write_expert(context: NDArray[np.float32]) -> bytes:
    """A serialised PlainExpert of `context (n, d)`."""
    return PlainExpert(context=to_tensor(context)).SerializeToString(deterministic=True)


def read_expert(content: bytes, shape: tuple[int, int], max_norm: float, what: str) -> NDArray[np.float32]:
    """The context in a PlainExpert: of this shape, finite, not over `max_norm`.

    `what` names it in the error. Raises MessageRejected.
    """
    if len(content) > _max_bytes(shape):
        raise MessageRejected(f"{what} has {len(content)} bytes, more than an expert of this plan")
    try:
        message = PlainExpert.FromString(content)
    except DecodeError:
        raise MessageRejected(f"{what} is not a PlainExpert") from None
    context = from_tensor(message.context, shape, what)
    check_norm(context, max_norm, what)
    return context


def _max_bytes(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * np.dtype(np.float32).itemsize + _FRAMING_BYTES
