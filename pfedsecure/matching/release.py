"""Sketches on an integer grid, with the noise of the Gaussian mechanism: drawn once for each trained round.

Formal guarantee (local: it needs trust in nobody but the client). With a finite epsilon, what a client gives out of the
sketch of one round is one draw of the Gaussian mechanism: for any two data sets that the client might hold, differing
in *everything*, the distributions are (epsilon, delta)-close. For a sketch is an integer vector of norm at most
`radius` whatever it was made of, so that two of them are at most 2 radius apart, and gets noise of
`analytic_sigma(epsilon, delta, 2 radius)` a number, drawn by `pfedsecure.privacy.noise` (which adds less than
(1 + e^epsilon) m 2**-160 to delta). It holds whatever others know and do, if the device's random numbers are good.
Several rounds compose: each release is recorded as an event before its noise is drawn, so that a ledger can say what
they come to.

Once. Who gets m numbers with fresh noise a hundred times has their mean, with a tenth of the noise. So a round's sketch
is noised once, kept on disk before it is given out, and the same numbers are given out whenever they are asked for. A
crash between event and keeping costs a second event for noise that nobody saw: the ledger errs on the side of caution.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pfedsecure.matching.kept import Kept
from pfedsecure.privacy.calibration import analytic_sigma
from pfedsecure.privacy.events import GaussianRelease
from pfedsecure.privacy.noise import MAX_SIGMA, RoundedGaussian
from pfedsecure.secagg.entropy import Entropy

SKETCH = "released sketch"
"""What sketches are called where they are kept, and in events."""

LARGEST_RADIUS = 2**13
MAX_NOISE_MULTIPLIER = MAX_SIGMA / (2 * LARGEST_RADIUS)
"""64: an epsilon below about 0.05. With more noise a sketch says nothing at all."""

_SHRINK = 1 - 2.0**-40
"""So much more than the roundings of float64 that a sketch of norm `clip` stays within the radius."""
_UNLIKELY = 8.0
"""The norm of m normal numbers is over sqrt(m) + 8 with probability below 2**-46."""

Record = Callable[[GaussianRelease], None]


class Release:
    """Gives out sketches. `record` is told of each release before its noise is drawn, and raises to forbid it.

    Raises ValueError for an epsilon and delta that make no sense, or take more noise than `MAX_NOISE_MULTIPLIER`.
    """

    def __init__(self, epsilon: float, delta: float, kept: Kept, record: Record, entropy: Entropy = os.urandom) -> None:
        self.noise_multiplier = noise_multiplier(epsilon, delta)
        self._kept = kept
        self._record = record
        self._entropy = entropy

    def released(self, exact: NDArray[np.int64], radius: int, trained_round: int) -> NDArray[np.int64]:
        """Integers `(m,)` of norm up to `radius` with their noise; the same ever after for a trained round.

        Whatever `record` and `kept` raise comes through; then nothing was released.
        """
        if trained_round < 1:
            raise ValueError("only a prompt that was trained has a sketch to release")
        assert int(exact @ exact) <= radius**2  # the sensitivity, and so the guarantee, rests on it
        key = f"{trained_round} {radius} {len(exact)}"
        kept = self._kept.find(SKETCH, key)
        if kept is not None:
            return np.frombuffer(kept, "<i8").astype(np.int64)
        self._record(GaussianRelease(SKETCH, trained_round, self.noise_multiplier))
        noise = RoundedGaussian(self.noise_multiplier * 2 * radius).sample(len(exact), self._entropy)
        released = exact + noise
        self._kept.keep(SKETCH, key, released.astype("<i8").tobytes())
        return released


def noise_multiplier(epsilon: float, delta: float) -> float:
    """Standard deviation of the noise over the sensitivity. Raises ValueError as `Release` does."""
    multiplier = analytic_sigma(epsilon, delta, 1.0)
    if multiplier > MAX_NOISE_MULTIPLIER:
        raise ValueError(f"epsilon {epsilon:g} leaves nothing of a sketch; take a larger one, or draw experts by lot")
    return multiplier


def to_grid(sketch: NDArray[np.float64], clip: float, radius: int) -> NDArray[np.int64]:
    """A sketch `(m,)` of norm up to `clip` as integers of norm up to `radius`; the same on every machine.

    Rounded towards zero, which makes no sketch longer.
    """
    return np.trunc(sketch * (radius * _SHRINK / clip)).astype(np.int64)


def largest_norm(dimension: int, noise_multiplier: float) -> float:
    """No honest sketch with its noise is longer, but for a probability below 2**-46; in units of the radius."""
    return 1 + 2 * noise_multiplier * (math.sqrt(dimension) + _UNLIKELY)
