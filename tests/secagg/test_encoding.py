from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedsecure.errors import PlanError
from pfedsecure.secagg import Encoding, Parameters, Update

PARAMETERS = Parameters(values=4, clip=1.0, max_weight=1000, precision=1e-3)
METRICS = replace(PARAMETERS, metrics=("accuracy", "loss"))


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.integers(1, 1000)),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from([1e-3, 1e-9]),
    st.binary(min_size=160, max_size=160),
)
@settings(max_examples=80)
def test_the_error_stays_below_the_bound_whatever_the_rounding(inputs, precision: float, drawn: bytes) -> None:
    """Also with the worst that randomness can do: hypothesis picks it."""
    encoding = Encoding.of(replace(PARAMETERS, precision=precision), 10)
    assert encoding.bits == (32 if precision == 1e-3 else 64)
    total = np.zeros(encoding.length, encoding.dtype)
    for index, (numbers, weight) in enumerate(inputs):
        total += encoding.encode(
            Update(values(*numbers), weight), lambda count, i=index: drawn[16 * i : 16 * i + count]
        )
    mean = encoding.decode(total, len(inputs))
    assert mean is not None
    assert mean.total_weight == sum(weight for _, weight in inputs)
    exact = sum(np.clip(np.array(numbers), -1, 1) * weight for numbers, weight in inputs)
    assert (np.abs(mean.values * mean.total_weight - exact) < encoding.error_bound(len(inputs)) * (1 + 1e-9)).all()
    assert (np.abs(mean.values - exact / mean.total_weight) <= precision).all()


def test_extremes_of_the_largest_cohort_do_not_wrap() -> None:
    for clients, clip, max_weight, precision in (
        (4096, 4.0, 10_000, 1e-3),
        (3, 0.1, 1, 1e-3),
        (100, 1.0, 2**29 - 1, 1e-4),
    ):
        parameters = Parameters(4, clip, max_weight, precision)
        encoding = Encoding.of(parameters, clients)
        up = encoding.encode(Update(values(9, -9, 9, -9), max_weight), lambda count: bytes(count))
        total = up * encoding.dtype.type(clients)
        mean = encoding.decode(total, clients)
        assert mean is not None
        np.testing.assert_allclose(mean.values, [clip, -clip, clip, -clip], rtol=1e-3)
        # The next finer resolution would not have fitted.
        finer = clients * (max_weight * float(np.float32(clip)) * 2.0 ** (encoding.fraction_bits + 1) + 1)
        assert finer >= 2.0 ** min(encoding.bits - 1, 53)


def test_rounding_is_unbiased() -> None:
    encoding = Encoding.of(PARAMETERS, 4)
    value = np.float32(0.3 * encoding.step)
    parameters = replace(PARAMETERS, values=40_000)
    many = Encoding(parameters, 4, encoding.bits, encoding.fraction_bits)
    encoded = many.encode(Update(np.full(40_000, value, np.float32), 1), os.urandom)[:40_000]
    assert set(np.unique(encoded)) == {0, 1}
    assert abs(encoded.mean() - 0.3) < 6 * np.sqrt(0.21 / 40_000)


def test_whole_steps_and_weights_are_exact() -> None:
    encoding = Encoding.of(PARAMETERS, 5)
    numbers = values(0.5, -0.25, 1.0, 0.0)
    mean = encoding.decode(encoding.encode(Update(numbers, 999)), 1)
    assert mean is not None
    assert mean.values.tolist() == numbers.tolist()
    assert mean.total_weight == 999
    assert mean.metrics is None


def test_ring_grows_with_what_is_asked_for() -> None:
    assert Encoding.of(PARAMETERS, 100).bits == 32
    assert Encoding.of(replace(PARAMETERS, precision=1e-7), 100).bits == 64
    assert Encoding.of(replace(PARAMETERS, max_weight=2**25), 100).bits == 64
    with pytest.raises(
        PlanError, match=r"precision 1e-15 cannot be had with clip 1, max_weight 536870911 and 4096 clients"
    ):
        Encoding.of(replace(PARAMETERS, precision=1e-15, max_weight=2**29 - 1), 4096)


def test_clipping_is_counted() -> None:
    encoding = Encoding.of(PARAMETERS, 5)
    assert encoding.clipped(values(0.5, -1.5, 1.0, 2.0)) == 2


def test_metrics_are_weighted_means_of_those_who_send_them() -> None:
    encoding = Encoding.of(METRICS, 3)
    total = encoding.encode(Update(values(1, 1, 1, 1), 300, {"accuracy": 0.5, "loss": 1.0}))
    total = total + encoding.encode(Update(values(0, 0, 0, 0), 100, {"loss": 0.0, "accuracy": 1.0}))
    total = total + encoding.encode(Update(values(0, 0, 0, 0), 600))
    mean = encoding.decode(total, 3)
    assert mean is not None
    assert mean.metrics == {"accuracy": pytest.approx(0.625, abs=1e-5), "loss": pytest.approx(0.75, abs=1e-5)}
    assert (mean.total_weight, mean.metrics_weight) == (1000, 400)
    nobody = encoding.decode(encoding.encode(Update(values(0, 0, 0, 0), 600)), 1)
    assert nobody is not None
    assert nobody.metrics is None


def test_what_is_no_sum_is_refused() -> None:
    encoding = Encoding.of(METRICS, 3)
    good = encoding.encode(Update(values(1, 1, 1, 1), 300, {"accuracy": 0.5, "loss": 1.0}))
    assert encoding.decode(good, 1) is not None
    assert encoding.decode(good, 2) is None
    for place, wrong in (
        (-1, 2),
        (-2, 0),
        (4, 1001),
        (4, 0),
        (5, 301),
        (5, 2**32 - 1),
        (0, good[0] + 2),
        (7, good[7] * 2),
    ):
        changed = good.copy()
        changed[place] = wrong
        assert encoding.decode(changed, 1) is None
    noise = np.frombuffer(os.urandom(4 * encoding.length), np.uint32)
    assert encoding.decode(noise, 3) is None


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (Update(values(1, 2, 3), 1), r"float32 of shape \(4,\)"),
        (Update(np.zeros(4), 1), "float32 of shape"),
        (Update(values(1, 2, 3, 4), 0), r"weight 0 is not in 1\.\.1000"),
        (Update(values(1, 2, 3, 4), 1001), r"weight 1001 is not in 1\.\.1000"),
        (Update(values(1, 2, 3, float("nan")), 1), "must be finite"),
        (Update(values(1, 2, 3, 4), 1, {"accuracy": 1.0}), "metrics must be accuracy, loss"),
        (Update(values(1, 2, 3, 4), 1, {"accuracy": float("inf"), "loss": 0.0}), "must be finite"),
    ],
)
def test_updates_that_are_refused(update: Update, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding.of(METRICS, 3).encode(update)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": 0}, "values must be at least 1"),
        ({"clip": 0.0}, "clip and precision"),
        ({"precision": float("inf")}, "clip and precision"),
        ({"max_weight": 2**29}, "max_weight must be in"),
        ({"minimum_cohort": 2}, "minimum_cohort must be in 3"),
        ({"metrics": ("loss", "loss")}, "stands twice"),
    ],
)
def test_parameters_that_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PARAMETERS, **changes)


def test_every_parameter_counts_in_the_digest() -> None:
    changed = [
        replace(PARAMETERS, values=5),
        replace(PARAMETERS, clip=2.0),
        replace(PARAMETERS, max_weight=999),
        replace(PARAMETERS, precision=2e-3),
        replace(PARAMETERS, minimum_cohort=4),
        replace(PARAMETERS, metrics=("a",)),
        replace(PARAMETERS, metrics=("a", "b")),
        replace(PARAMETERS, complete_up_to=65),
        *(
            replace(PARAMETERS, assumptions=replace(PARAMETERS.assumptions, **{name: value}))
            for name, value in (("corrupt", 0.1), ("dropout", 0.1), ("security_bits", 41), ("correctness_bits", 21))
        ),
    ]
    assert len({parameters.digest() for parameters in [PARAMETERS, *changed]}) == len(changed) + 1
