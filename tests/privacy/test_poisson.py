"""Poisson samples: who is in, how often, and independently of whom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from pfedsecure.privacy.poisson import poisson_sample

Streams = Callable[[int], Callable[[int], bytes]]


def test_sizes_are_binomial_and_everybody_is_drawn_equally_often(stream: Streams) -> None:
    size, rate, times = 40, 0.3, 4000
    entropy = stream(1)
    drawn = np.zeros((times, size), bool)
    for row in drawn:
        row[poisson_sample(size, rate, entropy)] = True
    each = drawn.sum(axis=0)
    assert stats.chi2.sf(((each - rate * times) ** 2 / (rate * (1 - rate) * times)).sum(), size) > 1e-4
    # A batch of a fixed size, which is what accountants are often fed with, would have no variance at all.
    sizes = drawn.sum(axis=1)
    assert sizes.var() == pytest.approx(size * rate * (1 - rate), rel=0.1)
    together = np.corrcoef(drawn.T.astype(float))[~np.eye(size, dtype=bool)]
    assert np.abs(together).max() < 6 / np.sqrt(times)


def test_the_border_of_the_rate_is_exact() -> None:
    words = np.array([0, 2**62 - 1, 2**62, 2**63, 2**64 - 1], "<u8")
    assert poisson_sample(5, 0.25, lambda count: words.tobytes()[:count]).tolist() == [0, 1]
    assert poisson_sample(5, 0.0, lambda count: words.tobytes()).tolist() == []
    assert poisson_sample(5, 1 - 2**-53, lambda count: words.tobytes()).tolist() == [0, 1, 2, 3]
    assert poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(0, 0.5).tolist() == []


def test_the_operating_system_is_the_default() -> None:
    assert poisson_sample(200, 0.5).tolist() != poisson_sample(200, 0.5).tolist()


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_bad_rates_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="no sense"):
        poisson_sample(5, bad)
