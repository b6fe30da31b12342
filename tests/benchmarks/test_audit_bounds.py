"""The bounds of the audit: against slow versions of the theorems, and against mechanisms whose epsilon is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from pfed_benchmarks.audit_bounds import gaussian_bound, membership_bound, one_run_bound

from pfedsecure.privacy.calibration import analytic_sigma, gaussian_delta

SIMULATIONS = 2000
OFTEN_ENOUGH = 0.05 + 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)
"""Of so many bounds at 95 %, a share that hardly more are too large."""


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 of Steinke et al. as it is written: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i."""
    heads = math.exp(epsilon) / (1 + math.exp(epsilon))
    probabilities = [
        math.comb(guesses, k) * heads**k * (1 - heads) ** (guesses - k) if 0 <= k <= guesses else 0.0
        for k in range(guesses + 1)
    ]
    beta = math.fsum(probabilities[right:])
    alpha = max((math.fsum(probabilities[max(right - i, 0) : right]) / i for i in range(1, canaries + 1)), default=0)
    return beta + 2 * canaries * delta * alpha


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("canaries", "guesses", "right"), [(30, 30, 30), (60, 20, 18), (100, 50, 40), (40, 40, 21)])
def test_the_one_run_bound_is_that_of_the_theorem(canaries: int, guesses: int, right: int, delta: float) -> None:
    """Up to it every epsilon is refuted, and right above it none is."""
    bound = one_run_bound(canaries, guesses, right, delta)
    below = np.arange(0.0, bound - 1e-3, 0.02)
    assert all(p_value(canaries, guesses, right, epsilon, delta) < 0.05 for epsilon in below)
    assert p_value(canaries, guesses, right, bound + 1e-3, delta) >= 0.05


@pytest.mark.parametrize("guesses", [10, 50, 200])
def test_all_guesses_right_without_delta_is_a_closed_form(guesses: int) -> None:
    """(e^eps / (1 + e^eps))^r = 0.05."""
    heads = 0.05 ** (1 / guesses)
    assert one_run_bound(guesses, guesses, guesses, 0.0) == pytest.approx(math.log(heads / (1 - heads)), abs=1e-3)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
def test_of_randomised_response_the_bound_is_hardly_ever_too_large(epsilon: float, delta: float) -> None:
    """With probability delta a coin is shown outright, and else told rightly with probability e^eps / (1 + e^eps).

    That is (epsilon, delta), for nothing less. The adversary guesses 60 of 200 coins, those that were shown first.
    """
    rng, canaries, guesses = np.random.default_rng(1), 200, 60
    shown = np.minimum(rng.binomial(canaries, delta, size=SIMULATIONS), guesses)
    right = shown + rng.binomial(guesses - shown, 1 / (1 + math.exp(-epsilon)))
    bounds = {int(count): one_run_bound(canaries, guesses, int(count), delta) for count in np.unique(right)}
    assert np.mean([bounds[int(count)] > epsilon for count in right]) <= OFTEN_ENOUGH


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_of_randomised_response_the_bound_is_close(epsilon: float) -> None:
    heads = 1 / (1 + math.exp(-epsilon))
    right = np.random.default_rng(1).binomial(1000, heads, size=200)
    bounds = [one_run_bound(1000, 1000, int(count), 0.0) for count in right]
    # As far below as the quantile of the binomial distribution, in log odds, that 95 % takes.
    assert np.median(bounds) > epsilon - 1.25 * 1.645 / math.sqrt(1000 * heads * (1 - heads))


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_of_gaussian_noise_on_coins_a_third_of_epsilon_is_seen_and_never_more_than_all(epsilon: float) -> None:
    """Guessing those that are furthest out: what `coins` can come to at its best, with noise that keeps its promise."""
    rng = np.random.default_rng(3)
    sigma = analytic_sigma(epsilon, 1e-5, 1.0)
    bounds = []
    for _ in range(20):
        coins = rng.integers(2, size=16000)
        order = np.argsort(coins + sigma * rng.normal(size=16000))
        right = int((1 - coins[order[:1600]]).sum() + coins[order[-1600:]].sum())
        bounds.append(one_run_bound(16000, 3200, right, 1e-5))
    assert 0.3 * epsilon < np.median(bounds)
    assert max(bounds) < epsilon


def test_delta_takes_something_off_and_no_right_guess_gives_nothing() -> None:
    assert one_run_bound(1000, 100, 100, 1e-3) < one_run_bound(1000, 100, 100, 1e-5) < one_run_bound(100, 100, 100, 0)
    assert one_run_bound(100, 50, 25, 0.0) == one_run_bound(100, 50, 0, 1e-5) == 0.0


def test_more_right_guesses_never_refute_less() -> None:
    bounds = [one_run_bound(100, 50, right, 1e-5) for right in range(51)]
    assert bounds == sorted(bounds)


def at_least(count: int, of: int, probability: float) -> float:
    return math.fsum(math.comb(of, k) * probability**k * (1 - probability) ** (of - k) for k in range(count, of + 1))


def ends(count: int, of: int, error: float) -> tuple[float, float]:
    """Of a probability: the smallest that such a count, or a larger one, has at least a chance `error` under; and the
    largest that such a count, or a smaller one, has. By bisection."""
    least = bisected(lambda p: at_least(count, of, p) < error)
    most = bisected(lambda p: 1 - at_least(count + 1, of, p) >= error)
    return least, most


def bisected(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@pytest.mark.parametrize("counts", [(30, 30, 0, 30), (25, 30, 4, 40), (9, 50, 0, 50), (50, 50, 41, 50), (9, 30, 9, 30)])
@pytest.mark.parametrize("delta", [0.0, 1e-2])
def test_the_membership_bound_is_that_of_exact_intervals(counts: tuple[int, int, int, int], delta: float) -> None:
    caught, members, mistaken, others = counts
    t, f = ends(caught, members, 0.025)[0], ends(mistaken, others, 0.025)[1]
    expected = max(0.0, *(math.log(max(a - delta, 1e-300) / b) for a, b in ((t, f), (1 - f, 1 - t))))
    assert membership_bound(*counts, delta) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.0, 0.02])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_of_a_mechanism_with_that_trade_off_the_membership_bound_is_hardly_ever_too_large(
    epsilon: float, delta: float
) -> None:
    """As above: shown with probability delta, and else told with randomised response. f has no part of delta."""
    rng, right = np.random.default_rng(2), 1 / (1 + math.exp(-epsilon))
    caught = rng.binomial(100, delta + (1 - delta) * right, size=SIMULATIONS)
    mistaken = rng.binomial(100, (1 - delta) * (1 - right), size=SIMULATIONS)
    bounds = [membership_bound(int(t), 100, int(f), 100, delta) for t, f in zip(caught, mistaken, strict=True)]
    assert np.mean(np.array(bounds) > epsilon) <= OFTEN_ENOUGH


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_gaussian_bound_is_close_and_hardly_ever_too_large(epsilon: float) -> None:
    """A test at the middle of two normal distributions that are 1 / sigma apart."""
    sigma = analytic_sigma(epsilon, 1e-5, 1.0)
    right = 0.5 * math.erfc(-0.5 / sigma / math.sqrt(2))
    rng = np.random.default_rng(4)
    caught, mistaken = rng.binomial(2000, right, size=300), rng.binomial(2000, 1 - right, size=300)
    bounds = [gaussian_bound(int(t), 2000, int(f), 2000, 1e-5) for t, f in zip(caught, mistaken, strict=True)]
    assert np.mean(np.array(bounds) > epsilon) <= 0.09  # 0.05, and three standard errors of 300
    assert np.median(bounds) > 0.5 * epsilon


def test_the_gaussian_bound_is_the_epsilon_of_so_much_noise() -> None:
    least = 0.025 ** (1 / 30)
    mu = 2 * math.sqrt(2) * inverse_erf(2 * least - 1)
    bound = gaussian_bound(30, 30, 0, 30, 1e-5)
    assert gaussian_delta(1 / mu, bound, 1.0) == pytest.approx(1e-5, rel=1e-3)
    assert gaussian_bound(15, 30, 15, 30, 1e-5) == 0.0


def inverse_erf(value: float) -> float:
    return 5 * bisected(lambda half: math.erf(5 * half) < value)


def test_impossible_counts_are_refused() -> None:
    for canaries, guesses, right in ((9, 2, 3), (8, 9, 1), (3, 2, -1)):
        with pytest.raises(ValueError, match="makes no sense"):
            one_run_bound(canaries, guesses, right, 0.0)
    for counts in ((3, 2, 0, 1), (0, 1, 2, 1), (0, 0, 0, 1), (0, 1, 0, 0)):
        for bound in (membership_bound, gaussian_bound):
            with pytest.raises(ValueError, match="makes no sense"):
                bound(*counts, 0.0)
