"""How much Gaussian noise a release takes: the analytic Gaussian mechanism (Balle and Wang, ICML 2018).

Formal guarantee. Let a function of the data have Euclidean sensitivity D: its values on any two neighbouring data sets
are at most D apart. Releasing the value plus N(0, sigma^2 I) is (epsilon, delta)-differentially private if and only if
(their Theorem 8)

    Phi(D / (2 sigma) - epsilon sigma / D)  -  e^epsilon Phi(-D / (2 sigma) - epsilon sigma / D)  <=  delta.

So unlike the classical sigma = D sqrt(2 ln(1.25 / delta)) / epsilon, which is proved for epsilon < 1 only and is too
large even there, this sigma is the smallest that will do, at every epsilon. One release only: what several come to
together is for an accountant, from `pfedsecure.privacy.events`, to say.
"""

from __future__ import annotations

import math

_CONTINUED_FRACTION_FROM = 4.0
_CONTINUED_FRACTION_DEPTH = 80
_PRECISION = 1e-13
_MARGIN = 1e-9
"""Of delta: far more than `_delta` is off by, also where two nearly equal numbers are subtracted in it."""


def gaussian_delta(sigma: float, epsilon: float, sensitivity: float) -> float:
    """The smallest delta with which noise of standard deviation `sigma` gives `epsilon`.

    Relative error below 1e-10 where sigma / sensitivity is between 1e-3 and 1e3, as far as delta is above 1e-300;
    smaller ones may be 0. Raises ValueError unless sigma and sensitivity are positive and epsilon is not negative.
    """
    _require("sigma", sigma, sigma > 0)
    _require("epsilon", epsilon, epsilon >= 0)
    _require("sensitivity", sensitivity, sensitivity > 0)
    return _delta(sigma / sensitivity, epsilon)


def analytic_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """The smallest standard deviation that gives (`epsilon`, `delta`), rounded up by a few parts in 10^9 at most.

    Raises ValueError unless epsilon >= 0, 0 < delta < 1 and sensitivity > 0, all finite; and where the answer is
    outside of what floating point can tell, a sigma below 1e-3 or above 1e9 times the sensitivity.
    """
    _require("epsilon", epsilon, epsilon >= 0)
    _require("delta", delta, 0 < delta < 1)
    _require("sensitivity", sensitivity, sensitivity > 0)
    low, high = 1e-3, 1e9
    delta *= 1 - _MARGIN
    if not _delta(high, epsilon) <= delta < _delta(low, epsilon):
        raise ValueError(f"no usable noise gives epsilon {epsilon:g} with delta {delta:g}")
    while high > low * (1 + _PRECISION):
        middle = math.sqrt(low * high)  # delta falls as sigma grows
        if _delta(middle, epsilon) <= delta:
            high = middle
        else:
            low = middle
    return high * (1 + _PRECISION) * sensitivity


def _delta(multiplier: float, epsilon: float) -> float:
    """`gaussian_delta` for sensitivity 1.

    With a and b the arguments of Phi above, e^epsilon phi(b) = phi(a), so the second term is phi(a) M(-b) with
    Mills' ratio M(x) = Phi(-x) / phi(x): nothing overflows, and no small number is the difference of two large ones.
    """
    half, shift = 1 / (2 * multiplier), epsilon * multiplier
    a, minus_b = half - shift, half + shift
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    if a >= 0:
        return math.erfc(-a / math.sqrt(2)) / 2 - density * _mills(minus_b)
    return max(density * (_mills(-a) - _mills(minus_b)), 0.0)


def _mills(x: float) -> float:
    """Phi(-x) / phi(x) for x >= 0."""
    if x < _CONTINUED_FRACTION_FROM:
        return math.sqrt(math.pi / 2) * math.exp(x * x / 2) * math.erfc(x / math.sqrt(2))
    tail = x  # Laplace: 1 / (x + 1 / (x + 2 / (x + 3 / ...)))
    for number in range(_CONTINUED_FRACTION_DEPTH, 0, -1):
        tail = x + number / tail
    return 1 / tail


def _require(name: str, value: float, holds: bool) -> None:
    if not (holds and math.isfinite(value)):
        raise ValueError(f"{name} {value!r} makes no sense here")
