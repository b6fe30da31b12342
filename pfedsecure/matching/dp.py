"""Nearest experts by sketches that carry noise: the server sees them, and they are differentially private.

Guarantee, against the server, peers and network alike, with a finite epsilon: that of `pfedsecure.matching.release`, of
a round's sketch and every query made with it together.

The price. Noise that hides everything hides most of what sketches are compared by. A number of a sketch has a standard
deviation of at most clip / sqrt(m); its noise at epsilon 1 has 7.5 clip, at epsilon 8 still 1.2 clip (delta 10**-5).
docs/matching.md has measured what is left. Where the prompt itself came out of DP-SGD, its sketch is a function of
something private already and costs nothing: then there is no release here and no noise is added. Without a release this
module guarantees nothing by itself; whoever leaves it out vouches for the prompt.

Form: a PlainSketch of m float32, all integers of magnitude below 2**24, which float32 holds exactly. One unit is
clip / RADIUS.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate, read_candidates
from pfedsecure.matching.grid_index import GridIndex
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.keyless import KeylessClient, KeylessServer
from pfedsecure.matching.plain import FRAMING_BYTES, read_sketch
from pfedsecure.matching.release import LARGEST_RADIUS, MAX_NOISE_MULTIPLIER, Release, largest_norm, to_grid
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainSketch

RADIUS = LARGEST_RADIUS
"""Largest norm of a sketch without noise, in units of the grid."""

_LARGEST = 2**24 - 1


class DpClientMatching(KeylessClient):
    """The client's side. `release` adds the noise; None where the prompt has been made private already."""

    def __init__(self, sketcher: Sketcher, release: Release | None) -> None:
        self._sketcher = sketcher
        self._release = release

    def sketch(self, context: NDArray[np.float32], trained_round: int) -> bytes:
        """A PlainSketch of integers `(m,)`, with the release's noise: drawn once for each `trained_round` and kept, so
        that it cannot be averaged away.
        """
        exact = to_grid(self._sketcher.sketch(context), self._sketcher.clip, RADIUS)
        if self._release is None:
            return write_sketch(exact)
        return write_sketch(self._release.released(exact, RADIUS, trained_round))

    def query(self, context: NDArray[np.float32], trained_round: int, round_number: int) -> bytes:
        """The released sketch of its round; with `trained_round` 0, of a prompt that the server knows, no noise."""
        if trained_round == 0:
            return write_sketch(to_grid(self._sketcher.sketch(context), self._sketcher.clip, RADIUS))
        return self.sketch(context, trained_round)

    def rank(self, answer: bytes, k: int) -> list[Candidate]:
        """Distances are those of the sketches that the server compared, with their noise, in units of the prompt."""
        unit = self._sketcher.clip / RADIUS
        return [
            Candidate(found.expert_id, None if found.distance is None else found.distance * unit)
            for found in read_candidates(answer)[:k]
        ]


class DpServerMatching(KeylessServer):
    """The server's side for sketches of `dimension` numbers, with noise up to `noise_multiplier` times the sensitivity.

    It keeps one index, which follows the pool from round to round.
    """

    def __init__(self, dimension: int, noise_multiplier: float = MAX_NOISE_MULTIPLIER) -> None:
        max_norm = RADIUS * largest_norm(dimension, noise_multiplier)
        self._read = partial(read_grid_sketch, dimension=dimension, max_norm=max_norm)
        self._index = GridIndex(dimension, self._read)
        self.max_sketch_bytes = dimension * np.dtype(np.float32).itemsize + FRAMING_BYTES

    def check_sketch(self, sketch: bytes, epoch: int) -> None:
        """Raise MessageRejected unless it is of `m` integers with a norm that noise of this plan can make; `epoch` does
        not matter.
        """
        self._read(sketch)

    def index(self, pool: Sequence[PoolEntry]) -> GridIndex:
        """The index, changed in place to that of `pool`: one that was given out for an older pool is the same object.

        A query that comes too late is so answered from the newer pool, which whoever asks may see anyway.
        """
        self._index.update(pool)
        return self._index


def write_sketch(integers: NDArray[np.int64]) -> bytes:
    """A PlainSketch of integers `(m,)`."""
    # Cutting off is a function of what is released; with noise it happens once in 2**180 numbers.
    vector = np.clip(integers, -_LARGEST, _LARGEST).astype(np.float32)
    return PlainSketch(vector=to_tensor(vector)).SerializeToString(deterministic=True)


def read_grid_sketch(sketch: bytes, dimension: int, max_norm: float) -> NDArray[np.float32]:
    """The integers, in float32, of a sketch `(dimension,)` of norm up to `max_norm`. Raises MessageRejected."""
    vector = read_sketch(sketch, dimension)
    if not np.array_equal(vector, np.rint(vector)):
        raise MessageRejected("the sketch is not of integers; it was not made by this plan's matching")
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if norm > max_norm or np.abs(vector).max() > _LARGEST:
        raise MessageRejected(f"the sketch has norm {norm:.3g}, over what any noise of this plan makes")
    return vector
