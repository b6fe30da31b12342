"""Exact nearest experts in the clear: the sketch is the flattened prompt itself, distances are Euclidean.

Guarantee: none. The server reads every sketch. It is the baseline that protected matching is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate, read_candidates, write_candidates
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.keyless import KeylessClient, KeylessIndex, KeylessServer
from pfedsecure.wire.tensors import check_norm, from_tensor, to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainSketch

FRAMING_BYTES = 64
"""More than the shape and the tags of a sketch take on the wire."""


class PlainClientMatching(KeylessClient):
    """The client's side for contexts of `shape (n, d)`."""

    def sketch(self, context: NDArray[np.float32], trained_round: int) -> bytes:
        """The flattened context `(n * d,)` in the clear: the server reads it."""
        return PlainSketch(vector=to_tensor(context.reshape(-1))).SerializeToString(deterministic=True)

    def query(self, context: NDArray[np.float32], trained_round: int, round_number: int) -> bytes:
        """The same as the sketch."""
        return self.sketch(context, trained_round)

    def rank(self, answer: bytes, k: int) -> list[Candidate]:
        """The first `k` of the server's, with Euclidean distances as the server says. Raises MessageRejected."""
        return read_candidates(answer)[:k]


class PlainServerMatching(KeylessServer):
    """The server's side for sketches of `n * d` numbers and Euclidean norm up to `max_norm`."""

    def __init__(self, shape: tuple[int, int], max_norm: float) -> None:
        self._size = shape[0] * shape[1]
        self._max_norm = max_norm
        self.max_sketch_bytes = self._size * np.dtype(np.float32).itemsize + FRAMING_BYTES

    def check_sketch(self, sketch: bytes, epoch: int) -> None:
        """Raise MessageRejected unless it has `n * d` finite numbers of a norm within the plan's."""
        check_norm(read_sketch(sketch, self._size), self._max_norm, "the sketch")

    def index(self, pool: Sequence[PoolEntry]) -> PlainMatchIndex:
        """An exact index of the pool."""
        return PlainMatchIndex(pool, self._size)


class PlainMatchIndex(KeylessIndex):
    """FAISS index, exact in L2, over the pool of one round."""

    def __init__(self, pool: Sequence[PoolEntry], size: int) -> None:
        # Sorted by name, so that equal distances are resolved the same way in every run.
        self._pool = sorted(pool, key=lambda entry: entry.owner)
        self._size = size
        self._index = faiss.IndexFlatL2(size)
        if self._pool:
            self._index.add(np.stack([read_sketch(entry.sketch, size) for entry in self._pool]))

    def answer(self, query: bytes, k: int, asker: str, round_number: int) -> bytes:
        """The `k` nearest others with Euclidean distances, ties by the owner's name. Raises MessageRejected."""
        vector = read_sketch(query, self._size)
        if not self._pool or not k:
            return write_candidates([])
        # One more than asked for: the asker's own expert may be among the nearest.
        squared, rows = self._index.search(vector[None], min(k + 1, len(self._pool)))
        others = [
            Candidate(self._pool[row].expert_id, max(float(distance), 0.0) ** 0.5)
            for distance, row in zip(squared[0], rows[0], strict=True)
            # FAISS fills up with row -1 where distances are not finite numbers.
            if row >= 0 and self._pool[row].owner != asker
        ]
        return write_candidates(others[:k])


def read_sketch(sketch: bytes, size: int) -> NDArray[np.float32]:
    """The vector of a PlainSketch with exactly `size` numbers. Raises MessageRejected."""
    try:
        message = PlainSketch.FromString(sketch)
    except DecodeError:
        raise MessageRejected("the sketch is not a PlainSketch") from None
    return from_tensor(message.vector, (size,), "the sketch")
