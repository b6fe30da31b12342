"""Masks: keystream added to and subtracted from vectors over a ring of 2**32 or 2**64 elements.

A mask is the AES-256-CTR keystream, counter from zero, of a key that `keys.derive` made for this one purpose, read as
little-endian ring elements: indistinguishable from uniform, and the vectors under it with it, as long as the key is
secret.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from pfedsecure.secagg.transcript import transcript

Ring = NDArray[np.unsignedinteger[Any]]
RingType = np.dtype[np.unsignedinteger[Any]]

_BLOCK_BYTES = 16


class Masks:
    """Keystream for vectors of `length` elements of `dtype`, with the buffers that it needs."""

    def __init__(self, length: int, dtype: RingType) -> None:
        self._zeros = bytes(length * dtype.itemsize)
        self._buffer = bytearray(len(self._zeros) + _BLOCK_BYTES - 1)
        self._view = np.frombuffer(self._buffer, dtype.newbyteorder("<"), count=length)

    def add(self, total: Ring, key: bytes) -> None:
        """Add the mask of `key` to `total` in place, in the ring."""
        np.add(total, self._stream(key), out=total)

    def subtract(self, total: Ring, key: bytes) -> None:
        """Subtract the mask of `key` from `total` in place, in the ring."""
        np.subtract(total, self._stream(key), out=total)

    def _stream(self, key: bytes) -> Ring:
        Cipher(AES(key), CTR(bytes(_BLOCK_BYTES))).encryptor().update_into(self._zeros, self._buffer)
        return self._view


def pair_info(participants_digest: bytes, one: int, other: int) -> bytes:
    """What the mask key of two clients is derived for. `participants_digest` covers cohort, round, plan and model."""
    return transcript("pairwise mask", participants_digest, min(one, other), max(one, other))


def self_info(participants_digest: bytes, client: int) -> bytes:
    """What the key of a client's own mask is derived for."""
    return transcript("self mask", participants_digest, client)
