"""The numbers of an answer on the wire: 40 bits each, little-endian."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pfedsecure.matching.he.parameters import ANSWER_BYTES


def packed(numbers: NDArray[np.uint64]) -> bytes:
    """Numbers below 2^40."""
    return np.ascontiguousarray(numbers, "<u8").view(np.uint8).reshape(-1, 8)[:, :ANSWER_BYTES].tobytes()


def unpacked(content: bytes) -> NDArray[np.uint64]:
    """What `packed` made."""
    wide = np.zeros((len(content) // ANSWER_BYTES, 8), np.uint8)
    wide[:, :ANSWER_BYTES] = np.frombuffer(content, np.uint8).reshape(-1, ANSWER_BYTES)
    return wide.view("<u8")[:, 0].astype(np.uint64)
