"""Random numbers that depend on a seed and on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np

from pfedsecure.errors import DataError


def generator(seed: int, purpose: str) -> np.random.Generator:
    """PCG64 seeded by `seed` and `purpose`; generators of different purposes are independent of each other.

    0 is a seed like any other. Raises DataError for a negative seed.
    """
    if seed < 0:
        raise DataError(f"the seed is {seed}; use 0 or a positive number")
    stream = int.from_bytes(hashlib.sha256(purpose.encode()).digest())
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))
