"""What releases come to together: epsilon of a list of events, and the noise that keeps a training within an epsilon.

Formal guarantee. `epsilon(events, delta)` is an upper bound: whatever an adversary chose between the events in the
light of those before, all of them together are (epsilon, delta)-differentially private with respect to adding or
removing one example. For events on all the data that is the exact curve of the Gaussian mechanism (their noise
multipliers add up as 1 / sigma^2); for events on Poisson samples it is the upper end of the error interval of the PRV
accountant (Gopi, Lee, Wutschitz, "Numerical composition of differential privacy", NeurIPS 2021) in Opacus, or the bound
of its Rényi accountant where that is smaller or the other cannot be computed.

| events | epsilon |
|---|---|
| none, or no steps, or sample rate 0 | 0 |
| noise multiplier 0 | infinite |
| noise so small that the Rényi bound is over `_HUGE` | that bound, which is loose |
| a noise multiplier below `_SMALLEST` on a sample | infinite: it protects nobody, and the bounds overflow |

The PRV accountant bounds the privacy loss of *removing* an example. That adding one is never worse is proved for single
steps only (Lebeda et al., "Avoiding pitfalls for privacy accounting of subsampled mechanisms under composition", 2024,
leave it open under composition), so the tests compose both directions by themselves and compare.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfedsecure.errors import BudgetTooSmall
from pfedsecure.privacy.calibration import gaussian_delta
from pfedsecure.privacy.events import Event, GaussianRelease, SampledGaussianSteps

MAX_NOISE_MULTIPLIER = 100.0
"""More noise than this on a step is refused: a batch of a hundred examples that all agree would not be seen in it."""

_History = list[tuple[float, float, int]]
"""As Opacus' accountants keep it: noise multiplier, sample rate, steps."""

_MIN_NOISE_MULTIPLIER = 0.05
_HUGE = 60.0
_SMALLEST = 1e-3
_ORDERS = [*range(2, 65), 80, 128, 256, 512]
"""Of Rényi divergences: whole numbers, whose formula is a short sum."""
_PRECISION = 1e-3
"""Relative, of a noise multiplier that is solved for; and of an epsilon that is computed, where that is below 10."""


def epsilon(events: Iterable[Event], delta: float) -> float:
    """An upper bound of what `events` come to at `delta`, see above. Raises ValueError unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta!r} makes no sense here")
    composition = _Composition.of(events)
    if composition.precision == math.inf or any(sigma < _SMALLEST for sigma, _ in composition.sampled):
        return math.inf
    if not composition.sampled:
        return _plain_epsilon(composition.precision, delta)
    bound = _renyi_epsilon(composition.history, delta)
    if not bound <= _HUGE:
        return bound
    error = 0.01
    bound = min(bound, _prv_epsilon(composition.history, delta, error))
    if bound < 1:
        error = max(bound, 0.1) * 0.01
        bound = min(bound, _prv_epsilon(composition.history, delta, error))
    return bound


def noise_multiplier(
    target: float, delta: float, sample_rate: float, steps: int, besides: Iterable[Event] = ()
) -> float:
    """The smallest noise multiplier with which `steps` steps, together with `besides`, stay within epsilon `target`.

    Too large by a part in a thousand at most, and never too small: `epsilon` of the events with this very number is at
    most `target`. Raises BudgetTooSmall, which says what is possible, when `MAX_NOISE_MULTIPLIER` is not enough; and
    ValueError for numbers that make no sense.
    """
    if not (target > 0 and 0 < sample_rate <= 1 and steps >= 1):
        raise ValueError(f"epsilon {target!r} for {steps!r} steps at sample rate {sample_rate!r} makes no sense")
    others = list(besides)

    def events(multiplier: float) -> list[Event]:
        return [*others, SampledGaussianSteps("", 0, multiplier, sample_rate, steps)]

    def total(multiplier: float) -> float:
        return epsilon(events(multiplier), delta)

    # The Rényi bound alone takes milliseconds, and its answer is a little too large.
    low, high = _MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER
    while high > low * 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _quick_bound(events(middle), delta) <= target else (middle, high)
    at_high = total(high)
    if at_high > target:
        possible = _rounded_up(total(MAX_NOISE_MULTIPLIER))
        raise BudgetTooSmall(
            f"epsilon {target:g} with delta {delta:g} is too small for {steps} steps at sample rate {sample_rate:.3g}: "
            f"the smallest possible is {possible}, and leaves next to nothing to learn; ask for more, or for a plan "
            "with fewer rounds"
        )
    low = max(0.9 * high, _MIN_NOISE_MULTIPLIER)
    while (at_low := total(low)) <= target:
        if low == _MIN_NOISE_MULTIPLIER:
            return low
        high, at_high, low = low, at_low, max(0.9 * low, _MIN_NOISE_MULTIPLIER)
    # Epsilon falls nearly like a power of the noise: the secant in logarithms, once a little too high and once a little
    # too low, so that it brackets the answer from both sides.
    for attempt in itertools.count():
        if high <= low * (1 + _PRECISION):
            return high
        middle = math.sqrt(low * high)
        if attempt % 3 < 2 and 0 < at_high < at_low < math.inf:
            share = math.log(at_low / target) / math.log(at_low / at_high)
            nudge = _PRECISION / 4 * (1 if attempt % 3 == 0 else -1)
            middle = min(max(low * (high / low) ** share * (1 + nudge), low), high)
        at_middle = total(middle)
        if at_middle <= target:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    raise AssertionError("the bracket gets smaller with every third attempt")


@dataclass(frozen=True)
class _Composition:
    """Events put together: all plain ones are one Gaussian with 1 / sigma^2 = `precision`; steps by (sigma, q)."""

    precision: float
    sampled: dict[tuple[float, float], int]

    @classmethod
    def of(cls, events: Iterable[Event]) -> _Composition:
        precision, sampled = 0.0, Counter[tuple[float, float]]()
        for event in events:
            sigma, rate, steps = event.noise_multiplier, 1.0, 1
            if isinstance(event, SampledGaussianSteps):
                rate, steps = event.sample_rate, event.steps
            else:
                assert isinstance(event, GaussianRelease)
            if not (sigma >= 0 and 0 <= rate <= 1 and steps >= 0):
                raise ValueError(f"{event} makes no sense")
            if steps == 0 or rate == 0:
                continue
            if sigma == 0 or rate == 1:
                precision += math.inf if sigma == 0 else steps / sigma**2
            else:
                sampled[sigma, rate] += steps
        return cls(precision, dict(sampled))

    @property
    def history(self) -> _History:
        """Plain events first."""
        plain = [(1 / math.sqrt(self.precision), 1.0, 1)] if self.precision else []
        return plain + [(sigma, rate, steps) for (sigma, rate), steps in sorted(self.sampled.items())]


def _quick_bound(events: Iterable[Event], delta: float) -> float:
    composition = _Composition.of(events)
    if composition.precision == math.inf:
        return math.inf
    if not composition.sampled:
        return _plain_epsilon(composition.precision, delta)
    return _renyi_epsilon(composition.history, delta)


def _plain_epsilon(precision: float, delta: float) -> float:
    """The smallest epsilon of the Gaussian mechanism with sigma = 1 / sqrt(precision), rounded up."""
    if precision == 0:
        return 0.0
    sigma = 1 / math.sqrt(precision)
    if gaussian_delta(sigma, 0.0, 1.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(sigma, high, 1.0) > delta:
        high *= 2
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        if gaussian_delta(sigma, middle, 1.0) <= delta:
            high = middle
        else:
            low = middle
    return high * (1 + 1e-9)


def _renyi_epsilon(history: _History, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = history
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        bound = float(accountant.get_epsilon(delta, alphas=_ORDERS))
    return bound if bound >= 0 else math.inf  # NaN where it overflowed


def _prv_epsilon(history: _History, delta: float, error: float) -> float:
    """Infinite where it cannot be computed."""
    accountant = _prv_accountant()
    accountant.history = history
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            bound = float(accountant.get_epsilon(delta, eps_error=error))  # the upper end of its interval
    except (RuntimeError, ValueError, MemoryError):
        return math.inf
    return bound if bound >= 0 else math.inf


def _prv_accountant() -> Any:
    """Opacus' accountant, but for how far its grid of losses reaches."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain

    class WithDomain(PRVAccountant):  # type: ignore[misc]  # Opacus has no types
        def _get_domain(
            self, prvs: list[Any], num_self_compositions: list[int], eps_error: float, delta_error: float
        ) -> Any:
            # As in Opacus (remark 5.6 of the paper, and 3 more), with Rényi bounds of whole orders: these are larger,
            # so that the grid reaches farther, and a hundred times faster, where fractional ones are an endless sum.
            steps = sum(num_self_compositions)
            reach = _renyi_epsilon(self.history, delta_error / 4)
            for sigma, rate, _ in self.history:
                reach = max(reach, _renyi_epsilon([(sigma, rate, 1)], delta_error / (8 * steps)))
            reach = max(reach, eps_error) + 3
            mesh = eps_error / math.sqrt(steps * math.log(12 / delta_error) / 2)
            return Domain.create_aligned(-reach, reach, mesh)

    return WithDomain()


def _rounded_up(value: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(value))) if math.isfinite(value) else 0
    return f"{math.ceil(value * 10**digits) / 10**digits:g}" if math.isfinite(value) else "infinite"
