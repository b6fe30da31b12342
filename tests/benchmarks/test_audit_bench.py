"""The audit: its bounds against mechanisms whose epsilon is known, and that it finds a mechanism out that lies."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from pfed_benchmarks import audit
from pfed_benchmarks.audit_bounds import membership_bound, one_run_bound
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.tables import table_of


@pytest.mark.parametrize("guesses", [10, 50, 200])
def test_all_guesses_right_without_delta_is_a_closed_form(guesses: int) -> None:
    """(e^eps / (1 + e^eps))^r = 0.05."""
    heads = 0.05 ** (1 / guesses)
    assert one_run_bound(guesses, guesses, guesses, 0.0) == pytest.approx(math.log(heads / (1 - heads)), abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_of_randomised_response_the_bound_is_close_and_hardly_ever_too_large(epsilon: float) -> None:
    """Its epsilon is exact: every coin is told rightly with probability e^eps / (1 + e^eps)."""
    rng = np.random.default_rng(1)
    heads = 1 / (1 + math.exp(-epsilon))
    right = rng.binomial(1000, heads, size=200)
    bounds = [one_run_bound(1000, 1000, int(count), 0.0) for count in right]
    assert np.mean(np.array(bounds) > epsilon) <= 0.09  # 0.05, and three standard errors of 200
    # As far below as the quantile of the binomial distribution, in log odds, that 95 % takes.
    assert np.median(bounds) > epsilon - 1.25 * 1.645 / math.sqrt(1000 * heads * (1 - heads))


def test_delta_takes_something_off_and_no_right_guess_gives_nothing() -> None:
    assert one_run_bound(1000, 100, 100, 1e-3) < one_run_bound(1000, 100, 100, 1e-5) < one_run_bound(100, 100, 100, 0)
    assert one_run_bound(100, 50, 25, 0.0) == one_run_bound(100, 50, 0, 1e-5) == 0.0


def test_more_right_guesses_never_refute_less() -> None:
    bounds = [one_run_bound(100, 50, right, 1e-5) for right in range(51)]
    assert bounds == sorted(bounds)


def test_the_membership_bound_is_that_of_the_exact_intervals() -> None:
    """All right, of n each: t >= 0.025^(1/n), f <= 1 - 0.025^(1/n)."""
    least = 0.025 ** (1 / 30)
    assert membership_bound(30, 30, 0, 30, 0.0) == pytest.approx(math.log(least / (1 - least)))
    assert membership_bound(15, 30, 15, 30, 0.0) == 0.0
    assert membership_bound(10, 30, 0, 30, 0.0) == pytest.approx(membership_bound(30, 30, 20, 30, 0.0))


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_of_a_mechanism_with_that_trade_off_the_membership_bound_is_hardly_ever_too_large(epsilon: float) -> None:
    rng, right = np.random.default_rng(2), 1 / (1 + math.exp(-epsilon))
    caught, mistaken = rng.binomial(100, right, size=300), rng.binomial(100, 1 - right, size=300)
    bounds = [membership_bound(int(t), 100, int(f), 100, 0.0) for t, f in zip(caught, mistaken, strict=True)]
    assert np.mean(np.array(bounds) > epsilon) <= 0.09


def test_impossible_counts_are_refused() -> None:
    for canaries, guesses, right in ((9, 2, 3), (8, 9, 1), (3, 2, -1)):
        with pytest.raises(ValueError, match="makes no sense"):
            one_run_bound(canaries, guesses, right, 0.0)
    for counts in ((3, 2, 0, 1), (0, 1, 2, 1), (0, 0, 0, 1), (0, 1, 0, 0)):
        with pytest.raises(ValueError, match="makes no sense"):
            membership_bound(*counts, 0.0)


def test_without_privacy_and_without_noise_it_sees_who_was_in() -> None:
    """The second is a mechanism that claims epsilon 1 and draws a thousandth of the noise: it is found out."""
    assert float(str(audit.one_run("one step", None, 2, 1)["bound"])) > 1.0
    assert float(str(audit.one_run("one step", 1.0, 2, 1, noise=0.001)["bound"])) > 1.0


def test_what_keeps_its_promise_is_not_refuted() -> None:
    assert float(str(audit.one_run("one step", 1.0, 2, 1)["bound"])) <= 1.0


def test_bars_and_table() -> None:
    rows: list[Row] = [
        {"audit": kind, "setting": "one step", "epsilon": epsilon, "right": 3, "guesses": 4, "bound": bound}
        for kind, (epsilon, bound) in product(("one run", "membership"), ((None, 2.5), (8.0, 1.0), (1.0, 0.5)))
    ]
    outcome = Outcome(params={}, rows=rows, bars=audit.bars(rows))
    assert {name: bar.value for name, bar in outcome.bars.items()} == {
        "lower_bound_over_epsilon": 0.5,
        "lower_bound_at_inf": 2.5,
    }
    table = table_of(Report.of("audit", outcome))
    assert "| one run | one step | without privacy | 3 of 4 | 2.50 |" in table
    assert "| membership | one step | 8 | 3 of 4 | 1.00 |" in table
