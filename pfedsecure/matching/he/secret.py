"""The cohort's secret key of encrypted matching, and what is made with it.

Every client derives the same key from the cohort's secret of an epoch; the server has neither.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import tenseal.sealapi as seal
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from pfedsecure.matching.he.parameters import ANSWER_BYTES, PLAIN_MODULUS, RING, Layout, context
from pfedsecure.matching.he.seal_objects import load, plaintext, saved
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.wire.v1.matching_pb2 import EvaluationKeys

_PURPOSE = "matching secret key"


class SecretKey:
    """That of one epoch: a polynomial with uniform coefficients in {-1, 0, 1}."""

    def __init__(self, secrets: CohortSecrets, epoch: int) -> None:
        """Raises IdentityError for an epoch that this client has no secret of."""
        self.epoch = epoch
        self.coefficients = _ternary(secrets.derive(epoch, _PURPOSE))

    @cached_property
    def plaintext(self) -> seal.Plaintext:
        """As SEAL multiplies with it."""
        return plaintext(self.coefficients)

    def evaluation_keys(self, layout: Layout) -> bytes:
        """A serialised EvaluationKeys: what a server computes with. It opens nothing."""
        transformed, key = seal.Plaintext(), seal.SecretKey()
        seal.Evaluator(context()).transform_to_ntt(self.plaintext, context().key_parms_id(), transformed)
        load(key, saved(transformed))  # a secret key is saved as the plaintext that it is
        generator = seal.KeyGenerator(context(), key)
        public, relinearisation, galois = seal.PublicKey(), seal.RelinKeys(), seal.GaloisKeys()
        generator.create_public_key(public)
        generator.create_relin_keys(relinearisation)
        generator.create_galois_keys(list(layout.galois_elements), galois)
        return EvaluationKeys(
            epoch=self.epoch,
            public_key=saved(public),
            relinearisation_keys=saved(relinearisation),
            galois_keys=saved(galois),
        ).SerializeToString()

    def decrypt(self, bodies: NDArray[np.uint64], shared: NDArray[np.uint64], layout: Layout) -> NDArray[np.int64]:
        """The plaintexts modulo t at the lanes of `L` answers: `bodies (L, stride)`, `shared (L, N)`."""
        modulus = 256.0**ANSWER_BYTES
        # Exact in float64, in whatever order: sums of N numbers below 2^40 stay below 2^53.
        phases = bodies.astype(np.float64) + shared.astype(np.float64) @ self._to_lanes(layout)
        rounded = np.rint(np.mod(phases, modulus) * (PLAIN_MODULUS / modulus))
        return rounded.astype(np.int64) % PLAIN_MODULUS

    def _to_lanes(self, layout: Layout) -> NDArray[np.float64]:
        """`(N, stride)`: a polynomial times this gives the coefficients at the lanes of its product with the key."""
        if self._matrix is None or self._matrix.shape[1] != layout.stride:
            # Coefficient j of the product takes s[j - k] from coefficient k, and -s[N + j - k] where j < k.
            twice = np.concatenate([-self.coefficients, self.coefficients]).astype(np.float64)
            lanes, rows = np.arange(layout.stride), np.arange(RING)
            self._matrix = twice[RING + lanes[None, :] - rows[:, None]]
        return self._matrix

    _matrix: NDArray[np.float64] | None = None


def _ternary(key: bytes) -> NDArray[np.int64]:
    """N independent uniform numbers in {-1, 0, 1}, by rejection from the keystream of `key` (32 bytes)."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    found = np.zeros(0, np.uint8)
    while len(found) < RING:
        pairs = np.frombuffer(stream.update(bytes(RING)), np.uint8) & 3
        found = np.concatenate([found, pairs[pairs < 3]])
    return found[:RING].astype(np.int64) - 1
