"""Plain averaging against the mean in float64, written out."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.aggregation.factory import client_aggregation, server_aggregation
from pfedsecure.aggregation.interface import Aggregate, Contribution, RoundIdentity
from pfedsecure.aggregation.plain import MAX_WEIGHT, PlainClientAggregation, PlainServerAggregation
from pfedsecure.errors import MessageRejected
from pfedsecure.plan import Plan, ProtectionPlan
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainContribution, Tensor

SHAPE = (2, 3)
ROUND = RoundIdentity("0f" * 16, 7, "ab" * 32)
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def contribution_of(context: np.ndarray, weight: int) -> bytes:
    """What a client sends."""
    return PlainClientAggregation().begin(ROUND, Contribution(context, weight), lambda saved: None).message


def check(contribution: bytes, max_norm: float = math.inf) -> None:
    """What a server does when it arrives."""
    PlainServerAggregation(SHAPE, max_norm, 1).round(ROUND, {1: {}}).check(1, "anna", contribution, NOW)


def combined(contributions: dict[str, bytes]) -> Aggregate:
    """What a server makes of them."""
    return PlainServerAggregation(SHAPE, math.inf, 1).round(ROUND, {1: contributions}).result()


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
    contributions = {
        f"client-{row}": contribution_of(context, weight)
        for row, (context, weight) in enumerate(zip(contexts, weights, strict=True))
    }
    for contribution in contributions.values():
        check(contribution)
    aggregate = combined(contributions)
    assert aggregate.total_weight == sum(weights)
    assert aggregate.context.dtype == np.float32
    # Each weighted context and the mean are rounded to float32 once: 2^-24 of the largest term each.
    largest = max(np.abs(context).max() for context in contexts)
    np.testing.assert_allclose(aggregate.context, mean(contexts, weights), rtol=0, atol=2**-22 * largest)


@given(st.permutations(range(6)), st.integers(0, 2**32 - 1))
def test_the_order_of_arrival_changes_no_bit(order: list[int], seed: int) -> None:
    contexts = np.random.default_rng(seed).normal(size=(6, *SHAPE)).astype(np.float32)
    contributions = {f"client-{row}": contribution_of(contexts[row], row + 1) for row in range(6)}
    shuffled = {f"client-{row}": contributions[f"client-{row}"] for row in order}
    straight = combined(contributions).context
    np.testing.assert_array_equal(combined(shuffled).context, straight)


def test_a_single_contribution_comes_back_and_the_same_work_gives_the_same_bytes() -> None:
    context = np.arange(6, dtype=np.float32).reshape(SHAPE)
    contribution = contribution_of(context, 4)  # a power of two: the product is exact
    assert contribution == contribution_of(context.copy(), 4)
    np.testing.assert_array_equal(combined({"anna": contribution}).context, context)


def test_numbers_at_the_limits_of_float32_do_not_overflow_in_the_sum() -> None:
    huge = np.full(SHAPE, np.finfo(np.float32).max, np.float32)
    mean_of_huge = combined({name: contribution_of(huge, 1) for name in "abcd"})
    np.testing.assert_array_equal(mean_of_huge.context, huge)


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
        check(contribution)


@pytest.mark.parametrize(("value", "weight"), [(3e38, 1), (41, 1), (41, 1000)])
def test_an_update_over_the_norm_is_refused_whatever_its_weight(value: float, weight: int) -> None:
    """One member's huge numbers in the mean would make everybody's training diverge."""
    with pytest.raises(MessageRejected, match=r"the update has norm .*, over the plan's prompt\.max_norm 100"):
        check(contribution_of(np.full(SHAPE, value, np.float32), weight), 100.0)
    check(contribution_of(np.full(SHAPE, 40, np.float32), weight), 100.0)


def test_the_plan_chooses_both_sides() -> None:
    plan = Plan(class_names=("cat", "dog"), protection=ProtectionPlan(aggregation="plain"))
    context = np.ones(SHAPE, np.float32)
    client = client_aggregation(plan, SHAPE, None).begin(ROUND, Contribution(context, 1), lambda saved: None)
    server = server_aggregation(plan, SHAPE, None)
    assert (client.step, server.steps, server.input_step) == (1, 1, 1)
    assert len(client.message) <= server.max_message_bytes(1)
    np.testing.assert_array_equal(server.round(ROUND, {1: {"anna": client.message}}).result().context, context)


def test_there_is_no_second_step() -> None:
    client = PlainClientAggregation().begin(ROUND, Contribution(np.ones(SHAPE, np.float32), 1), lambda saved: None)
    with pytest.raises(MessageRejected, match="plain averaging has one step"):
        client.answer(b"", NOW)
    with pytest.raises(MessageRejected, match="there is no step 2"):
        PlainServerAggregation(SHAPE, math.inf, 1).round(ROUND, {1: {}}).request(2, "anna")


@pytest.mark.parametrize(("arrived", "ready"), [(1, False), (2, True), (3, True)])
def test_fewer_than_the_minimum_cohort_are_not_averaged(arrived: int, ready: bool) -> None:
    contributions = {f"client-{row}": contribution_of(np.ones(SHAPE, np.float32), 1) for row in range(arrived)}
    assert PlainServerAggregation(SHAPE, math.inf, 2).round(ROUND, {1: contributions}).ready(1) is ready


def test_a_client_that_crashed_sends_the_same_again() -> None:
    contribution, aggregation = Contribution(np.ones(SHAPE, np.float32), 3), PlainClientAggregation()
    first = aggregation.begin(ROUND, contribution, lambda saved: None).message
    assert aggregation.restore(b"", ROUND, contribution, lambda saved: None, NOW).message == first
