"""Evaluation keys that have the right form and cannot be computed with, written by hand in SEAL's form."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.he.parameters import PRIMES, RING, SPECIAL_PRIME, Layout, context
from pfedsecure.matching.he.seal_objects import _HEADER, _form
from pfedsecure.matching.he.server import HeServerMatching
from pfedsecure.wire.v1.matching_pb2 import EvaluationKeys

LAYOUT = Layout(64)
PRIMES_OF_KEYS = (*PRIMES, SPECIAL_PRIME)
ZERO = np.zeros((2, 3, RING), np.uint64)


def headed(body: bytes) -> bytes:
    _, magic, size, version, minor = _form()
    return _HEADER.pack(magic, size, version, minor, 0, 0, _HEADER.size + len(body)) + body


def key_ciphertext(polynomials: np.ndarray) -> bytes:
    array = headed(struct.pack("<Q", polynomials.size) + polynomials.astype("<u8").tobytes())
    return headed(struct.pack("<4Q?QQQdQ", *context().key_parms_id(), True, 2, RING, 3, 1.0, 1) + array)


def key_switching(vectors: Mapping[int, Sequence[np.ndarray]], length: int) -> bytes:
    parts = [struct.pack("<4Q", *context().key_parms_id()), struct.pack("<Q", length)]
    for index in range(length):
        of_index = vectors.get(index, [])
        parts += [struct.pack("<Q", len(of_index)), *map(key_ciphertext, of_index)]
    return headed(b"".join(parts))


def keys(public: np.ndarray, vector: Sequence[np.ndarray], relinearisation_index: int = 0) -> bytes:
    galois = {(element - 1) // 2: vector for element in LAYOUT.galois_elements}
    return EvaluationKeys(
        epoch=1,
        public_key=key_ciphertext(public),
        relinearisation_keys=key_switching({relinearisation_index: vector}, relinearisation_index + 1),
        galois_keys=key_switching(galois, RING),
    ).SerializeToString()


def uniform(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, prime, (2, RING), dtype=np.uint64) for prime in PRIMES_OF_KEYS], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zeros", "one vector", "relinearisation elsewhere", "zero public key"])
def test_they_are_refused_and_the_server_lives(kind: str) -> None:
    """Taken, they would fail, or crash, the matching of everybody, round after round."""
    honest = [uniform(1), uniform(2)]
    setup = {
        "zeros": keys(ZERO, [ZERO, ZERO]),
        "one vector": keys(uniform(3), [uniform(1)]),
        "relinearisation elsewhere": keys(uniform(3), honest, relinearisation_index=1),
        "zero public key": keys(ZERO, honest),
    }[kind]
    server = HeServerMatching(64)  # real processes: some of these crash what computes with them
    try:
        with pytest.raises(MessageRejected):
            server.install(1, setup)
        assert server._epochs == {}
        server.install(1, keys(uniform(3), honest))  # of the right form, if of no use
    finally:
        server.close()
