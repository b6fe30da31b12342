"""Nearest experts by sketches that carry noise: the server sees them, and they are differentially private.

Formal guarantee (local: it needs trust in nobody but the client). With a finite epsilon, what a client sends for
matching about the prompt of one round, its sketch and every query together, is one draw of the Gaussian mechanism: for
any two data sets that the client might hold, differing in *everything*, the distributions are (epsilon, delta)-close.
For a sketch is an integer vector of norm at most `RADIUS` whatever it was made of, so that two of them are at most
2 RADIUS apart, and gets noise of `analytic_sigma(epsilon, delta, 2 RADIUS)` a number, drawn by
`pfedsecure.privacy.noise` (which adds less than (1 + e^epsilon) m 2**-160 to delta). It holds against the server, peers
and network alike, whatever they know and do, if the device's random numbers are good. Several rounds compose: each
release is recorded as an event before its noise is drawn, so that a ledger can say what they come to.

The price. Noise that hides everything hides most of what sketches are compared by. A number of a sketch has a standard
deviation of at most clip / sqrt(m); its noise at epsilon 1 has 7.5 clip, at epsilon 8 still 1.2 clip (delta 10**-5).
docs/matching-dp.md has measured what is left. Where the prompt itself came out of DP-SGD, its sketch is a function of
something private already and costs nothing: then epsilon is None here and no noise is added. With epsilon None this
module guarantees nothing by itself; whoever gives it vouches for the prompt.

Once. Who gets m numbers with fresh noise a hundred times has their mean, with a tenth of the noise. So a round's sketch
is noised once, kept on disk before it is sent, and the same bytes are sent whenever they are asked for. A crash
between event and keeping costs a second event for noise that nobody saw: the ledger errs on the side of caution.

Form: a PlainSketch of m float32, all integers of magnitude below 2**24, which float32 holds exactly. One unit is
clip / RADIUS. Rounding is towards zero, so that it makes no sketch longer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate, read_candidates
from pfedsecure.matching.grid_index import GridIndex
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.kept import Kept
from pfedsecure.matching.plain import read_sketch
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.privacy.calibration import analytic_sigma
from pfedsecure.privacy.events import GaussianRelease
from pfedsecure.privacy.noise import MAX_SIGMA, RoundedGaussian
from pfedsecure.secagg.entropy import Entropy
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainSketch

RADIUS = 2**13
"""Largest norm of a sketch without noise, in units of the grid."""
SENSITIVITY = 2 * RADIUS
MAX_NOISE_MULTIPLIER = MAX_SIGMA / SENSITIVITY
"""64: an epsilon below about 0.05. With more noise a sketch says nothing at all."""
SKETCH = "sketch"
"""What sketches are called where they are kept, and in events."""

_LARGEST = 2**24 - 1
_SHRINK = 1 - 2.0**-40
"""So much more than the roundings of float64 that a sketch of norm `clip` stays within the radius."""
_UNLIKELY = 8.0
"""The norm of m normal numbers is over sqrt(m) + 8 with probability below 2**-46."""


class DpClientMatching:
    """The client's side.

    `epsilon` and `delta` of one release; `record` is told of each before its noise is drawn, and raises to forbid it.
    Raises ValueError for an epsilon and delta that make no sense, or take more noise than `MAX_NOISE_MULTIPLIER`.
    """

    def __init__(
        self,
        sketcher: Sketcher,
        epsilon: float | None,
        delta: float,
        kept: Kept,
        record: Callable[[GaussianRelease], None],
        entropy: Entropy = os.urandom,
    ) -> None:
        self._sketcher = sketcher
        self._noise_multiplier = None if epsilon is None else analytic_sigma(epsilon, delta, 1.0)
        if self._noise_multiplier is not None and self._noise_multiplier > MAX_NOISE_MULTIPLIER:
            raise ValueError(
                f"epsilon {epsilon:g} leaves nothing of a sketch; take a larger one, or draw experts by lot"
            )
        self._kept = kept
        self._record = record
        self._entropy = entropy

    def sketch(self, context: NDArray[np.float32], trained_round: int) -> bytes:
        """What is published of `context (n, d)`, trained in round `trained_round` >= 1: always the same for a round.

        Whatever `record` and `kept` raise comes through; then nothing was released.
        """
        if trained_round < 1:
            raise ValueError("only a prompt that was trained has a sketch to release")
        exact = to_grid(self._sketcher.sketch(context), self._sketcher.clip)
        if self._noise_multiplier is None:
            return write_sketch(exact)
        kept = self._kept.find(SKETCH, str(trained_round))
        if kept is not None:
            return kept
        self._record(GaussianRelease(SKETCH, trained_round, self._noise_multiplier))
        released = write_sketch(exact + self._gaussian.sample(len(exact), self._entropy))
        self._kept.keep(SKETCH, str(trained_round), released)
        return released

    def query(self, context: NDArray[np.float32], trained_round: int) -> bytes:
        """What is sent to find the experts nearest to `context (n, d)`: the released sketch of its round.

        With `trained_round` 0 it must be a prompt that the server knows, the start or the global one: it gets no noise.
        """
        if trained_round == 0:
            return write_sketch(to_grid(self._sketcher.sketch(context), self._sketcher.clip))
        return self.sketch(context, trained_round)

    def rank(self, answer: bytes, k: int) -> list[Candidate]:
        """The `k` best experts of an answer, best first; fewer when there are fewer. Raises MessageRejected.

        Distances are those of the sketches that the server compared, with all their noise, in units of the prompt.
        """
        unit = self._sketcher.clip / RADIUS
        return [
            Candidate(found.expert_id, None if found.distance is None else found.distance * unit)
            for found in read_candidates(answer)[:k]
        ]

    @cached_property
    def _gaussian(self) -> RoundedGaussian:
        assert self._noise_multiplier is not None
        return RoundedGaussian(self._noise_multiplier * SENSITIVITY)


class DpServerMatching:
    """The server's side for sketches of `dimension` numbers, with noise up to `noise_multiplier` times the sensitivity.

    It keeps one index, which follows the pool from round to round.
    """

    def __init__(self, dimension: int, noise_multiplier: float = MAX_NOISE_MULTIPLIER) -> None:
        self._read = partial(read_grid_sketch, dimension=dimension, max_norm=largest_norm(dimension, noise_multiplier))
        self._index = GridIndex(dimension, self._read)

    def check_sketch(self, sketch: bytes) -> None:
        self._read(sketch)

    def index(self, pool: Sequence[PoolEntry]) -> GridIndex:
        """The index, changed in place to that of `pool`: one that was given out for an older pool is the same object.

        A query that comes too late is so answered from the newer pool, which whoever asks may see anyway.
        """
        self._index.update(pool)
        return self._index


def largest_norm(dimension: int, noise_multiplier: float) -> float:
    """No honest sketch is longer, but for a probability below 2**-46; in units of the grid."""
    return RADIUS + noise_multiplier * SENSITIVITY * (math.sqrt(dimension) + _UNLIKELY)


def to_grid(sketch: NDArray[np.float64], clip: float) -> NDArray[np.int64]:
    """A sketch `(m,)` of norm up to `clip` as integers of norm up to `RADIUS`; the same on every machine."""
    integers = np.trunc(sketch * (RADIUS * _SHRINK / clip)).astype(np.int64)
    assert int(integers @ integers) <= RADIUS**2  # the sensitivity, and so the guarantee, rests on it
    return integers


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
