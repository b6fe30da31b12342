"""Lower bounds on epsilon from attacks that succeeded too often for a smaller one.

Each holds with probability `confidence` over the audit's own coins, whatever the attack: one that is bad at it gives a
small bound, never one above the true epsilon (but for that probability). Of many bounds at 95 % one in twenty may be
too large: whoever looks at the largest of n has to ask each for a confidence of 1 - 0.05 / n (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import beta, binom, norm  # type: ignore[import-untyped]

from pfedsecure.privacy.accountant import epsilon as total_epsilon
from pfedsecure.privacy.events import GaussianRelease

_LARGEST = 50.0
_PRECISION = 1e-4


def one_run_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """From a training in which each of `canaries` took part by a fair coin, and `guesses` of the coins were guessed.

    `right` guesses were so. Which coins are guessed may depend on what was seen, how many may not. Several trainings,
    each with canaries and noise of its own, are one in this sense: each coin is as private among all as in its own.

    Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, theorem 5.2: under
    (epsilon, delta) the number of right guesses is hardly ever larger than that of `guesses` coins that show heads with
    probability e^epsilon / (1 + e^epsilon). Raises ValueError for numbers that make no sense.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} right of {guesses} guesses about {canaries} canaries makes no sense")

    def refuted(epsilon: float) -> bool:
        heads = 1 / (1 + math.exp(-epsilon))
        by_chance = float(binom.sf(right - 1, guesses, heads))
        below = np.arange(1, right + 1)
        steepest = float(np.max(np.cumsum(binom.pmf(right - below, guesses, heads)) / below, initial=0.0))
        return by_chance + 2 * canaries * delta * steepest < 1 - confidence

    return _largest(refuted)


def membership_bound(
    caught: int, members: int, mistaken: int, others: int, delta: float, confidence: float = 0.95
) -> float:
    """From many trainings with one target in it or not: `caught` of `members`, and `mistaken` for one of `others`.

    Under (epsilon, delta), with t and f the probabilities of the two, t <= e^epsilon f + delta and
    1 - f <= e^epsilon (1 - t) + delta (Kairouz, Oh and Viswanath 2015); t and f are replaced by the pessimistic ends
    of their exact intervals (Clopper and Pearson 1934), half of the error for each. Raises ValueError for impossible
    counts.
    """
    caught_at_least, mistaken_at_most = _pessimistic(caught, members, mistaken, others, confidence)
    bounds = [0.0]
    for gained, lost in ((caught_at_least, mistaken_at_most), (1 - mistaken_at_most, 1 - caught_at_least)):
        if gained > delta:
            bounds.append(math.log((gained - delta) / lost))
    return max(bounds)


def gaussian_bound(
    caught: int, members: int, mistaken: int, others: int, delta: float, confidence: float = 0.95
) -> float:
    """As `membership_bound`, of a mechanism that is claimed to be a Gaussian one: it says much more about the noise.

    If noise with standard deviation 1 / mu times the sensitivity is all that there is, then Phi^-1(t) - Phi^-1(f) <= mu
    for every test (Dong, Roth and Su 2022); the epsilon is that of the smallest mu that is not refuted (Nasr et al.,
    "Tight auditing of differentially private machine learning", 2023). Raises ValueError for impossible counts.
    """
    caught_at_least, mistaken_at_most = _pessimistic(caught, members, mistaken, others, confidence)
    mu = float(norm.ppf(caught_at_least) - norm.ppf(mistaken_at_most))
    return total_epsilon([GaussianRelease("", 0, 1 / mu)], delta) if mu > 0 else 0.0


def _pessimistic(caught: int, members: int, mistaken: int, others: int, confidence: float) -> tuple[float, float]:
    """The lower end of the interval of the one probability, and the upper end of that of the other."""
    if not (0 <= caught <= members and 0 <= mistaken <= others and members and others):
        raise ValueError(f"{caught} of {members} and {mistaken} of {others} makes no sense")
    error = (1 - confidence) / 2
    caught_at_least = float(beta.ppf(error, caught, members - caught + 1)) if caught else 0.0
    mistaken_at_most = float(beta.ppf(1 - error, mistaken + 1, others - mistaken)) if mistaken < others else 1.0
    return caught_at_least, mistaken_at_most


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest epsilon that is refuted; 0 where none is. What is refuted once is for every smaller one."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
