"""Weighted averaging in the clear.

Guarantee: none. The server reads every client's prompt and its number of training images. It is the baseline, and what
the protected ways of aggregating are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pfedsecure.aggregation.interface import Aggregate
from pfedsecure.errors import MessageRejected
from pfedsecure.wire.tensors import check_norm, from_tensor, to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainContribution

MAX_WEIGHT = 2**32 - 1


class PlainAggregation:
    """Both sides of plain averaging, for contexts of `shape (n, d)` and Euclidean norm up to `max_norm`."""

    def __init__(self, shape: tuple[int, int], max_norm: float) -> None:
        self._shape = shape
        self._max_norm = max_norm

    def contribution(self, context: NDArray[np.float32], weight: int) -> bytes:
        weighted = (context.astype(np.float64) * weight).astype(np.float32)
        return PlainContribution(weighted_context=to_tensor(weighted), weight=weight).SerializeToString(
            deterministic=True
        )

    def check(self, contribution: bytes) -> None:
        weighted, weight = self._read(contribution)
        check_norm(weighted / np.float32(weight), self._max_norm, "the update")

    def combine(self, contributions: Mapping[str, bytes]) -> Aggregate:
        total = np.zeros(self._shape, dtype=np.float64)
        total_weight = 0
        # Floating-point sums depend on the order of their terms: the order is that of the names.
        for name in sorted(contributions):
            weighted, weight = self._read(contributions[name])
            total += weighted
            total_weight += weight
        return Aggregate(context=(total / total_weight).astype(np.float32), total_weight=total_weight)

    def _read(self, contribution: bytes) -> tuple[NDArray[np.float32], int]:
        try:
            message = PlainContribution.FromString(contribution)
        except DecodeError:
            raise MessageRejected("the update is not a PlainContribution") from None
        if not 1 <= message.weight <= MAX_WEIGHT:
            raise MessageRejected(f"the update's weight {message.weight} is not in 1..{MAX_WEIGHT}")
        return from_tensor(message.weighted_context, self._shape, "the update"), message.weight
