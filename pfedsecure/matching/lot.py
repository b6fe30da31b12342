"""Experts drawn by lot: nothing is published to be matched on, and the baseline that shows what nearness is worth.

Guarantee: the server learns nothing about any prompt, neither from sketches nor from queries, which are empty. It
knows who borrows whose expert, because it draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate, read_candidates, write_candidates
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.keyless import KeylessClient, KeylessIndex, KeylessServer


class LotClientMatching(KeylessClient):
    """The client's side."""

    def sketch(self, context: NDArray[np.float32], trained_round: int) -> bytes:
        """Empty: nothing of the prompt is published."""
        return b""

    def query(self, context: NDArray[np.float32], trained_round: int, round_number: int) -> bytes:
        """Empty: nothing of the prompt is sent."""
        return b""

    def rank(self, answer: bytes, k: int) -> list[Candidate]:
        """The first `k` that the server drew, without distances. Raises MessageRejected."""
        return read_candidates(answer)[:k]


class LotServerMatching(KeylessServer):
    """The server's side."""

    max_sketch_bytes = 0

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check_sketch(self, sketch: bytes, epoch: int) -> None:
        """Raise MessageRejected for a sketch that is not empty."""
        _require_empty(sketch, "sketch")

    def index(self, pool: Sequence[PoolEntry]) -> LotMatchIndex:
        """The pool to draw from."""
        return LotMatchIndex(pool, self._seed)


class LotMatchIndex(KeylessIndex):
    """Draws without replacement; the same seed, round and asker give the same draw."""

    def __init__(self, pool: Sequence[PoolEntry], seed: int) -> None:
        self._pool = sorted(pool, key=lambda entry: entry.owner)
        self._seed = seed

    def answer(self, query: bytes, k: int, asker: str, round_number: int) -> bytes:
        """`k` others, drawn by plan seed, round and the asker's name. Raises MessageRejected for a query that is not
        empty.
        """
        _require_empty(query, "query")
        others = [entry for entry in self._pool if entry.owner != asker]
        name_seed = int.from_bytes(hashlib.sha256(asker.encode()).digest()[:8], "big")
        generator = np.random.default_rng([self._seed, round_number, name_seed])
        drawn = generator.permutation(len(others))[:k]
        return write_candidates(Candidate(others[row].expert_id, None) for row in drawn)


def _require_empty(content: bytes, what: str) -> None:
    if content:
        raise MessageRejected(f"a {what} has come although experts are drawn by lot; use the plan of this server")
