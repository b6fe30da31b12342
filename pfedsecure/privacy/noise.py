"""Gaussian noise on the integers, from the operating system's generator, without floating-point traces of its own.

Why not a library's normal deviates: those lie on a set of floats that depends on what they are added to, and the low
bits of a sum can tell the summand (Mironov 2012). Here values are integers before noise is added and after.

Formal guarantee. `RoundedGaussian(sigma).sample` returns independent draws, each within total variation distance
2**-160 of X = round(N), N normal with mean 0 and variance sigma^2, provided that the bytes of `entropy` are uniform.
For an integer x, x + round(N) = round(x + N): the ideal Gaussian mechanism on the reals and then a function of what it
releases. So x + X has every guarantee that the Gaussian mechanism with this sigma has, alone and composed, and with
the distance t = 2**-160 for each of c numbers, (epsilon, delta) becomes (epsilon, delta + (1 + e^epsilon) c t): with a
million million numbers and epsilon 32 that adds less than 2**-70. The sensitivity is that of the *integers*: who rounds
reals to them must round so that it is still bounded, e.g. towards zero, which makes no vector longer.

Proof. Let T(k) = P(|N| > k - 1/2) = P(|X| >= k) for k >= 1, and U a uniformly random multiple of 2**-191 in [0, 1).
A draw is M = the number of k with U < T(k), and a random sign. By itself P(M >= k) = P(U < T(k)) is off from T(k) by
less than 2**-191; where T(k) is computed with error e, by e more; and where it is below 2**-212, which is so from
k = 17 sigma + 1 on, it is taken for 0. The distance is at most the sum of all these errors over k, with sigma up to
2**20 no more than (17 * 2**20 + 2) (2**-191 + e) and a negligible tail; e < 2**-195 (`_exact_tail`).

That most draws need no exact T(k): the first 63 bits of U are compared with a table of 2**63 T(k) computed in float64.
`math.erfc` and its argument together are off by a few 2**-53; the table is taken to be right within 2**-44, which its
construction tests at some places; nothing else about floating point is relied on. Bits that come within 2**-44 of an
entry, or below all of them, are ambiguous: for such a draw (one in more than 2**19, whatever sigma) 128 more bits of U
are drawn, and T(k) is compared exactly. No claim is made about side channels: the time that a draw takes tells, in
those rare cases, that one was ambiguous.

For DP-SGD too. A sum of clipped gradients needs no grid that is finer than a small part of its noise: take as the
grid's step the noise's standard deviation over 2**13, round each example's clipped gradient to it towards zero (its
norm stays within the clip), add up in int64, add this noise with sigma = 2**13, and multiply by the step. One table of
64,000 numbers then serves every step of a training, whatever its learning rate, clip and batch.
"""

from __future__ import annotations

import math
import os
from decimal import Context, Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pfedsecure.secagg.entropy import Entropy

MAX_SIGMA = 2.0**20

_BITS = 63
_MARGIN = 1 << (_BITS - 44)
_MORE_BYTES = 16
_TABLE_REACH = 7.8
"""In standard deviations: beyond it T is below the margin, so that the table would decide nothing."""
_TABLE_CHECKS = 9
_EXACT_REACH = 17.0
_DIGITS = Context(prec=150)
_PI_DIGITS = "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798"


class RoundedGaussian:
    """round(N(0, sigma^2)) for 0 < `sigma` <= `MAX_SIGMA`. Raises ValueError for another sigma.

    Holds a table of 8 sigma numbers; make it once and keep it.
    """

    def __init__(self, sigma: float) -> None:
        if not 0 < sigma <= MAX_SIGMA:  # false for NaN too
            raise ValueError(f"noise with standard deviation {sigma!r} cannot be drawn: over 0, up to {MAX_SIGMA:g}")
        self.sigma = float(sigma)
        self._table = _table(self.sigma)

    def sample(self, count: int, entropy: Entropy = os.urandom) -> NDArray[np.int64]:
        """`count` independent draws `(count,)`."""
        words = np.frombuffer(entropy(8 * count), "<u8")
        signs = 1 - 2 * (words & 1).astype(np.int64)
        leading = (words >> 1).astype(np.int64)  # the first 63 bits of U
        places = np.searchsorted(self._table, leading, side="right")
        magnitudes = len(self._table) - places
        # The table's neighbours on both sides; below the first entry everything is ambiguous.
        below = self._table[np.maximum(places - 1, 0)]
        above = self._table[np.minimum(places, len(self._table) - 1)]
        ambiguous = (places == 0) | (leading - below <= _MARGIN) | (np.abs(above - leading) <= _MARGIN)
        for place in np.flatnonzero(ambiguous):
            more = int.from_bytes(entropy(_MORE_BYTES), "big")
            magnitudes[place] = self._exact_magnitude((int(leading[place]) << (8 * _MORE_BYTES)) | more)
        return signs * magnitudes

    def _exact_magnitude(self, numerator: int) -> int:
        """The number of k with U < T(k), for U = `numerator` / 2**191."""
        with localcontext(_DIGITS):
            uniform = Decimal(numerator) / Decimal(2 ** (_BITS + 8 * _MORE_BYTES))
        low, high = 0, math.ceil(_EXACT_REACH * self.sigma) + 2  # T(low) > U >= T(high), with T(0) = 1
        while high - low > 1:
            middle = (low + high) // 2
            if uniform < _exact_tail(middle, self.sigma):
                low = middle
            else:
                high = middle
        return low


@lru_cache(maxsize=2)  # a table takes a tenth of a second and up to 64 MiB, and each release asks for its own
def _table(sigma: float) -> NDArray[np.int64]:
    """2**63 T(k) for k = K, ..., 2, 1: ascending. T(K) is below the margin, so that no larger k is decided here."""
    size = math.ceil(_TABLE_REACH * sigma) + 1
    scale = sigma * math.sqrt(2)
    tails = (int(math.ldexp(math.erfc((k - 0.5) / scale), _BITS)) for k in range(size, 0, -1))
    table = np.fromiter(tails, np.int64, size)
    for k in np.unique(np.geomspace(1, size, _TABLE_CHECKS).astype(int)).tolist():
        if abs(int(table[size - k]) - int(_exact_tail(k, sigma) * 2**_BITS)) > _MARGIN // 8:
            raise RuntimeError("this machine's math.erfc is not accurate enough to draw noise with")
    table.setflags(write=False)
    return table


def _exact_tail(k: int, sigma: float) -> Decimal:
    """T(k) = erfc(x) with x = (k - 1/2) / (sigma sqrt 2), off by less than 2**-195; 0 where x >= 12.

    erf(x) = 2 / sqrt(pi) e^(-x^2) (x + 2 x^3 / 3 + 4 x^5 / (3 * 5) + ...): no term is negative, so that 150 digits keep
    the 66 that are wanted of 1 - erf(x).
    """
    with localcontext(_DIGITS):
        square = (Decimal(2 * k - 1) / 2) ** 2 / (2 * Decimal(sigma) ** 2)
        if square >= 144:
            return Decimal(0)
        term = total = square.sqrt()
        n = 0
        while term > Decimal("1e-80"):
            n += 1
            term = term * 2 * square / (2 * n + 1)
            total += term
        return 1 - 2 * total * (-square).exp() / Decimal(_PI_DIGITS).sqrt()
