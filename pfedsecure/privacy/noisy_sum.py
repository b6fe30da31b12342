"""The Gaussian mechanism on a sum of clipped vectors, one of each example: what every step of DP-SGD releases.

Formal guarantee. For vectors u_1, ..., u_B, each made of one example and the released past alone, `NoisySum` returns
the sum of their clipped, rounded versions plus noise of `noise_multiplier * clip` a number. Adding or removing one
example changes that sum by a vector of norm at most `clip`, whatever the example is. So a call is one use of the
Gaussian mechanism with this noise multiplier, on those examples that are in the batch: with a Poisson sample one step
of `SampledGaussianSteps`.

How. All numbers become integers before anything is added: one unit is noise_multiplier * clip / 2**13. Each example's
vector, all parameters together, is scaled to norm `clip` if it is longer, and rounded towards zero, so that its norm is
at most 2**13 / noise_multiplier units, which is checked in integers. The sum is exact, whatever the order and size of
the batch, and gets the noise of `pfedsecure.privacy.noise` with a standard deviation of 2**13. Only then it becomes a
float, a function of what is released. So neither the finite set of floats that a sum can hit nor its low bits, the two
ways in which a floating-point mechanism betrays what it adds noise to, exist here.

| case | what happens |
|---|---|
| empty batch | noise alone is returned: that nobody was drawn is hidden too |
| a vector with NaN or infinity | counts as zero: no error that depends on data |
| vectors of the wrong number | ValueError: a gradient by class would pass for one by example |

Not covered: how long it takes depends on the size of the batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from pfedsecure.privacy.noise import RoundedGaussian
from pfedsecure.secagg.entropy import Entropy

_NOISE_UNITS = 2**13
_SMALLEST_MULTIPLIER = 1e-4
"""Smaller ones would overflow squares in int64; they protect nobody either."""
_SHRINK = 1 - 2.0**-40
"""So much more than the roundings of float64 that no clipped vector is longer than the clip."""


class NoisySum:
    """Sums of vectors clipped to norm `clip`, with noise. Raises ValueError for numbers that make no sense.

    `entropy` other than the default makes what is released reproducible, and so private from nobody: for tests alone.
    """

    def __init__(self, clip: float, noise_multiplier: float, *, unsafe_entropy: Entropy = os.urandom) -> None:
        if not (0 < clip < float("inf") and _SMALLEST_MULTIPLIER <= noise_multiplier < float("inf")):
            raise ValueError(f"clip {clip!r} with noise multiplier {noise_multiplier!r} makes no sense")
        self.unit = noise_multiplier * clip / _NOISE_UNITS
        """What one integer stands for."""
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        self._largest_square = (Fraction(_NOISE_UNITS) / Fraction(noise_multiplier)) ** 2
        self._entropy = unsafe_entropy

    def clipped(self, vectors: Sequence[Tensor], batch: int) -> list[Tensor]:
        """The exact sums over `batch` examples, int64, in units: one of each of `vectors (batch, ...)`.

        An example's vector is its rows of all of them together. Raises ValueError when one has another first axis.
        """
        for vector in vectors:
            if vector.dim() < 1 or len(vector) != batch:
                raise ValueError(
                    f"a gradient of shape {tuple(vector.shape)} is not one by example: the batch has {batch}"
                )
        numbers = [math.prod(vector.shape[1:]) for vector in vectors]
        rows = [vector.detach().reshape(batch, count) for vector, count in zip(vectors, numbers, strict=True)]
        flat = torch.cat(rows, dim=1)
        norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float64)
        flat, odd = flat.double(), ~norms.isfinite()
        if odd.any():
            norms.masked_fill_(odd, 1.0)
            flat.masked_fill_(odd, 0.0)
        scale = torch.minimum(torch.ones_like(norms), self.clip / norms) * (_SHRINK / self.unit)
        # Whole numbers in float64: as long as squares add up to less than 2**53, every sum of them is exact.
        whole = flat.mul_(scale).trunc_()
        longest = int((whole * whole).sum(dim=1).max()) if batch else 0
        if longest > self._largest_square:  # the sensitivity, and so the guarantee, rests on it
            raise RuntimeError("this machine's floating point is not accurate enough to clip with")
        sums = whole.sum(dim=0).long().split(numbers)
        return [total.reshape(vector.shape[1:]) for total, vector in zip(sums, vectors, strict=True)]

    def noised(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """What may be released: exact sums in units, as `clipped` returns them, with fresh noise, as float32."""
        count = sum(total.numel() for total in sums)
        noise = torch.from_numpy(_noise().sample(count, self._entropy))
        parts = noise.split([total.numel() for total in sums])
        return [
            ((total + part.to(total.device).reshape(total.shape)).double() * self.unit).float()
            for total, part in zip(sums, parts, strict=True)
        ]

    def __call__(self, vectors: Sequence[Tensor], batch: int) -> list[Tensor]:
        """The noised sums, float32: one of the shape `(...)` of each of `vectors (batch, ...)`."""
        return self.noised(self.clipped(vectors, batch))


@cache
def _noise() -> RoundedGaussian:
    """The one table of noise that serves every sum: its making takes a moment."""
    return RoundedGaussian(_NOISE_UNITS)
