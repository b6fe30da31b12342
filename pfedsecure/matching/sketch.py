"""Sketches: a public random projection of a prompt to a few numbers, the same to the last bit on every machine.

The sketch of a context c `(n, d)` is S(c) = clip(P (c - centre)), m numbers: c - centre flattened to N = n d numbers, P
an m x N matrix of random signs over sqrt(m), and whatever is longer than `clip` shortened to it. Centre, P and clip
follow from the federation's plan and are public.

Distances. For fixed u, over the choice of signs (Achlioptas 2003, the lemma of Johnson and Lindenstrauss),

    E ||P u||^2 = ||u||^2,   Var ||P u||^2 <= 2 ||u||^4 / m,
    P(| ||P u||^2 - ||u||^2 | >= h ||u||^2)  <=  2 exp(-m (h^2 / 4 - h^3 / 6)),   0 < h < 1.

With m = 64 a distance comes out with a standard deviation of at most 9 %, and as less than half or more than 1.33 times
itself (h = 0.75) with probability below 0.023. For nearest neighbours this means: a peer that is a fifth farther than
another is usually told apart from it, two that differ by a few per cent are not; they may change places. How often the
nearest stay the nearest on trained prompts is measured in docs/matching.md. The bound is for contexts that do not
depend on the seed: somebody who knows it can make a prompt that is far away and whose sketch is not.

Sensitivity. Whatever the data, ||S(c)|| <= clip; so two sketches are at most 2 clip apart, whatever was changed: one
image, or all of them. That the context is clipped after the projection and not before matters: P can lengthen a vector.

Why centring is free. The centre is the start that the plan prescribes, a function of no client's data. Subtracting it
from everything changes no distance and no sensitivity; only what has been learned counts against the clip.

Repeatability. Who opens a prompt can compute its sketch anew and compare bits. So nothing here depends on the order in
which a library adds: the difference is rounded to integers times a power of two, relative to its largest element, so
small that int64 holds every partial sum of the projection and float64 the result; the norm is `math.fsum`, which
rounds once; everything else is one IEEE operation an element. The signs are SHAKE-256's, not a generator's.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from numpy.typing import NDArray

_SUM_BITS = 53
"""Sums of the projection stay at or below 2**53, the integers that float64 holds."""


class Sketcher:
    """Sketches of `dimension` numbers, of norm up to `clip`, of contexts of the shape of `centre (n, d)`.

    Raises ValueError when the parameters make no sense.
    """

    def __init__(self, centre: NDArray[np.float32], dimension: int, clip: float, seed: int) -> None:
        if centre.ndim != 2 or centre.size == 0 or not np.isfinite(centre).all():
            raise ValueError(f"a centre of shape {centre.shape} and finite numbers cannot be had from this")
        if dimension < 1:
            raise ValueError(f"a sketch of {dimension} numbers is none")
        if not (math.isfinite(clip) and clip > 0):
            raise ValueError(f"clip {clip!r} is not a positive number")
        self.dimension = dimension
        self.clip = clip
        self._centre = centre.astype(np.float64)
        self._signs = random_signs(dimension, centre.size, seed)
        self._bits = _SUM_BITS - math.ceil(math.log2(centre.size))

    def sketch(self, context: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sketch `(m,)` of `context (n, d)`; its Euclidean norm, rounded to float64, is at most `clip`.

        Raises ValueError for another shape, and for numbers that are not finite.
        """
        if context.shape != self._centre.shape or not np.isfinite(context).all():
            raise ValueError(
                f"a context of shape {context.shape} cannot be sketched, or has numbers that are not finite"
            )
        return self._clipped(self._projected(context.astype(np.float64) - self._centre))

    def _projected(self, difference: NDArray[np.float64]) -> NDArray[np.float64]:
        """P times the flattened `difference (n, d)`; equal to the last bit everywhere."""
        exponent = math.frexp(float(np.abs(difference).max()))[1]
        # The largest is below 2**bits now; the sum of N of them below 2**53.
        integers = np.rint(np.ldexp(difference.reshape(-1), self._bits - exponent)).astype(np.int64)
        sums = self._signs @ integers
        return np.ldexp(sums.astype(np.float64), exponent - self._bits) / math.sqrt(self.dimension)

    def _clipped(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        norm = _norm(vector)
        if norm <= self.clip:
            return vector
        scale = self.clip / norm
        while _norm(vector * scale) > self.clip:  # by a rounding
            scale = math.nextafter(scale, 0.0)
        return vector * scale


def random_signs(rows: int, columns: int, seed: int) -> NDArray[np.int64]:
    """A matrix `(rows, columns)` of 1 and -1: the bits of SHAKE-256 of its shape and `seed`, 1 where a bit is 0."""
    label = json.dumps(["pfedsecure sketch signs", rows, columns, seed]).encode()
    stream = hashlib.shake_256(label).digest((rows * columns + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=rows * columns)
    return 1 - 2 * bits.reshape(rows, columns).astype(np.int64)


def _norm(vector: NDArray[np.float64]) -> float:
    return math.sqrt(math.fsum((vector * vector).tolist()))
