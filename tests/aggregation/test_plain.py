"""Plain averaging against the mean in float64, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.aggregation.factory import client_aggregation, server_aggregation
from pfedsecure.aggregation.plain import MAX_WEIGHT, PlainAggregation
from pfedsecure.errors import MessageRejected
from pfedsecure.plan import Plan
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainContribution, Tensor

SHAPE = (2, 3)


def mean(contexts: list[np.ndarray], weights: list[int]) -> np.ndarray:
    """The weighted mean, one number after the other."""
    result = np.zeros(SHAPE)
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            products = [float(context[i, j]) * weight for context, weight in zip(contexts, weights, strict=True)]
            result[i, j] = sum(products) / sum(weights)
    return result


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-30, 0.02, 1.0, 1e6]),
    weights=st.lists(st.integers(1, MAX_WEIGHT), min_size=1, max_size=8),
)
def test_the_aggregate_is_the_weighted_mean(seed: int, scale: float, weights: list[int]) -> None:
    contexts = [row.astype(np.float32) for row in np.random.default_rng(seed).normal(0, scale, (len(weights), *SHAPE))]
    aggregation = PlainAggregation(SHAPE, math.inf)
    contributions = {
        f"client-{row}": aggregation.contribution(context, weight)
        for row, (context, weight) in enumerate(zip(contexts, weights, strict=True))
    }
    for contribution in contributions.values():
        aggregation.check(contribution)
    aggregate = aggregation.combine(contributions)
    assert aggregate.total_weight == sum(weights)
    assert aggregate.context.dtype == np.float32
    # Each weighted context and the mean are rounded to float32 once: 2^-24 of the largest term each.
    largest = max(np.abs(context).max() for context in contexts)
    np.testing.assert_allclose(aggregate.context, mean(contexts, weights), rtol=0, atol=2**-22 * largest)


@given(st.permutations(range(6)), st.integers(0, 2**32 - 1))
def test_the_order_of_arrival_changes_no_bit(order: list[int], seed: int) -> None:
    aggregation = PlainAggregation(SHAPE, math.inf)
    contexts = np.random.default_rng(seed).normal(size=(6, *SHAPE)).astype(np.float32)
    contributions = {f"client-{row}": aggregation.contribution(contexts[row], row + 1) for row in range(6)}
    shuffled = {f"client-{row}": contributions[f"client-{row}"] for row in order}
    straight = aggregation.combine(contributions).context
    np.testing.assert_array_equal(aggregation.combine(shuffled).context, straight)


def test_a_single_contribution_comes_back_and_the_same_work_gives_the_same_bytes() -> None:
    aggregation = PlainAggregation(SHAPE, math.inf)
    context = np.arange(6, dtype=np.float32).reshape(SHAPE)
    contribution = aggregation.contribution(context, 4)  # a power of two: the product is exact
    assert contribution == aggregation.contribution(context.copy(), 4)
    np.testing.assert_array_equal(aggregation.combine({"anna": contribution}).context, context)


def test_numbers_at_the_limits_of_float32_do_not_overflow_in_the_sum() -> None:
    aggregation = PlainAggregation(SHAPE, math.inf)
    huge = np.full(SHAPE, np.finfo(np.float32).max, np.float32)
    combined = aggregation.combine({name: aggregation.contribution(huge, 1) for name in "abcd"})
    np.testing.assert_array_equal(combined.context, huge)


@pytest.mark.parametrize(
    ("contribution", "message"),
    [
        (b"\xff", "the update is not a PlainContribution"),
        (b"", "weight 0 is not in 1..4294967295"),
        (PlainContribution(weight=MAX_WEIGHT + 1).SerializeToString(), "weight 4294967296 is not in"),
        (PlainContribution(weight=1).SerializeToString(), r"the update has shape \(\), expected \(2, 3\)"),
        (
            PlainContribution(weight=1, weighted_context=to_tensor(np.ones((3, 2), np.float32))).SerializeToString(),
            r"the update has shape \(3, 2\)",
        ),
        (
            PlainContribution(weight=1, weighted_context=Tensor(shape=SHAPE, data=b"x")).SerializeToString(),
            "the update has 1 bytes of data, expected 24",
        ),
        (
            PlainContribution(
                weight=1, weighted_context=to_tensor(np.full(SHAPE, np.nan, np.float32))
            ).SerializeToString(),
            "the update holds numbers that are not finite",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(contribution: bytes, message: str) -> None:
    with pytest.raises(MessageRejected, match=message):
        PlainAggregation(SHAPE, math.inf).check(contribution)


@pytest.mark.parametrize(("value", "weight"), [(3e38, 1), (41, 1), (41, 1000)])
def test_an_update_over_the_norm_is_refused_whatever_its_weight(value: float, weight: int) -> None:
    """One member's huge numbers in the mean would make everybody's training diverge."""
    aggregation = PlainAggregation(SHAPE, 100.0)
    with pytest.raises(MessageRejected, match=r"the update has norm .*, over the plan's prompt\.max_norm 100"):
        aggregation.check(aggregation.contribution(np.full(SHAPE, value, np.float32), weight))
    aggregation.check(aggregation.contribution(np.full(SHAPE, 40, np.float32), weight))


def test_the_plan_chooses_both_sides() -> None:
    plan = Plan(class_names=("cat", "dog"))
    context = np.ones(SHAPE, np.float32)
    contribution = client_aggregation(plan, SHAPE).contribution(context, 1)
    np.testing.assert_array_equal(server_aggregation(plan, SHAPE).combine({"anna": contribution}).context, context)
