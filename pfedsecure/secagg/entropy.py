"""Randomness: everything random comes from one function, in a real round the operating system's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Entropy = Callable[[int], bytes]
"""Returns that many uniformly random bytes, like `os.urandom`. Anything else is for test vectors only."""


def uniform_below(bound: int, count: int, entropy: Entropy) -> NDArray[np.uint64]:
    """`count` independent integers, exactly uniform in [0, bound), for `bound` up to 2**16: by rejection."""
    found = np.zeros(0, np.uint16)
    while len(found) < count:
        drawn = np.frombuffer(entropy(2 * (count - len(found))), "<u2")
        found = np.concatenate([found, drawn[drawn < bound]])
    return found.astype(np.uint64)


def uniform_subset(size: int, of: int, entropy: Entropy) -> NDArray[np.int64]:
    """A uniformly random subset of range(of) with `size` elements, ascending."""
    # Sorting by random 64-bit keys shuffles; two equal keys among a few thousand have probability below 2**-40.
    keys = np.frombuffer(entropy(8 * of), "<u8")
    return np.sort(np.argsort(keys, kind="stable")[:size])
