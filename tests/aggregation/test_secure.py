"""Secure aggregation against plain averaging and against the mean in float64."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from pfedsecure.aggregation.factory import client_aggregation, server_aggregation
from pfedsecure.aggregation.interface import Contribution, RoundIdentity, RoundLost
from pfedsecure.aggregation.plain import PlainClientAggregation, PlainServerAggregation
from pfedsecure.aggregation.secure import parameters
from pfedsecure.errors import MessageRejected, PlanError, ProtectionUnavailable, StateError
from pfedsecure.plan import Plan
from pfedsecure.secagg import Encoding
from pfedsecure.wire.tensors import check_norm
from pfedsecure.wire.v1.secagg_pb2 import MaskedInput, Unmasking

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
STEPS = range(1, 6)


def names(clients: int) -> list[str]:
    return [f"c{number:02d}" for number in range(clients)]


def contributions(clients: int, *, seed: int = 0, largest_weight: int = 1000) -> dict[str, Contribution]:
    generator = np.random.default_rng(seed)
    return {
        name: Contribution(
            generator.uniform(-1, 1, SHAPE).astype(np.float32), int(generator.integers(1, largest_weight + 1))
        )
        for name in names(clients)
    }


def oracle(chosen: dict[str, Contribution], max_weight: int = 10_000) -> np.ndarray:
    """The weighted mean in float64."""
    weights = [min(contribution.weight, max_weight) for contribution in chosen.values()]
    contexts = [contribution.context.astype(np.float64) for contribution in chosen.values()]
    return np.average(contexts, axis=0, weights=weights)


def bound(plan: Plan, clients: int, chosen: dict[str, Contribution]) -> float:
    """What fixed point may add to the mean of `chosen` in a cohort of `clients`, and the rounding to float32."""
    weight = sum(min(contribution.weight, plan.secure_aggregation.max_weight) for contribution in chosen.values())
    encoding = Encoding.of(parameters(plan, SHAPE), clients)
    return encoding.error_bound(len(chosen)) / weight + 2.0**-24 * plan.secure_aggregation.clip


@pytest.mark.parametrize(
    ("clients", "settings"),
    [
        (3, {}),
        (5, {"precision": 1e-8}),
        (4, {"clip": 0.9999999, "max_weight": 700}),
        (7, {"precision": 0.01, "max_weight": 2**20}),
    ],
)
def test_the_mean_is_that_of_plain_averaging(
    secure_plan: MakePlan, secure_round: Any, clients: int, settings: dict[str, Any]
) -> None:
    plan = secure_plan(**settings)
    max_weight = plan.secure_aggregation.max_weight
    chosen = contributions(clients, seed=clients)
    aggregate = secure_round(plan, chosen).run()
    allowed = bound(plan, clients, chosen)
    assert allowed < plan.secure_aggregation.precision + 2.0**-23
    np.testing.assert_allclose(aggregate.context, oracle(chosen, max_weight), rtol=0, atol=allowed)
    identity = RoundIdentity("id", 1, "")
    capped = {name: Contribution(one.context, min(one.weight, max_weight)) for name, one in chosen.items()}
    plain = PlainServerAggregation(SHAPE, 100.0, 1).round(
        identity,
        {
            1: {
                name: PlainClientAggregation().begin(identity, one, lambda saved: None).message
                for name, one in capped.items()
            }
        },
    )
    np.testing.assert_allclose(aggregate.context, plain.result().context, rtol=0, atol=allowed + 2.0**-22)
    assert aggregate.total_weight == plain.result().total_weight == sum(one.weight for one in capped.values())
    assert aggregate.context.dtype == np.float32
    assert (aggregate.metrics, aggregate.culprits) == (None, ())


def test_no_weight_counts_for_more_than_the_plan_allows(secure_plan: MakePlan, secure_round: Any) -> None:
    plan = secure_plan(max_weight=100, precision=1e-6)
    ones = np.ones(SHAPE, np.float32)
    chosen = {
        "c00": Contribution(ones, 100),
        "c01": Contribution(-ones, 1_000_000),
        "c02": Contribution(np.zeros(SHAPE, np.float32), 1),
    }
    aggregate = secure_round(plan, chosen).run()
    assert aggregate.total_weight == 201
    np.testing.assert_allclose(aggregate.context, 0, rtol=0, atol=bound(plan, 3, chosen))


def test_numbers_are_clipped_to_what_the_plan_says(secure_plan: MakePlan, secure_round: Any) -> None:
    plan = secure_plan(clip=0.5, precision=1e-6)
    chosen = {name: Contribution(np.full(SHAPE, 7.0, np.float32), 1) for name in names(3)}
    np.testing.assert_allclose(secure_round(plan, chosen).run().context, 0.5, rtol=0, atol=1e-6)


def test_one_client_cannot_bring_the_mean_over_the_norm_that_everybody_refuses(
    secure_plan: MakePlan, secure_round: Any
) -> None:
    """Each of its numbers is within the clip, and it counts for as much as it may."""
    plan = secure_plan(clip=4.0, max_norm=3.0)
    chosen = contributions(3, largest_weight=30)
    chosen["c01"] = Contribution(np.full(SHAPE, 4.0, np.float32), 10_000)
    mean = oracle(chosen)
    assert np.linalg.norm(mean) > 9
    context = secure_round(plan, chosen).run().context
    check_norm(context, plan.prompt.max_norm, "the mean")
    np.testing.assert_allclose(context, mean * (3 / np.linalg.norm(mean)), rtol=0, atol=bound(plan, 3, chosen))


def test_metrics_are_the_means_of_those_who_told(secure_plan: MakePlan, secure_round: Any) -> None:
    plan = secure_plan(metrics=True, precision=1e-6)
    told = {
        "c00": {"test_accuracy": 0.25, "train_loss": 3.5},
        "c01": {"test_accuracy": 1.0, "train_loss": 0.125},
        "c02": None,
        "c03": {"test_accuracy": 0.0, "train_loss": 15.0},
    }
    chosen = {
        name: Contribution(one.context, one.weight, told[name])
        for name, one in contributions(4, largest_weight=500).items()
    }
    aggregate = secure_round(plan, chosen).run()
    told_by = [one for one in chosen.values() if one.metrics is not None]
    weights = [one.weight for one in told_by]
    assert set(aggregate.metrics) == {"test_accuracy", "train_loss"}
    step = Encoding.of(parameters(plan, SHAPE), 4).error_bound(4) / sum(weights)
    for metric, largest in (("test_accuracy", 1.0), ("train_loss", 16.0)):
        expected = np.average([one.metrics[metric] for one in told_by], weights=weights)
        assert aggregate.metrics[metric] == pytest.approx(expected, abs=largest * (step + 2.0**-24))
    np.testing.assert_allclose(aggregate.context, oracle(chosen), rtol=0, atol=bound(plan, 4, chosen))


def test_a_loss_beyond_the_largest_that_is_told_counts_as_that(secure_plan: MakePlan, secure_round: Any) -> None:
    plan = secure_plan(metrics=True, clip=0.25, precision=1e-6)
    metrics = {"test_accuracy": 1.5, "train_loss": 1e9}
    chosen = {name: Contribution(np.zeros(SHAPE, np.float32), 1, metrics) for name in names(3)}
    told = secure_round(plan, chosen).run().metrics
    assert told == {"test_accuracy": pytest.approx(1.0), "train_loss": pytest.approx(16.0)}


def test_a_metric_that_is_no_number_is_not_told(secure_plan: MakePlan, secure_round: Any) -> None:
    """Such as a mean over no test images: it must neither end the round for its client nor spoil the others' means."""
    plan = secure_plan(metrics=True)
    good = {"test_accuracy": 0.5, "train_loss": 1.0}
    chosen = {name: Contribution(np.zeros(SHAPE, np.float32), 1, good) for name in names(3)}
    chosen["c00"] = Contribution(np.zeros(SHAPE, np.float32), 1, {"test_accuracy": float("nan"), "train_loss": 2.0})
    told = secure_round(plan, chosen).run().metrics
    assert told == {"test_accuracy": pytest.approx(0.5, abs=1e-3), "train_loss": pytest.approx(1.0, abs=16e-3)}


def test_nobody_who_tells_is_no_mean(secure_plan: MakePlan, secure_round: Any) -> None:
    assert secure_round(secure_plan(metrics=True), contributions(3)).run().metrics is None


def test_a_plan_without_metrics_ignores_them(secure_plan: MakePlan, secure_round: Any) -> None:
    chosen = contributions(3)
    telling = {
        name: Contribution(one.context, one.weight, {"test_accuracy": 0.5, "train_loss": 1.0})
        for name, one in chosen.items()
    }
    silent, told = secure_round(secure_plan(), chosen), secure_round(secure_plan(), telling)
    np.testing.assert_array_equal(told.run().context, silent.run().context)
    assert told.server.result().metrics is None
    assert len(told.stored[3]["c00"]) == len(silent.stored[3]["c00"])


def test_the_same_federation_gives_the_same_mean_bit_by_bit(secure_plan: MakePlan, secure_round: Any) -> None:
    # Few fractional bits: which way a number is rounded shows.
    plan, chosen = secure_plan(precision=0.01, max_weight=2**21), contributions(4, largest_weight=3)
    one, other = secure_round(plan, chosen), secure_round(plan, chosen)
    np.testing.assert_array_equal(one.run().context, other.run().context)
    assert one.stored[3] != other.stored[3], "masks come from the operating system"
    elsewhere = secure_round(
        secure_plan(precision=0.01, max_weight=2**21, seed=2), contributions(4, largest_weight=3)
    ).run()
    assert (elsewhere.context != one.server.result().context).any()


def test_the_mean_does_not_depend_on_the_order_of_arrival(secure_plan: MakePlan, secure_round: Any) -> None:
    this = secure_round(secure_plan(), contributions(5))
    straight = this.run().context
    this.stored = {step: dict(reversed(messages.items())) for step, messages in this.stored.items()}
    np.testing.assert_array_equal(this.server.result().context, straight)


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_crashed_goes_on_where_it_was(
    secure_plan: MakePlan, secure_round: Any, hospitals: Any, step: int
) -> None:
    plan, chosen = secure_plan(), contributions(3)
    now = hospitals.client("c01").subject.not_after - timedelta(days=1)
    undisturbed = secure_round(plan, chosen).run().context
    this = secure_round(plan, chosen)
    for number in range(1, step + 1):
        this.step(number)
    side = client_aggregation(plan, SHAPE, hospitals.client("c01"))
    saved = this.saved["c01"]
    restored = side.restore(saved[-1], this.identity, chosen["c01"], saved.append, now)
    assert (restored.step, restored.message) == (step, this.stored[step]["c01"])
    this.clients["c01"] = restored
    for number in range(step + 1, 6):
        this.step(number)
    np.testing.assert_array_equal(this.server.result().context, undisturbed)
    with pytest.raises(StateError, match="of another round"):
        side.restore(saved[-1], RoundIdentity("0f" * 16, 8, "ab" * 32), chosen["c01"], saved.append, now)


def test_nothing_is_answered_after_the_last_step(secure_plan: MakePlan, secure_round: Any) -> None:
    this = secure_round(secure_plan(), contributions(3))
    this.run()
    client, saved = this.clients["c01"], list(this.saved["c01"])
    for request in (b"", this.server.request(5, "c01")):
        with pytest.raises(MessageRejected, match="the server asks for more"):
            client.answer(request, datetime(2030, 1, 1, tzinfo=UTC))
    assert (client.step, client.message, this.saved["c01"]) == (5, this.stored[5]["c01"], saved)


@pytest.mark.parametrize(("step", "in_the_mean"), [(2, range(5)), (3, range(5)), (4, range(7)), (5, range(7))], ids=str)
def test_up_to_a_third_may_drop_out(secure_plan: MakePlan, secure_round: Any, step: int, in_the_mean: range) -> None:
    plan, chosen = secure_plan(), contributions(7)
    aggregate = secure_round(plan, chosen).run(without={step: ("c05", "c06")})
    survivors = {name: chosen[name] for name in names(7) if int(name[1:]) in in_the_mean}
    np.testing.assert_allclose(aggregate.context, oracle(survivors), rtol=0, atol=bound(plan, 7, survivors))
    assert aggregate.total_weight == sum(one.weight for one in survivors.values())


@pytest.mark.parametrize("step", STEPS)
def test_more_than_a_third_may_not(secure_plan: MakePlan, secure_round: Any, step: int) -> None:
    this = secure_round(secure_plan(minimum_cohort=5), contributions(7))
    for number in range(1, step):
        this.step(number)
    with pytest.raises(AssertionError):
        this.step(step, without=("c04", "c05", "c06"))
    assert len(this.stored[step]) == 4
    assert not this.server.ready(step)


@pytest.mark.parametrize(("step", "ready"), [(1, False), (2, False), (3, False), (4, True), (5, True)])
def test_fewer_updates_than_the_minimum_cohort_are_not_averaged(
    secure_plan: MakePlan, secure_round: Any, step: int, ready: bool
) -> None:
    """Four of five are a quorum, but the plan says five; those who confirm and unmask need not be all of them."""
    this = secure_round(secure_plan(minimum_cohort=5), contributions(5))
    for number in range(1, step + 1):
        this.step(number)
    del this.stored[step]["c04"]
    assert this.server.ready(step) is ready


@pytest.mark.parametrize("vector", ["random", "another's"])
def test_a_sum_that_is_no_sum_is_told_from_one(secure_plan: MakePlan, secure_round: Any, vector: str) -> None:
    this = secure_round(secure_plan(), contributions(3))
    for step in (1, 2, 3):
        this.step(step)
    message = MaskedInput.FromString(this.stored[3]["c01"])
    if vector == "random":
        message.vector = np.random.default_rng(0).bytes(len(message.vector))
    else:
        message.vector = MaskedInput.FromString(this.stored[3]["c02"]).vector
    this.accept(3, "c01", message.SerializeToString())
    for step in (4, 5):
        this.step(step)
    with pytest.raises(RoundLost, match="do not cancel"):
        this.server.result()


@pytest.mark.parametrize("kind", ["random", "zeros", "ones"])
def test_wrong_shares_are_left_out_and_their_sender_is_named(
    secure_plan: MakePlan, secure_round: Any, kind: str
) -> None:
    plan, chosen = secure_plan(), contributions(4)
    undisturbed = secure_round(plan, chosen).run().context
    this = secure_round(plan, chosen)
    for step in STEPS:
        this.step(step)
    size = len(Unmasking.FromString(this.stored[5]["c00"]).shares)
    wrong = {"random": np.random.default_rng(0).bytes(size), "zeros": bytes(size), "ones": b"\xff" * size}[kind]
    this.accept(5, "c00", Unmasking(shares=wrong).SerializeToString())
    aggregate = this.server.result()
    np.testing.assert_array_equal(aggregate.context, undisturbed)
    assert aggregate.culprits == ("c00",)
    this.accept(5, "c01", Unmasking(shares=wrong).SerializeToString())
    with pytest.raises(RoundLost, match="wrong ones came from c00, c01"):
        this.server.result()


def test_two_names_for_one_key_are_one_client(secure_plan: MakePlan, secure_round: Any, hospitals: Any) -> None:
    this = secure_round(secure_plan(), contributions(3))
    this.step(1)
    side = client_aggregation(this.plan, SHAPE, hospitals.clone("twin", of="c01"))
    twin = side.begin(this.identity, contributions(1)["c00"], lambda saved: None)
    with pytest.raises(MessageRejected, match="the certified key of twin stands twice in the roster"):
        this.accept(1, "twin", twin.message)
    with pytest.raises(MessageRejected, match="c02 sent an advertisement of twin"):
        this.accept(1, "c02", twin.message)


def test_a_certificate_must_last_as_long_as_the_round_may(
    secure_plan: MakePlan, secure_round: Any, hospitals: Any
) -> None:
    """The whole round, of which the last clients read the roster at the end: 600 s, and 60 s for each further step."""
    this = secure_round(secure_plan(), contributions(3))
    ends = hospitals.client("c00").subject.not_after
    this.server.check(1, "c00", this.clients["c00"].message, ends - timedelta(seconds=840))
    with pytest.raises(MessageRejected, match="the certificate of c00, or its authority's, ends on"):
        this.server.check(1, "c00", this.clients["c00"].message, ends - timedelta(seconds=839))


@pytest.mark.parametrize("clients", [3, 20])
def test_no_message_is_longer_than_is_said(secure_plan: MakePlan, secure_round: Any, clients: int) -> None:
    this = secure_round(secure_plan(metrics=True, precision=1e-8), contributions(clients))
    this.run()
    longest = max(len(message) for messages in this.stored.values() for message in messages.values())
    assert longest <= this.aggregation.max_message_bytes(clients)


def test_it_takes_certificates(secure_plan: MakePlan, hospitals: Any) -> None:
    plan = secure_plan()
    for side in (client_aggregation, server_aggregation):
        with pytest.raises(ProtectionUnavailable, match='"secure", which takes certificates: use TLS, or a plan'):
            side(plan, SHAPE, None)
    assert server_aggregation(plan, SHAPE, hospitals.authority.certificate).steps == 5


def test_a_precision_that_no_cohort_could_have_is_refused_at_once(secure_plan: MakePlan, hospitals: Any) -> None:
    plan = secure_plan(precision=1e-9, max_weight=2**28)
    with pytest.raises(PlanError, match="precision 1e-09 cannot be had with clip 1, max_weight 268435456"):
        server_aggregation(plan, SHAPE, hospitals.authority.certificate)


@pytest.mark.parametrize("minimum", [1, 2])
def test_a_plan_for_two_is_refused(secure_plan: MakePlan, minimum: int) -> None:
    with pytest.raises(
        ValueError, match=f'minimum_cohort {minimum} is too small for protection.aggregation = "secure"'
    ):
        secure_plan(minimum_cohort=minimum)
