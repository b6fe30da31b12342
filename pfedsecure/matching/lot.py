"""Experts drawn by lot: the baseline that shows what nearness is worth. As little protected as `plain`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.plain import PlainServerMatching
from pfedsecure.wire.v1.payload_pb2 import PlainMatchAnswer


class LotServerMatching:
    """The server's side; sketches are checked as in `plain` but not used. The client's side is that of `plain`."""

    def __init__(self, shape: tuple[int, int], max_norm: float, seed: int) -> None:
        self._plain = PlainServerMatching(shape, max_norm)
        self._seed = seed

    def check_sketch(self, sketch: bytes) -> None:
        self._plain.check_sketch(sketch)

    def index(self, pool: Sequence[PoolEntry]) -> LotMatchIndex:
        return LotMatchIndex(pool, self._seed)


class LotMatchIndex:
    """Draws without replacement; the same seed, round and asker give the same draw."""

    def __init__(self, pool: Sequence[PoolEntry], seed: int) -> None:
        self._pool = sorted(pool, key=lambda entry: entry.owner)
        self._seed = seed

    def answer(self, query: bytes, k: int, asker: str, round_number: int) -> bytes:
        others = [entry for entry in self._pool if entry.owner != asker]
        name_seed = int.from_bytes(hashlib.sha256(asker.encode()).digest()[:8], "big")
        generator = np.random.default_rng([self._seed, round_number, name_seed])
        answer = PlainMatchAnswer()
        for row in generator.permutation(len(others))[:k]:
            answer.candidates.add(expert_id=others[row].expert_id)
        return answer.SerializeToString(deterministic=True)
