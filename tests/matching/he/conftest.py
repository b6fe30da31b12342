"""Encrypted matching in one process. `opened` is what somebody with the cohort's key sees of a ciphertext."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal

from pfedsecure.matching.he.evaluation import EvaluationKeys
from pfedsecure.matching.he.parameters import PLAIN_MODULUS, PRIMES, Layout, context
from pfedsecure.matching.he.seal_objects import ciphertext, coefficients, load, saved
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.pki.cohort import CohortSecrets

SECRETS = CohortSecrets.of({1: b"\x01" * 32, 2: b"\x02" * 32})
MODULUS = math.prod(PRIMES)


@cache
def secret(epoch: int = 1) -> SecretKey:
    return SecretKey(SECRETS, epoch)


@cache
def evaluation_keys(dimension: int, epoch: int = 1) -> bytes:
    return secret(epoch).evaluation_keys(Layout(dimension))


class Opened:
    """What a holder of the key reads, by SEAL's own decryption and by the definition of the phase."""

    def __init__(self, key: SecretKey) -> None:
        self._key = key
        transformed, self._secret = seal.Plaintext(), seal.SecretKey()
        seal.Evaluator(context()).transform_to_ntt(key.plaintext, context().key_parms_id(), transformed)
        load(self._secret, saved(transformed))
        self._decryptor = seal.Decryptor(context(), self._secret)

    def plaintext(self, encrypted: seal.Ciphertext) -> np.ndarray:
        """Coefficients `(N,)` modulo t, between -t/2 and t/2."""
        plain = seal.Plaintext()
        self._decryptor.decrypt(encrypted, plain)
        found = np.zeros(8192, np.int64)
        found[: plain.coeff_count()] = [plain.data(row) for row in range(plain.coeff_count())]
        return np.where(found > PLAIN_MODULUS // 2, found - PLAIN_MODULUS, found)

    def phase(self, encrypted: seal.Ciphertext) -> list[int]:
        """c + a s modulo q, between -q/2 and q/2, of a ciphertext under both primes."""
        product, again = seal.Ciphertext(), np.stack([self._polynomial(encrypted, 1)] * 2)
        seal.Evaluator(context()).multiply_plain(ciphertext(again), self._key.plaintext, product)
        masked, body = self._polynomial(product, 0), self._polynomial(encrypted, 0)
        first, second = PRIMES
        inverse = pow(first, -1, second)
        phases = []
        for low, high in ((body + masked) % np.array(PRIMES, np.uint64)[:, None]).T.tolist():
            value = low + first * ((high - low) * inverse % second)
            phases.append(value - MODULUS if value > MODULUS // 2 else value)
        return phases

    def noise_budget(self, encrypted: seal.Ciphertext) -> int:
        """Bits between the noise and where decryption would fail."""
        return int(self._decryptor.invariant_noise_budget(encrypted))

    @staticmethod
    def _polynomial(encrypted: seal.Ciphertext, number: int) -> np.ndarray:
        return np.stack([coefficients(encrypted, number, prime) for prime in range(len(PRIMES))])


@pytest.fixture(scope="session")
def opened() -> Opened:
    return Opened(secret())


@pytest.fixture(scope="session")
def key() -> SecretKey:
    return secret()


@pytest.fixture(scope="session")
def secrets() -> CohortSecrets:
    return SECRETS


@pytest.fixture(scope="session")
def keys_of() -> Callable[..., bytes]:
    """`keys_of(dimension, epoch=1)`, serialised."""
    return evaluation_keys


@pytest.fixture(scope="session")
def loaded() -> Callable[[int], EvaluationKeys]:
    return cache(lambda dimension: EvaluationKeys(evaluation_keys(dimension), Layout(dimension)))


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(max_workers=1) as one:
        yield one


@pytest.fixture(scope="session")
def numbers_of() -> Callable[..., np.ndarray]:
    """`numbers_of(seed, m, norm)`: integers `(m,)` of about that norm, not above it."""

    def make(seed: int, dimension: int, norm: float = 4000) -> np.ndarray:
        vector = np.random.default_rng(seed).normal(size=dimension)
        return np.trunc(vector * (norm / np.linalg.norm(vector))).astype(np.int64)

    return make


@pytest.fixture(scope="session")
def new_kept() -> type[Any]:
    class Kept:
        """In memory."""

        def __init__(self) -> None:
            self.contents: dict[str, tuple[str, bytes]] = {}

        def find(self, what: str, key: str) -> bytes | None:
            known, content = self.contents.get(what, ("", b""))
            return content if known == key else None

        def keep(self, what: str, key: str, content: bytes) -> None:
            self.contents[what] = key, content

    return Kept
