"""Sketches as ciphertexts: quantised, encrypted under the cohort's key, packed for the wire.

A ciphertext is (c, a) with `a` uniform modulo q and c = -(a s + e) + round(q m / t), where e has a centred binomial
distribution of standard deviation 3.24, as in SEAL. `a` is stretched from a seed, which halves what travels.
"""

from __future__ import annotations

import math
import os

import numpy as np
import tenseal.sealapi as seal
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.he.parameters import LARGEST, PLAIN_MODULUS, PRIMES, RING, Layout, context
from pfedsecure.matching.he.seal_objects import ciphertext, coefficients
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.wire.v1.matching_pb2 import EncryptedSketch

SEED_BYTES = 32
BODY_BYTES = len(PRIMES) * RING * 60 // 8
_BINOMIAL_BITS = 21
_MODULUS = math.prod(PRIMES)


def quantised(vector: NDArray[np.float64], clip: float) -> NDArray[np.int64]:
    """Whole numbers `(m,)` of Euclidean norm up to R for a sketch of norm up to `clip`; the same on every machine."""
    # Rounding moves each number by at most a half, the norm by sqrt(m) / 2.
    scale = (LARGEST - math.ceil(math.sqrt(len(vector)) / 2)) / clip
    return np.rint(vector * scale).astype(np.int64)


def shortened(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """`numbers (m,)`, or the longest of norm up to R in their direction: what noise makes once in 2**46 times."""
    norm = math.sqrt(float(numbers.astype(np.float64) @ numbers))
    return numbers if norm <= LARGEST else np.trunc(numbers * ((LARGEST - 1) / norm)).astype(np.int64)


def sketch_polynomial(numbers: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """The plaintext `(N,)` of an upload: the sketch `(m,)` and its squared norm."""
    polynomial = np.zeros(RING, np.int64)
    polynomial[: len(numbers) * layout.stride : layout.stride] = numbers
    polynomial[layout.norm_exponent] = int(numbers @ numbers)
    return polynomial


def query_polynomial(numbers: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """The plaintext `(N,)` of a query: -2 q(x^-stride)."""
    polynomial = np.zeros(RING, np.int64)
    polynomial[0] = -2 * numbers[0]
    exponents = RING - layout.stride * np.arange(1, len(numbers))
    polynomial[exponents] = 2 * numbers[1:]  # x^-k is -x^(N - k)
    return polynomial


def encrypt(polynomial: NDArray[np.int64], key: SecretKey) -> bytes:
    """A serialised EncryptedSketch of coefficients `(N,)` between -t/2 and t/2; new randomness each time."""
    seed = os.urandom(SEED_BYTES)
    uniform = stretch(seed)
    product = seal.Ciphertext()
    seal.Evaluator(context()).multiply_plain(ciphertext(np.stack([uniform, uniform])), key.plaintext, product)
    noise = _binomial_noise()
    scaled = _scaled(polynomial)
    body = np.empty((len(PRIMES), RING), np.uint64)
    for row, prime in enumerate(PRIMES):
        masked = coefficients(product, 0, row).astype(np.int64)
        body[row] = np.mod(scaled[row] - masked - noise, prime).astype(np.uint64)
    return EncryptedSketch(epoch=key.epoch, seed=seed, body=_packed(body)).SerializeToString(deterministic=True)


def read_encrypted(content: bytes, what: str) -> tuple[int, NDArray[np.uint64]]:
    """Epoch, and coefficients `(2, primes, N)`, of an EncryptedSketch; `what` names it. Raises MessageRejected."""
    try:
        message = EncryptedSketch.FromString(content)
    except DecodeError:
        raise MessageRejected(f"{what} is not an EncryptedSketch") from None
    if len(message.seed) != SEED_BYTES or len(message.body) != BODY_BYTES or message.epoch < 1:
        raise MessageRejected(
            f"{what} is not of the form of this version's parameters; use the same version everywhere"
        )
    body = _unpacked(message.body)
    if (body >= np.array(PRIMES, np.uint64)[:, None]).any():
        raise MessageRejected(f"{what} holds numbers beyond its modulus")
    return message.epoch, np.stack([body, stretch(message.seed)])


def stretch(seed: bytes) -> NDArray[np.uint64]:
    """Coefficients `(primes, N)`, uniform modulo each prime, from 32 bytes: by rejection from an AES-256 keystream."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    rows = []
    for prime in PRIMES:
        found = np.zeros(0, np.uint64)
        while len(found) < RING:
            drawn = np.frombuffer(stream.update(bytes(8 * (RING - len(found)))), "<u8") & np.uint64((1 << 60) - 1)
            found = np.concatenate([found, drawn[drawn < prime]])
        rows.append(found)
    return np.stack(rows)


def _scaled(polynomial: NDArray[np.int64]) -> NDArray[np.int64]:
    """round(q m / t) modulo each prime, `(primes, N)`."""
    scaled = np.zeros((len(PRIMES), RING), np.int64)
    for place in np.flatnonzero(polynomial):
        exact = (2 * _MODULUS * int(polynomial[place]) + PLAIN_MODULUS) // (2 * PLAIN_MODULUS)
        scaled[:, place] = [exact % prime for prime in PRIMES]
    return scaled


def _binomial_noise() -> NDArray[np.int64]:
    """`(N,)`, the difference of two sums of 21 random bits each."""
    width = 2 * _BINOMIAL_BITS
    bits = np.unpackbits(np.frombuffer(os.urandom(RING * width // 8), np.uint8)).reshape(2, RING, _BINOMIAL_BITS)
    ones = bits.sum(axis=2, dtype=np.int64)
    noise: NDArray[np.int64] = ones[0] - ones[1]
    return noise


def _packed(body: NDArray[np.uint64]) -> bytes:
    """60 bits a number: of every two, the second begins in the middle of the eighth byte."""
    pairs = body.reshape(-1, 2)
    packed = np.zeros((len(pairs), 16), np.uint8)
    packed[:, :8] = np.ascontiguousarray(pairs[:, 0], "<u8").view(np.uint8).reshape(-1, 8)
    second = np.ascontiguousarray(pairs[:, 1], "<u8")
    packed[:, 7] |= ((second & np.uint64(15)) << np.uint64(4)).astype(np.uint8)
    packed[:, 8:] = np.ascontiguousarray(second >> np.uint64(4), "<u8").view(np.uint8).reshape(-1, 8)
    return packed[:, :15].tobytes()


def _unpacked(packed: bytes) -> NDArray[np.uint64]:
    groups = np.frombuffer(packed, np.uint8).reshape(-1, 15)
    wide = np.zeros((len(groups), 16), np.uint8)
    wide[:, :15] = groups
    low, high = wide[:, :8].copy().view("<u8")[:, 0], wide[:, 8:].copy().view("<u8")[:, 0]
    first = low & np.uint64((1 << 60) - 1)
    second = (low >> np.uint64(60)) | (high << np.uint64(4))
    return np.stack([first, second], axis=1).astype(np.uint64).reshape(len(PRIMES), RING)
