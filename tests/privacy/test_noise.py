"""Rounded Gaussian noise against the exact distribution in 60 digits, and at the borders of its table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from scipy import stats

from pfedsecure.privacy import noise
from pfedsecure.privacy.noise import MAX_SIGMA, RoundedGaussian

BITS = 63


def stream(seed: int) -> Callable[[int], bytes]:
    """Entropy that repeats: the bytes of SHAKE-256, piece after piece."""
    piece = 0

    def read(count: int) -> bytes:
        nonlocal piece
        piece += 1
        return hashlib.shake_256(f"{seed}/{piece}".encode()).digest(count)

    return read


def pieces(*parts: bytes) -> Callable[[int], bytes]:
    """Entropy that must be asked for exactly these parts."""
    left = list(parts)

    def read(count: int) -> bytes:
        part = left.pop(0)
        assert len(part) == count
        return part

    return read


def word(leading: int, sign: int = 0) -> bytes:
    return ((leading << 1) | sign).to_bytes(8, "little")


def exact_tail(k: int, sigma: float) -> mpmath.mpf:
    """P(|N| > k - 1/2)."""
    return mpmath.erfc((mpmath.mpf(2 * k - 1) / 2) / (mpmath.mpf(sigma) * mpmath.sqrt(2)))


def probabilities(sigma: float, values: np.ndarray) -> np.ndarray:
    """P(round(N) = v)."""
    return np.diff(stats.norm.cdf(np.append(values - 0.5, values[-1] + 0.5) / sigma))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 40.0])
def test_draws_have_the_distribution_that_they_should(sigma: float) -> None:
    draws = RoundedGaussian(sigma).sample(400_000, stream(1))
    reach = max(int(3 * sigma), 1)
    inside = np.arange(-reach, reach + 1)
    observed = np.array([np.sum(draws == value) for value in inside])
    observed = np.concatenate([[np.sum(draws < -reach)], observed, [np.sum(draws > reach)]])
    tail = stats.norm.sf((reach + 0.5) / sigma)
    expected = np.concatenate([[tail], probabilities(sigma, inside), [tail]]) * len(draws)
    enough = expected > 5
    statistic = float((((observed - expected) ** 2) / expected)[enough].sum())
    assert stats.chi2.sf(statistic, int(enough.sum()) - 1) > 1e-4
    assert observed[~enough].sum() < 30


def test_large_noise_has_its_moments_and_no_correlation() -> None:
    sigma = 2.0**17
    draws = RoundedGaussian(sigma).sample(200_000, stream(2)) / sigma
    assert abs(draws.mean()) < 5 / math.sqrt(len(draws))
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / len(draws))
    assert abs((draws**4).mean() - 3) < 5 * math.sqrt(96 / len(draws))
    assert abs((draws[1:] * draws[:-1]).mean()) < 5 / math.sqrt(len(draws))
    assert stats.kstest(draws, "norm").pvalue > 1e-4


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 3.7, 300.0])
def test_the_table_is_right_at_every_place(sigma: float) -> None:
    table = RoundedGaussian(sigma)._table
    with mpmath.workdps(60):
        exact = [exact_tail(k, sigma) * 2**BITS for k in range(len(table), 0, -1)]
        worst = max(abs(int(entry) - value) for entry, value in zip(table, exact, strict=True))
        assert worst < noise._MARGIN / 8
        assert exact[0] < noise._MARGIN


@pytest.mark.parametrize(
    ("k", "sigma"), [(1, 0.5), (1, 1e6), (3, 1.0), (9, 1.0), (16, 1.0), (70_000, 2.0**13), (1, 0.04)]
)
def test_exact_tails_are_exact(k: int, sigma: float) -> None:
    with mpmath.workdps(120):
        assert abs(mpmath.mpf(str(noise._exact_tail(k, sigma))) - exact_tail(k, sigma)) < mpmath.mpf(2) ** -195


@pytest.mark.parametrize("k", [1, 2, 5])
def test_at_a_border_of_the_table_all_191_bits_decide(k: int) -> None:
    sigma = 1.3
    with mpmath.workdps(100):
        border = int(mpmath.floor(exact_tail(k, sigma) * 2 ** (BITS + 128)))  # the last U below T(k)
    gaussian = RoundedGaussian(sigma)
    for numerator, magnitude in ((border, k), (border + 1, k - 1)):
        leading, more = divmod(numerator, 2**128)
        for sign in (0, 1):
            drawn = gaussian.sample(1, pieces(word(leading, sign), more.to_bytes(16, "big")))
            assert drawn.tolist() == [-magnitude if sign else magnitude]


def test_far_tails_are_drawn_too() -> None:
    gaussian = RoundedGaussian(10.0)
    ones = bytes([255]) * 16
    with mpmath.workdps(60):
        for leading in (0, 1, 2**10, 2**18):
            magnitude = int(gaussian.sample(1, pieces(word(leading), ones))[0])
            uniform = mpmath.mpf(((leading + 1) << 128) - 1) / mpmath.mpf(2) ** (BITS + 128)
            assert exact_tail(magnitude + 1, 10.0) <= uniform < exact_tail(magnitude, 10.0)
    assert gaussian.sample(1, pieces(word(0), bytes(16))).tolist() == [170]  # as far as it goes: T < 2**-212 beyond
    assert gaussian.sample(1, pieces(word(2**BITS - 1))).tolist() == [0]


def test_few_draws_take_the_slow_way() -> None:
    asked: list[int] = []
    source = stream(3)

    def entropy(count: int) -> bytes:
        asked.append(count)
        return source(count)

    RoundedGaussian(MAX_SIGMA / 16).sample(300_000, entropy)
    assert asked[0] == 8 * 300_000
    assert len(asked) <= 4  # one in 2**24 is expected to


def test_without_noise_worth_the_name_there_is_none() -> None:
    assert not RoundedGaussian(1e-3).sample(1000).any()


def test_the_operating_system_is_the_default() -> None:
    gaussian = RoundedGaussian(1000.0)
    assert not np.array_equal(gaussian.sample(64), gaussian.sample(64))
    assert gaussian.sample(0).shape == (0,)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, MAX_SIGMA * 1.01])
def test_bad_sigmas_are_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        RoundedGaussian(sigma)


def test_a_machine_that_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = math.erfc
    noise._table.cache_clear()
    monkeypatch.setattr(noise.math, "erfc", lambda x: right(x) * (1 + 1e-12))
    with pytest.raises(RuntimeError, match="not accurate enough"):
        RoundedGaussian(5.0)
