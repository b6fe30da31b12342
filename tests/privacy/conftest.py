"""Entropy that repeats, for tests of what draws noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest


def _stream(seed: int) -> Callable[[int], bytes]:
    piece = 0

    def read(count: int) -> bytes:
        nonlocal piece
        piece += 1
        return hashlib.shake_256(f"{seed}/{piece}".encode()).digest(count)

    return read


@pytest.fixture(scope="session")
def stream() -> Callable[[int], Callable[[int], bytes]]:
    """`stream(seed)`: the bytes of SHAKE-256, piece after piece."""
    return _stream
