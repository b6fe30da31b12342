"""From a client's numbers to ring elements, and from their sum back: fixed point that cannot wrap, with a known error.

A client's vector is [w * values, w, (w', w' * metrics), 1, 1]: weight w; w' = w, or 0 for a client that keeps its
metrics to itself (then it sends zeros, which nobody can tell from numbers). Values are clipped to [-clip, clip],
multiplied by w (exactly: float32 times an integer below 2**29), scaled by 2**f and rounded *stochastically*, up with
the probability of the fraction, so that the mean of the sum is right whatever the values. Weights are integers and
exact.

Range. Each element is at most max_weight * clip * 2**f + 1 in magnitude, and f is the largest with which n of them
stay below 2**(bits - 1), and below 2**53: the sum of any part of the cohort, of clients that keep to the rules, cannot
wrap, and float64 holds it. The ring has 2**32 elements where that leaves the precision that the parameters ask for,
else 2**64.

Error. One client's rounding is off by less than one step, 2**-f; the sum of m clients by less than m steps, always,
and by about sqrt(m / 6) steps typically. The weighted mean is off by less than m * 2**-f / sum(w) = 2**-f / mean(w),
and the rounding of one float64 division.

The two ones sum to the number of clients. A sum of masks that do not cancel passes for a sum with probability 2**-64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import PlanError
from pfedsecure.secagg.entropy import Entropy
from pfedsecure.secagg.masking import Ring, RingType
from pfedsecure.secagg.setting import Parameters

CHECK_ELEMENTS = 2

_FLOAT_BITS = 53
"""Sums stay below 2**53, so that float64 holds them exactly, and each element with the fraction that rounding needs."""


@dataclass(frozen=True)
class Update:
    """What a client puts in: `values` (float32, the parameters' length), its weight, and its metrics or None."""

    values: NDArray[np.float32]
    weight: int
    metrics: Mapping[str, float] | None = None


@dataclass(frozen=True)
class WeightedMean:
    """What comes out. `metrics` are None when nobody sent any; `metrics_weight` is the weight of those who did."""

    values: NDArray[np.float64]
    total_weight: int
    metrics: dict[str, float] | None
    metrics_weight: int


@dataclass(frozen=True)
class Encoding:
    """The encoding of a cohort of `clients`; `fraction_bits` is f, `bits` the size of the ring's elements."""

    parameters: Parameters
    clients: int
    bits: int
    fraction_bits: int

    @classmethod
    def of(cls, parameters: Parameters, clients: int) -> Encoding:
        """Raises PlanError when not even 64 bits give the precision that `parameters` ask for."""
        needed = max(math.ceil(-math.log2(parameters.precision)), 0)
        for bits in (32, 64):
            fraction_bits = _most_fraction_bits(parameters, clients, bits)
            if fraction_bits >= needed and clients * parameters.max_weight < 2 ** (bits - 1):
                return cls(parameters, clients, bits, fraction_bits)
        raise PlanError(
            f"precision {parameters.precision:g} cannot be had with clip {parameters.clip:g}, max_weight "
            f"{parameters.max_weight} and {clients} clients; allow a coarser one"
        )

    @property
    def dtype(self) -> RingType:
        """Of ring elements in memory; on the wire they are little-endian."""
        return np.dtype(np.uint32) if self.bits == 32 else np.dtype(np.uint64)

    @property
    def length(self) -> int:
        """Elements of a vector."""
        metrics = len(self.parameters.metrics)
        return self.parameters.values + 1 + (metrics + 1 if metrics else 0) + CHECK_ELEMENTS

    @property
    def step(self) -> float:
        """What the lowest bit of an encoded value stands for."""
        return 2.0**-self.fraction_bits

    def error_bound(self, clients: int) -> float:
        """The error of the sum over so many clients stays below this, in each value."""
        return clients * self.step

    def clipped(self, values: NDArray[np.float32]) -> int:
        """How many of `values` lie outside of [-clip, clip] and would be changed."""
        return int((np.abs(values) > self.parameters.clip).sum())

    def encode(self, update: Update, entropy: Entropy = os.urandom) -> Ring:
        """A client's vector. Raises ValueError for numbers of another shape, that are not finite, or out of range."""
        parameters = self.parameters
        if update.values.shape != (parameters.values,) or update.values.dtype != np.float32:
            raise ValueError(f"values must be float32 of shape ({parameters.values},)")
        if not 1 <= update.weight <= parameters.max_weight:
            raise ValueError(f"weight {update.weight} is not in 1..{parameters.max_weight}")
        metrics = np.zeros(len(parameters.metrics), np.float32)
        if update.metrics is not None:
            if sorted(update.metrics) != sorted(parameters.metrics):
                raise ValueError(f"metrics must be {', '.join(parameters.metrics) or 'none'}")
            metrics = np.array([update.metrics[name] for name in parameters.metrics], np.float32)
        numbers = np.concatenate([update.values, metrics])
        if not np.isfinite(numbers).all():
            raise ValueError("values and metrics must be finite")
        real = self._round(numbers, update.weight, entropy)
        parts: list[NDArray[np.int64] | list[int]] = [real[: parameters.values], [update.weight]]
        if parameters.metrics:
            parts += [[0 if update.metrics is None else update.weight], real[parameters.values :]]
        parts.append([1] * CHECK_ELEMENTS)
        return np.concatenate([np.asarray(part, np.int64) for part in parts]).astype(self.dtype)

    def decode(self, total: Ring, clients: int) -> WeightedMean | None:
        """The mean that a sum of `clients` vectors stands for; None when no clients by the rules have such a sum."""
        parameters = self.parameters
        signed = total.view(np.int32 if self.bits == 32 else np.int64).astype(np.int64)
        weight = int(signed[parameters.values])
        if (signed[-CHECK_ELEMENTS:] != clients).any() or not clients <= weight <= clients * parameters.max_weight:
            return None
        values = self._mean(signed[: parameters.values], weight, clients)
        metrics, metrics_weight = None, 0
        if parameters.metrics:
            metrics_weight = int(signed[parameters.values + 1])
            if not 0 <= metrics_weight <= weight:
                return None
            if metrics_weight:
                means = self._mean(signed[parameters.values + 2 : -CHECK_ELEMENTS], metrics_weight, clients)
                if means is None:
                    return None
                metrics = dict(zip(parameters.metrics, means.tolist(), strict=True))
        return None if values is None else WeightedMean(values, weight, metrics, metrics_weight)

    def _mean(self, sums: NDArray[np.int64], weight: int, clients: int) -> NDArray[np.float64] | None:
        """Means of encoded sums; None when one is beyond what clipped values and rounding can give."""
        means = sums.astype(np.float64) / weight * np.float64(self.step)
        furthest = float(np.float32(self.parameters.clip)) + self.error_bound(clients) / weight
        return means if (np.abs(means) <= furthest * (1 + 1e-12)).all() else None

    def _round(self, numbers: NDArray[np.float32], weight: int, entropy: Entropy) -> NDArray[np.int64]:
        clip = np.float32(self.parameters.clip)
        exact = np.clip(numbers, -clip, clip).astype(np.float64) * (weight * 2.0**self.fraction_bits)
        below = np.floor(exact)
        threshold = np.frombuffer(entropy(4 * len(numbers)), "<u4") * 2.0**-32  # uniform in [0, 1)
        return (below + (threshold < exact - below)).astype(np.int64)


def _most_fraction_bits(parameters: Parameters, clients: int, bits: int) -> int:
    """The largest f with clients * (max_weight * clip * 2**f + 1) < 2**(bits - 1), and below 2**53; or -1."""
    room = Fraction(2 ** min(bits - 1, _FLOAT_BITS) - 1, clients) - 1
    largest = parameters.max_weight * Fraction(float(np.float32(parameters.clip)))
    return int(room / largest).bit_length() - 1
