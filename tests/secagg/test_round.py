"""Whole rounds: the mean is right whoever drops out where, and too many drop-outs end the round without a sum."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected, StateError
from pfedsecure.secagg import Assumptions, ClientRound, Outcome, RoundLost, ServerRound, Step, Update, result

NewRound = Callable[..., Any]
UpdateOf = Callable[..., Update]

SPARSE = {"complete_up_to": 4, "assumptions": Assumptions(corrupt=0, dropout=0.1, security_bits=1, correctness_bits=20)}


def check_mean(outcome: Outcome, updates: dict[str, Update], step: float) -> None:
    """The outcome is the weighted mean over its survivors, within the documented bound."""
    included = [updates[name] for name in outcome.survivors]
    weight = sum(update.weight for update in included)
    exact = sum(update.values.astype(np.float64) * update.weight for update in included)
    assert outcome.mean.total_weight == weight
    assert np.abs(outcome.mean.values * weight - exact).max() < len(included) * step


@pytest.mark.parametrize("clients", [3, 4, 10])
@pytest.mark.parametrize("precision", [1e-3, 1e-9])
def test_mean_of_everybody(clients: int, precision: float, new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(clients, precision=precision)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    outcome = this.run(updates)
    assert this.server.encoding.bits == (32 if precision == 1e-3 else 64)
    assert outcome.survivors == tuple(this.names)
    assert outcome.culprits == ()
    check_mean(outcome, updates, this.server.encoding.step)


def test_clients_may_drop_out_in_every_step(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(10)  # a quorum is 7
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    outcome = this.run(
        updates,
        sharing=this.names[1:],  # c00 after its keys
        masking=this.names[2:],  # c01 after its shares
        confirming=this.names[2:9],  # c09 after its masked input
        unmasking=this.names[2:9],
    )
    assert outcome.survivors == tuple(this.names[2:])
    check_mean(outcome, updates, this.server.encoding.step)


def test_clients_may_drop_out_while_unmasking(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(10)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    outcome = this.run(updates, unmasking=this.names[:7])
    assert outcome.survivors == tuple(this.names)
    check_mean(outcome, updates, this.server.encoding.step)


@given(st.data())
@settings(max_examples=25, derandomize=True)
def test_the_mean_is_right_whoever_drops_out_as_long_as_a_quorum_stays(
    new_round: NewRound, update_of: UpdateOf, data: st.DataObject
) -> None:
    this = new_round(7, precision=data.draw(st.sampled_from([1e-3, 1e-9])))  # a quorum is 5
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    left = list(this.names)
    steps = []
    for _ in range(4):
        left = sorted(data.draw(st.permutations(left))[: data.draw(st.integers(5, len(left)))])
        steps.append(left)
    outcome = this.run(updates, **dict(zip(("sharing", "masking", "confirming", "unmasking"), steps, strict=True)))
    assert outcome.survivors == tuple(steps[1])
    check_mean(outcome, updates, this.server.encoding.step)


@pytest.mark.parametrize("dropped", [0, 2])
def test_sparse_graph(dropped: int, new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(20, **SPARSE)  # 5 holders, 2 shares needed: nobody is lost when 2 drop out
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    outcome = this.run(updates, masking=this.names[dropped:])
    assert this.server.sharing.holders < 8
    assert outcome.survivors == tuple(this.names[dropped:])
    check_mean(outcome, updates, this.server.encoding.step)


@pytest.mark.parametrize("step", [Step.ADVERTISE, Step.SHARE, Step.MASK, Step.CONFIRM, Step.UNMASK])
def test_one_client_too_few_and_the_step_is_not_ready(step: Step, new_round: NewRound, update_of: UpdateOf) -> None:
    """The plan's minimum is for those in the sum; those who take its masks off need only be a quorum."""
    this = new_round(10, minimum_cohort=9)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    this.run(updates)
    messages = this.stored[step]
    enough = 9 if step <= Step.MASK else 7
    before = {earlier: sent for earlier, sent in this.stored.items() if earlier < step}
    for count, ready in ((enough, True), (enough - 1, False)):
        arrived = dict(sorted(messages.items())[:count])
        server = ServerRound(this.setting, this.consortium.certificates, {**before, step: arrived})
        assert server.ready(step) is ready


def test_clients_refuse_to_go_on_with_too_few(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(10)
    this.advertise()
    this.share(this.names[:6])
    with pytest.raises(MessageRejected, match=r"6 participants of a cohort of 10 are too few .* 7 are needed"):
        this.mask({name: update_of(1) for name in this.names})


@pytest.mark.parametrize("step", [Step.MASK, Step.CONFIRM])
def test_clients_refuse_to_go_on_with_fewer_than_the_plan_asks_for(
    step: Step, new_round: NewRound, update_of: UpdateOf
) -> None:
    """A server that drops clients until a quorum is left, although the plan asks for more than that."""
    this = new_round(10, minimum_cohort=9)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    this.advertise()
    this.share(this.names[: 8 if step is Step.MASK else 10])
    what = "participants" if step is Step.MASK else "survivors"
    if step is Step.CONFIRM:
        this.mask(updates, this.names[:8])
    with pytest.raises(MessageRejected, match=f"8 {what} of a cohort of 10 are too few .* 9 are needed"):
        this.mask(updates) if step is Step.MASK else this.confirm()


def test_too_few_shares_in_the_end_and_the_round_is_lost(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(10)
    with pytest.raises(RoundLost, match="too few shares of c00 arrived"):
        this.run({name: update_of(seed) for seed, name in enumerate(this.names)}, unmasking=this.names[:6])


def test_the_same_request_gets_the_same_reply_and_another_none(new_round: NewRound, update_of: UpdateOf) -> None:
    this, other = new_round(4), new_round(4)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    client = this.clients["c00"]
    assert client.step is Step.ADVERTISE
    this.run(updates)
    other.run(updates)
    with pytest.raises(MessageRejected, match="step UNMASK of round 7 was answered already, for another request"):
        client.unmask(other.server.request(Step.UNMASK, "c00"))
    assert client.unmask(this.server.request(Step.UNMASK, "c00")) == client.reply == this.stored[Step.UNMASK]["c00"]
    with pytest.raises(MessageRejected, match="step SHARE of round 7 does not follow UNMASK"):
        client.share(other.server.request(Step.SHARE, "c00"), this.consortium.now)


@pytest.mark.parametrize("step", [Step.ADVERTISE, Step.SHARE, Step.MASK, Step.CONFIRM, Step.UNMASK])
def test_a_client_that_was_killed_goes_on(step: Step, new_round: NewRound, update_of: UpdateOf) -> None:
    """Every client is thrown away after `step` and made anew from what it saved."""
    this = new_round(5)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}

    def restart(after: Step) -> None:
        if after is not step:
            return
        for name in this.names:
            before = this.clients[name]
            this.clients[name] = after_restart = ClientRound.restore(
                this.states[name][-1],
                this.setting,
                this.consortium.client(name),
                this.consortium.certificates,
                now=this.consortium.now,
                save=this.states[name].append,
            )
            assert (after_restart.step, after_restart.reply) == (before.step, before.reply)

    this.advertise()
    restart(Step.ADVERTISE)
    this.share()
    restart(Step.SHARE)
    this.mask(updates, this.names[1:])
    restart(Step.MASK)
    this.confirm()
    restart(Step.CONFIRM)
    this.unmask()
    restart(Step.UNMASK)
    check_mean(result(this.server), updates, this.server.encoding.step)


def test_nothing_is_said_before_it_is_saved(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(3)
    client = this.clients["c00"]
    this.advertise()

    def fail(state: bytes) -> None:
        raise StateError("disk full")

    client._save = fail
    with pytest.raises(StateError, match="disk full"):
        client.share(this.server.request(Step.SHARE, "c00"), this.consortium.now)
    assert client.step is Step.ADVERTISE
    client._save = this.states["c00"].append
    this.share()
    this.mask({name: update_of(1) for name in this.names})


def test_secrets_leave_the_state_as_soon_as_they_have_served(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(4)
    first = this.clients["c00"]._state
    secrets = [first.mask_key, first.share_key, first.seed]
    this.run({name: update_of(seed) for seed, name in enumerate(this.names)})
    held = this.clients["c00"].unmask
    assert held is not None
    states = this.states["c00"]
    assert len(states) == 5
    for secret in secrets:
        assert [secret in state for state in states] == [True, True, False, False, False]
    given_out = this.stored[Step.UNMASK]["c00"]
    assert this.clients["c00"]._state.shares == b""
    assert given_out in states[-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: b"\xff" + state, "damaged"),
        (lambda state: state[: len(state) // 2], "damaged|another round"),
        (lambda state: b"", "of another round or version"),
    ],
)
def test_damaged_states_are_refused(damage: Callable[[bytes], bytes], message: str, new_round: NewRound) -> None:
    this = new_round(3)
    with pytest.raises(StateError, match=message):
        restore(this, damage(this.states["c00"][0]))


def restore(this: Any, state: bytes, **changes: Any) -> ClientRound:
    arguments = {"now": this.consortium.now, "save": this.states["c00"].append} | changes
    return ClientRound.restore(
        state, this.setting, this.consortium.client("c00"), this.consortium.certificates, **arguments
    )


def test_the_state_of_another_round_is_refused(new_round: NewRound) -> None:
    with pytest.raises(StateError, match="of another round or version"):
        restore(new_round(3, number=8), new_round(3, number=7).states["c00"][0])


def test_certificates_that_expired_meanwhile_end_the_round_for_a_restarted_client(new_round: NewRound) -> None:
    this = new_round(3)
    this.advertise()
    this.share()
    with pytest.raises(MessageRejected, match="expired"):
        restore(this, this.states["c00"][-1], now=this.consortium.now + timedelta(days=11))


def test_the_server_needs_nothing_but_its_store(new_round: NewRound, update_of: UpdateOf) -> None:
    """Serialised and read back between any two steps, as after a restart, it says the same."""
    this = new_round(4)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    outcome = this.run(updates)
    again = result(ServerRound(this.setting, this.consortium.certificates, this.stored))
    assert again.mean.values.tolist() == outcome.mean.values.tolist()
    shuffled = {step: dict(reversed(sent.items())) for step, sent in this.stored.items()}
    assert result(ServerRound(this.setting, this.consortium.certificates, shuffled)).mean.values.tolist() == (
        outcome.mean.values.tolist()
    )


def test_metrics_ride_along_only_for_those_who_send_them(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(4, metrics=("accuracy",))
    updates = {name: update_of(seed, metrics={"accuracy": 0.25 * seed}) for seed, name in enumerate(this.names)}
    updates["c03"] = update_of(3)
    mean = this.run(updates).mean
    weights = [updates[name].weight for name in this.names[:3]]
    assert mean.metrics_weight == sum(weights)
    assert mean.metrics is not None
    assert mean.metrics["accuracy"] == pytest.approx((0.25 * weights[1] + 0.5 * weights[2]) / sum(weights), abs=1e-3)


def test_inputs_that_cannot_be_encoded_change_nothing(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(3)
    this.advertise()
    this.share()
    client, inbox = this.clients["c00"], this.server.request(Step.MASK, "c00")
    with pytest.raises(ValueError, match="weight 0"):
        client.mask(inbox, Update(np.zeros(5, np.float32), 0))
    assert client.step is Step.SHARE
    assert client.encoding.clients == 3
    this.mask({name: update_of(1) for name in this.names})


def test_the_encoding_is_not_known_before_the_roster(new_round: NewRound) -> None:
    with pytest.raises(MessageRejected, match="roster is not known yet"):
        _ = new_round(3).clients["c00"].encoding
