"""Poisson samples, as the accountant takes them to be: every example by itself, from the operating system's generator.

Formal guarantee. `poisson_sample(n, q)` holds each of n examples with the same probability, at most q and less than
2**-64 below it, independently of all others, provided that the bytes of `entropy` are uniform. Nobody who does not see
the sample learns which examples were in it: without that, sampling amplifies nothing.

Batches of a fixed size, or a shuffled data set cut into batches, are not this, and the accountant's figures do not hold
for them.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from pfedsecure.secagg.entropy import Entropy


def poisson_sample(size: int, sample_rate: float, entropy: Entropy = os.urandom) -> NDArray[np.int64]:
    """The indices, ascending, of a sample of range(`size`); it may well be empty. Raises ValueError for a bad rate."""
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"a sample rate of {sample_rate!r} makes no sense")
    if sample_rate == 1:
        return np.arange(size)
    words = np.frombuffer(entropy(8 * size), "<u8")
    return np.flatnonzero(words < np.uint64(int(sample_rate * 2**64)))  # the product is exact: a power of two
