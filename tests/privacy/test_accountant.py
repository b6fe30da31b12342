"""The accountant against closed forms, a Rényi bound and privacy losses that are convolved here, both ways round."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from scipy.signal import fftconvolve
from scipy.stats import norm

from pfedsecure.errors import BudgetTooSmall
from pfedsecure.privacy.accountant import MAX_NOISE_MULTIPLIER, epsilon, noise_multiplier
from pfedsecure.privacy.calibration import analytic_sigma, gaussian_delta
from pfedsecure.privacy.events import Event, GaussianRelease, SampledGaussianSteps

DELTA = 1e-5


def steps(sigma: float, rate: float, count: int, number: int = 1) -> SampledGaussianSteps:
    return SampledGaussianSteps("prompt and gate", number, sigma, rate, count)


def release(sigma: float) -> GaussianRelease:
    return GaussianRelease("number", 0, sigma)


# An oracle of its own: the privacy loss of every event on a grid of losses, convolved. Losses are rounded to the grid
# upwards, which gives an upper bound of epsilon, or downwards, which gives a lower one.

REACH, CELL = 24.0, 4e-4
GRID = np.arange(-round(REACH / CELL), round(REACH / CELL) + 1) * CELL


def loss_distribution(sigma: float, rate: float, removed: bool) -> np.ndarray:
    """P(loss <= l) for l in GRID; the loss of the output with the example against without it, or the reverse."""

    def position(loss: np.ndarray) -> np.ndarray:  # where log((1 - q) + q e^((2x - 1) / 2 sigma^2)) = loss
        with np.errstate(divide="ignore", invalid="ignore"):
            found = sigma**2 * np.log((np.expm1(loss) + rate) / rate) + 0.5
        return np.where(np.expm1(loss) + rate > 0, found, -np.inf)

    if removed:
        x = position(GRID)
        return (1 - rate) * norm.cdf(x / sigma) + rate * norm.cdf((x - 1) / sigma)
    return norm.sf(position(-GRID) / sigma)


def composed(events: list[tuple[float, float, int]], removed: bool, upwards: bool) -> tuple[np.ndarray, float]:
    """Probabilities of the summed loss on GRID, and that of an infinite loss."""

    def add(one: tuple[np.ndarray, float], other: tuple[np.ndarray, float]) -> tuple[np.ndarray, float]:
        full = np.maximum(fftconvolve(one[0], other[0]), 0)
        middle = len(GRID) // 2
        inside = full[middle : middle + len(GRID)].copy()
        inside[0] += full[:middle].sum()
        too_large = full[middle + len(GRID) :].sum()
        infinite = one[1] + other[1] - one[1] * other[1]
        return inside, infinite + too_large

    def repeated(one: tuple[np.ndarray, float], count: int) -> tuple[np.ndarray, float]:
        if count == 1:
            return one
        half = repeated(one, count // 2)
        doubled = add(half, half)
        return add(doubled, one) if count % 2 else doubled

    parts = []
    for sigma, rate, count in events:
        below = loss_distribution(sigma, rate, removed)
        mass = np.diff(below)
        probabilities = np.append(below[0], mass) if upwards else np.append(mass, 0.0)
        parts.append(repeated((probabilities, 1 - below[-1] if upwards else 0.0), count))
    return functools.reduce(add, parts)


def oracle(events: list[tuple[float, float, int]], removed: bool, upwards: bool, delta: float = DELTA) -> float:
    probabilities, infinite = composed(events, removed, upwards)

    def delta_of(eps: float) -> float:
        above = eps < GRID
        return infinite + float(probabilities[above] @ -np.expm1(eps - GRID[above]))

    low, high = 0.0, REACH
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle) <= delta else (middle, high)
    return high


CASES = [
    [(0.8, 0.1, 40)],
    [(1.0, 0.3, 16)],
    [(3.0, 0.5, 40)],
    [(2.0, 0.02, 60)],
    [(1.2, 0.2, 20), (2.0, 0.1, 20)],
    [(1.5, 0.2, 30), (6.0, 1.0, 1)],
]


@pytest.mark.parametrize("case", CASES)
def test_an_upper_bound_and_a_close_one(case: list[tuple[float, float, int]]) -> None:
    events: list[Event] = [steps(*one) if one[1] < 1 else release(one[0]) for one in case]
    found = epsilon(events, DELTA)
    assert oracle(case, removed=True, upwards=False) <= found
    assert found <= oracle(case, removed=True, upwards=True) + 0.03


@pytest.mark.parametrize("case", CASES)
def test_adding_an_example_is_no_worse_than_removing_one(case: list[tuple[float, float, int]]) -> None:
    events: list[Event] = [steps(*one) if one[1] < 1 else release(one[0]) for one in case]
    assert oracle(case, removed=False, upwards=True) <= epsilon(events, DELTA)


def test_the_oracle_knows_the_gaussian() -> None:
    case = [(4.0, 1.0, 5)]
    exact = epsilon([release(4 / math.sqrt(5))], DELTA)
    assert oracle(case, removed=True, upwards=False) <= exact <= oracle(case, removed=True, upwards=True)
    assert oracle(case, removed=True, upwards=True) - oracle(case, removed=True, upwards=False) < 6 * CELL


@pytest.mark.parametrize("sigma", [0.3, 1.0, 6.0, 90.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_plain_releases_have_the_closed_form(sigma: float, delta: float) -> None:
    found = epsilon([release(sigma)], delta)
    assert gaussian_delta(sigma, found, 1.0) <= delta
    assert found == 0 or gaussian_delta(sigma, found * (1 - 1e-6), 1.0) > delta
    together = epsilon([release(2 * sigma), steps(2 * sigma, 1.0, 2), release(2 * sigma)], delta)
    assert together == pytest.approx(found, rel=1e-7)


def test_every_sampled_event_counts_wherever_it_stands() -> None:
    rounds = [steps(1.5, 0.2, 6, number) for number in range(1, 6)]
    assert epsilon(rounds, DELTA) == epsilon([steps(1.5, 0.2, 30)], DELTA)
    assert epsilon(rounds[:4], DELTA) < epsilon(rounds, DELTA) < epsilon([*rounds, release(6.0)], DELTA)


def test_almost_no_sampling_is_the_plain_gaussian() -> None:
    assert epsilon([steps(6.0, 1 - 1e-9, 1)], DELTA) == pytest.approx(epsilon([release(6.0)], DELTA), abs=0.02)


def test_edges() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([steps(1.0, 0.0, 5), steps(1.0, 0.5, 0)], DELTA) == 0
    assert epsilon([steps(0.0, 0.5, 1)], DELTA) == math.inf
    assert epsilon([release(0.0), steps(1.0, 0.1, 3)], DELTA) == math.inf
    assert epsilon([steps(1e-200, 0.5, 1)], DELTA) == math.inf
    assert epsilon([steps(1e-4, 0.5, 1)], DELTA) > 1e6
    assert 0.1 < epsilon([steps(1.0, 0.001, 20_000)], 1e-8) < 2
    for bad in (steps(-1.0, 0.5, 1), steps(1.0, 1.5, 1), steps(math.nan, 0.5, 1), steps(1.0, 0.5, -1)):
        with pytest.raises(ValueError, match="no sense"):
            epsilon([bad], DELTA)
    for bad_delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            epsilon([], bad_delta)


def test_the_noise_that_is_solved_for_is_the_smallest() -> None:
    target = 2.0
    sigma = noise_multiplier(target, DELTA, 0.15, 60, besides=[release(30.0)])
    assert epsilon([release(30.0), steps(sigma, 0.15, 60)], DELTA) <= target
    assert epsilon([release(30.0), steps(sigma * 0.995, 0.15, 60)], DELTA) > target


def test_on_all_the_data_it_is_the_analytic_sigma() -> None:
    assert noise_multiplier(2.0, DELTA, 1.0, 1) == pytest.approx(analytic_sigma(2.0, DELTA, 1.0), rel=1.1e-3)


def test_the_impossible_says_what_is_possible() -> None:
    with pytest.raises(BudgetTooSmall, match=r"epsilon 0\.001 .* the smallest possible is ([0-9.]+)") as caught:
        noise_multiplier(0.001, DELTA, 0.2, 300)
    possible = float(str(caught.value).split("smallest possible is ")[1].split(",")[0])
    assert noise_multiplier(possible, DELTA, 0.2, 300) <= MAX_NOISE_MULTIPLIER
    with pytest.raises(BudgetTooSmall):
        noise_multiplier(1.0, DELTA, 0.2, 300, besides=[release(1.0)])
    with pytest.raises(ValueError, match="no sense"):
        noise_multiplier(0.0, DELTA, 0.2, 300)
