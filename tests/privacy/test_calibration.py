"""The closed form against the privacy loss itself, integrated, and against 60 digits."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.privacy.calibration import analytic_sigma, gaussian_delta

EPSILONS = [0.0, 0.01, 0.1, 1.0, 8.0, 32.0, 500.0, 2000.0]


def integrated_delta(sigma: float, epsilon: float, sensitivity: float) -> float:
    """E[(1 - e^(epsilon - L))+] over the privacy loss L, which is normal with mean mu and variance 2 mu."""
    mean = (sensitivity / sigma) ** 2 / 2
    deviation = math.sqrt(2 * mean)
    low = max(epsilon, mean - 12 * deviation)
    loss = np.linspace(low, mean + 12 * deviation, 2_000_001)
    if loss[0] >= loss[-1]:
        return 0.0
    density = np.exp(-(((loss - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
    below = 0.5 * math.erfc((mean - low) / (deviation * math.sqrt(2)))  # nothing of it is lost: 12 deviations away
    assert low == epsilon or below < 1e-30
    return float(np.trapezoid(density * -np.expm1(epsilon - loss), loss))


def exact_delta(multiplier: float, epsilon: float) -> float:
    with mpmath.workdps(60):
        sigma, eps = mpmath.mpf(multiplier), mpmath.mpf(epsilon)
        half, shift = 1 / (2 * sigma), eps * sigma
        return float(mpmath.ncdf(half - shift) - mpmath.exp(eps) * mpmath.ncdf(-half - shift))


@pytest.mark.parametrize(
    ("sigma", "epsilon", "sensitivity"), [(0.7, 8, 1), (4, 1, 1), (4, 1, 2), (50, 0, 3), (9, 3, 9)]
)
def test_delta_is_the_integral_over_the_privacy_loss(sigma: float, epsilon: float, sensitivity: float) -> None:
    expected = integrated_delta(sigma, epsilon, sensitivity)
    assert gaussian_delta(sigma, epsilon, sensitivity) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("multiplier", [1e-3, 0.01, 0.1, 0.5, 1.0, 3.7, 30.0, 1000.0])
def test_delta_is_right_to_the_last_digits_that_matter(multiplier: float, epsilon: float) -> None:
    expected = exact_delta(multiplier, epsilon)
    if expected > 1e-300:
        assert gaussian_delta(3 * multiplier, epsilon, 3) == pytest.approx(expected, rel=1e-10)
    else:
        assert gaussian_delta(3 * multiplier, epsilon, 3) <= 1e-300


def test_values_known_elsewhere() -> None:
    # The root of the formula in 60 digits.
    assert analytic_sigma(1.0, 1e-5, 1.0) == pytest.approx(3.730632, abs=1e-6)
    # At epsilon 0 delta is the total variation distance of two normal distributions.
    assert gaussian_delta(1.0, 0.0, 1.0) == pytest.approx(math.erf(1 / math.sqrt(8)), rel=1e-14)


@given(st.floats(0.001, 100), st.floats(1e-12, 0.4), st.floats(1e-3, 1e6))
def test_sigma_is_the_smallest_that_will_do(epsilon: float, delta: float, sensitivity: float) -> None:
    sigma = analytic_sigma(epsilon, delta, sensitivity)
    assert gaussian_delta(sigma, epsilon, sensitivity) <= delta
    assert gaussian_delta(sigma * (1 - 1e-6), epsilon, sensitivity) > delta


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
@pytest.mark.parametrize("epsilon", [0.01, 0.3, 0.99])
def test_the_classical_sigma_is_larger(epsilon: float, delta: float) -> None:
    assert analytic_sigma(epsilon, delta, 2.0) < 2.0 * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, 0.0])
def test_nonsense_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="sensitivity"):
        analytic_sigma(1.0, 1e-5, bad)
    with pytest.raises(ValueError, match="delta"):
        analytic_sigma(1.0, bad, 1.0)
    with pytest.raises(ValueError, match="sigma"):
        gaussian_delta(bad, 1.0, 1.0)
    if bad != 0:
        with pytest.raises(ValueError, match="epsilon"):
            analytic_sigma(bad, 1e-5, 1.0)
        with pytest.raises(ValueError, match="epsilon"):
            gaussian_delta(1.0, bad, 1.0)
    with pytest.raises(ValueError, match="delta"):
        analytic_sigma(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no usable noise"):
        analytic_sigma(0.0, 1e-12, 1.0)
