"""Shamir's secret sharing of 256-bit secrets, vectorised.

The field is the integers modulo 65521, the largest prime below 2**16. A secret is cut into 18 limbs of 15 bits, and
each limb is shared by its own polynomial of degree t - 1 whose other coefficients are uniform: t shares determine the
secret, t - 1 are independent of it, perfectly. A share is 18 numbers of 16 bits (36 bytes) and belongs to a point, an
integer in 1..65520. Sums of products of field elements fit in 64 bits for any threshold below 2**32, so everything is
plain integer matrix arithmetic without branches or table look-ups that depend on secrets.

Shares are not authenticated here: `reconstruct` returns *a* secret for any shares. Its user compares the result with
what the dealer committed to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pfedsecure.secagg.entropy import Entropy, uniform_below

PRIME = 65521
SECRET_BYTES = 32
SHARE_BYTES = 36

_LIMBS = 18
_LIMB_BITS = 15
_MODULUS = np.uint64(PRIME)

Shares = NDArray[np.uint16]
Field = NDArray[np.uint64]


def share(secrets: list[bytes], points: NDArray[np.int64], threshold: int, entropy: Entropy) -> Shares:
    """Shares `(points, secrets, 18)` of each 32-byte secret; any `threshold` of them determine it.

    `points`: distinct, in 1..65520, at least `threshold` of them.
    """
    if not 2 <= threshold <= len(points) or len(np.unique(points)) < len(points):
        raise ValueError(f"{len(points)} points cannot hold shares with threshold {threshold}")
    if not ((points >= 1) & (points < PRIME)).all():
        raise ValueError(f"points must be in 1..{PRIME - 1}")
    limbs = np.stack([_to_limbs(secret) for secret in secrets]).reshape(1, -1)
    random = uniform_below(PRIME, (threshold - 1) * limbs.shape[1], entropy).reshape(threshold - 1, -1)
    values: Field = _powers(points.astype(np.uint64), threshold) @ np.concatenate([limbs, random]) % _MODULUS
    return values.astype(np.uint16).reshape(len(points), len(secrets), _LIMBS)


def reconstruct(points: NDArray[np.int64], shares: Shares) -> list[bytes | None]:
    """The secrets of many sharings at once: `points (m, t)` with `shares (m, t, 18)`, the points of a row distinct.

    None where the shares are those of no 256-bit secret.
    """
    weights = lagrange_at_zero(points)
    limbs = np.einsum("mt,mtl->ml", weights, shares.astype(np.uint64)) % _MODULUS
    return [_from_limbs(row) for row in limbs]


def lagrange_at_zero(points: NDArray[np.int64]) -> Field:
    """Per row of `points (m, t)`: the weights with which values of a polynomial of degree t - 1 give its value at 0."""
    x = points.astype(np.uint64)
    numerator = np.ones_like(x)
    denominator = np.ones_like(x)
    for column in range(x.shape[1]):
        other = x[:, column, None]
        numerator[:, :column] = numerator[:, :column] * other % _MODULUS
        numerator[:, column + 1 :] = numerator[:, column + 1 :] * other % _MODULUS
        difference = (other + _MODULUS - x) % _MODULUS
        difference[:, column] = 1
        denominator = denominator * difference % _MODULUS
    return numerator * _inverse(denominator) % _MODULUS


def to_bytes(shares: Shares) -> bytes:
    """Little-endian; the shares one after the other."""
    return shares.astype("<u2").tobytes()


def from_bytes(data: bytes) -> Shares:
    """Shares `(count, 18)`. Numbers that are no field elements stay what they are; no honest dealer makes them."""
    return np.frombuffer(data, "<u2").reshape(-1, _LIMBS)


def _powers(points: Field, count: int) -> Field:
    """`(points, count)`: powers 0..count - 1."""
    powers = np.ones((len(points), count), np.uint64)
    for exponent in range(1, count):
        powers[:, exponent] = powers[:, exponent - 1] * points % _MODULUS
    return powers


def _inverse(values: Field) -> Field:
    """Reciprocals, as powers with exponent PRIME - 2 (Fermat)."""
    result = np.ones_like(values)
    base = values
    exponent = PRIME - 2
    while exponent:
        if exponent & 1:
            result = result * base % _MODULUS
        base = base * base % _MODULUS
        exponent >>= 1
    return result


def _to_limbs(secret: bytes) -> Field:
    """18 limbs of 15 bits, least significant first."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"secrets have {SECRET_BYTES} bytes, not {len(secret)}")
    number = int.from_bytes(secret, "little")
    return np.array([number >> (_LIMB_BITS * limb) & (2**_LIMB_BITS - 1) for limb in range(_LIMBS)], np.uint64)


def _from_limbs(limbs: Field) -> bytes | None:
    number = sum(int(limb) << (_LIMB_BITS * index) for index, limb in enumerate(limbs))
    if (limbs >> np.uint64(_LIMB_BITS)).any() or number >> (8 * SECRET_BYTES):
        return None
    return number.to_bytes(SECRET_BYTES, "little")
