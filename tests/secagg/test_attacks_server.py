"""A server that shows clients different rounds, or one its own shares: attacks, stopped and as they succeed.

"Succeeds" means that the attacker holds the victim's numbers: every test that takes a protection out ends by comparing
them. The attacker is the server, with whatever else the test gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import RoundLost, RoundSetting, ServerRound, Step, Update, dealing, messages, result
from pfedsecure.secagg.roster import write_advertisement, write_roster
from pfedsecure.wire.v1 import secagg_pb2 as wire

NewRound = Callable[..., Any]
UpdateOf = Callable[..., Update]
VICTIM = "c00"


# --- different models -------------------------------------------------------------------------------------------------


def two_models(new_round: NewRound) -> tuple[Any, Any]:
    """Rounds that differ in the model that the server handed out: the victim in the first, the others in the second."""
    return new_round(4, names=[VICTIM]), new_round(4, names=["c01", "c02", "c03"], model="ee" * 32)


def test_different_models_are_refused(new_round: NewRound) -> None:
    victim, others = two_models(new_round)
    roster = write_roster([client.reply for client in (*victim.clients.values(), *others.clients.values())])
    for client, odd in ((victim.clients[VICTIM], "c01 was given model eeeeeeeeeeee"), (others.clients["c01"], VICTIM)):
        with pytest.raises(
            MessageRejected, match=f"{odd}.*the server shows clients different models; nothing was sent"
        ):
            client.share(roster, victim.consortium.now)


def test_different_models_share_no_key_even_if_clients_do_not_compare(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsecure.secagg.roster._check_model", lambda *arguments: None)
    victim, others = two_models(new_round)
    victim.clients |= others.clients
    victim.advertise()
    victim.share()
    with pytest.raises(MessageRejected, match="the share from c01 is not what it committed to"):
        victim.mask({VICTIM: None})


def test_different_models_succeed_without_comparing_and_without_the_model_in_the_keys(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others got a model from which nothing can be learnt, so their part of the sum is known: here nothing."""
    monkeypatch.setattr("pfedsecure.secagg.roster._check_model", lambda *arguments: None)
    whole = RoundSetting.digest.func
    monkeypatch.setattr(RoundSetting, "digest", property(lambda self: whole(replace(self, model_digest="00" * 32))))
    victim, others = two_models(new_round)
    victim.clients |= others.clients
    secret = update_of(1)
    nothing = Update(np.zeros(5, np.float32), 1)
    outcome = victim.run({VICTIM: secret} | dict.fromkeys(others.names, nothing))
    weight = outcome.mean.total_weight - 3
    assert weight == secret.weight
    read = outcome.mean.values * outcome.mean.total_weight / weight
    assert np.abs(read - secret.values).max() <= victim.server.encoding.error_bound(4) / weight


# --- different rosters ------------------------------------------------------------------------------------------------


def test_clients_that_are_shown_different_rosters_have_nothing_in_common(
    new_round: NewRound, update_of: UpdateOf
) -> None:
    """c03 colludes and advertises twice, the second time another seed: the victim is shown that, everybody else not."""
    this = new_round(4)
    this.advertise()
    first = wire.Advertisement.FromString(this.clients["c03"].reply)
    second = write_advertisement(
        this.setting,
        this.consortium.client("c03"),
        first.mask_key,
        first.share_key,
        b"c" * 32,
    )
    rosters = dict.fromkeys(this.names, this.server.request(Step.SHARE, VICTIM))
    rosters[VICTIM] = write_roster([*(this.clients[name].reply for name in this.names[:3]), second])
    this.store(
        Step.SHARE, {name: this.clients[name].share(roster, this.consortium.now) for name, roster in rosters.items()}
    )
    for name, dealer in ((VICTIM, "c01"), ("c01", VICTIM)):
        with pytest.raises(MessageRejected, match=f"the share from {dealer} is not what it committed to"):
            this.clients[name].mask(this.server.request(Step.MASK, name), update_of(1))


# --- different participants -------------------------------------------------------------------------------------------


def test_clients_that_are_told_of_different_participants_have_no_masks_in_common(
    new_round: NewRound, update_of: UpdateOf
) -> None:
    """Telling c01 that c04 did not share would take the mask between the two away: instead all its masks change."""
    this = new_round(5)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    this.advertise()
    this.share()
    shares = this.stored[Step.SHARE]
    fewer = ServerRound(
        this.setting,
        this.consortium.certificates,
        {**this.stored, Step.SHARE: {name: shares[name] for name in this.names[:4]}},
    )
    lied_to = this.clients["c01"].mask(fewer.request(Step.MASK, "c01"), updates["c01"])
    others = [name for name in this.names if name != "c01"]
    this.mask(updates, others)
    with pytest.raises(MessageRejected, match="masked for another cohort or other participants"):
        this.server.check(Step.MASK, "c01", lied_to, this.consortium.now)
    this.stored[Step.MASK]["c01"] = lied_to
    with pytest.raises(MessageRejected, match="survivors include clients that did not share"):
        this.confirm(["c01"])
    this.confirm(others)
    this.unmask(others)
    with pytest.raises(RoundLost, match="do not cancel"):
        result(this.server)


# --- shares sent back to their dealer ---------------------------------------------------------------------------------


def reflected(server: ServerRound) -> bytes:
    """The victim's inbox, and in it two records that it dealt itself, in the names of their holders c01 and c05."""
    inbox = wire.Inbox.FromString(server.request(Step.MASK, VICTIM))
    sealed = [inbox.sealed[i : i + dealing.SEALED_BYTES] for i in range(0, len(inbox.sealed), dealing.SEALED_BYTES)]
    committed = [server.commitments(dealer, 0) for dealer in inbox.dealers]
    records = dict(zip(inbox.dealers, zip(sealed, committed, strict=True), strict=True))
    for holder in (1, 5):
        start = int(server.place[0, holder]) * dealing.SEALED_BYTES
        records[holder] = server.dealt[0].sealed[start : start + dealing.SEALED_BYTES], server.commitments(0, holder)
    return messages.serialised(
        wire.Inbox(
            participants=inbox.participants,
            dealers=sorted(records),
            sealed=b"".join(records[dealer][0] for dealer in sorted(records)),
            commitments=b"".join(records[dealer][1] for dealer in sorted(records)),
        )
    )


def test_a_share_that_comes_back_to_its_dealer(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacker.sparse(monkeypatch)
    this = new_round(24)
    this.advertise()
    this.share()
    with pytest.raises(MessageRejected, match="the share from c01 is not what it committed to"):
        this.clients[VICTIM].mask(reflected(this.server), update_of(1))


def test_a_share_that_comes_back_to_its_dealer_where_directions_are_not_told_apart(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c01 and c05 are said to have dropped out: the victim gives out shares of its own mask key for theirs."""
    attacker.sparse(monkeypatch)
    channel, commit = dealing._channel, dealing.commit_share
    monkeypatch.setattr(
        dealing, "_channel", lambda secret, roster, a, b, c: channel(secret, roster, *sorted((a, b)), c)
    )
    monkeypatch.setattr(dealing, "commit_share", lambda roster, a, b, *rest: commit(roster, *sorted((a, b)), *rest))
    this = new_round(24)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    this.advertise()
    this.share()
    masked = {VICTIM: this.clients[VICTIM].mask(reflected(this.server), updates[VICTIM])}
    for name in this.names[1:]:
        masked[name] = this.clients[name].mask(this.server.request(Step.MASK, name), updates[name])
    this.store(Step.MASK, masked)
    server = this.server
    survivors = attacker.survivors_of(server, [1, 5])
    replies = attacker.unmask_by(this, {i: survivors for i in range(24) if i not in (1, 5)})
    own, first, second = messages.records(wire.Unmasking.FromString(replies[0]).shares, 36, 6, "")[:3]
    mask_key = attacker.secret_from(server, 0, {1: first, 5: second})
    seed = attacker.secret_from(server, 0, {0: own, 11: attacker.given_out(server, 11, replies[11], 0)})
    attacker.check_read(server, attacker.strip(server, 0, seed, mask_key), updates[VICTIM])
