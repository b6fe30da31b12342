"""Clients that deal or give out wrong shares: found and named, and what comes of it where nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import Encoding, RoundLost, Step, Update, dealing, keys, messages, result, shamir
from pfedsecure.wire.v1 import secagg_pb2 as wire

NewRound = Callable[..., Any]
UpdateOf = Callable[..., Update]
VICTIM = "c00"


def finished_with_wrong_share(new_round: NewRound, update_of: UpdateOf) -> tuple[Any, dict[str, Update]]:
    """A whole round in which c02 gives out a wrong share of the victim's seed."""
    this = new_round(5)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    this.run(updates)
    message = wire.Unmasking.FromString(this.stored[Step.UNMASK]["c02"])
    message.shares = bytes([message.shares[0] ^ 1]) + message.shares[1:]
    this.stored[Step.UNMASK]["c02"] = messages.serialised(message)
    return this, updates


def test_a_wrong_share_is_found_named_and_does_no_harm(new_round: NewRound, update_of: UpdateOf) -> None:
    this, updates = finished_with_wrong_share(new_round, update_of)
    outcome = result(this.server)
    assert outcome.culprits == ("c02",)
    assert outcome.mean.total_weight == sum(update.weight for update in updates.values())


def test_a_wrong_share_that_leaves_too_few_right_ones(new_round: NewRound, update_of: UpdateOf) -> None:
    this, _ = finished_with_wrong_share(new_round, update_of)
    del this.stored[Step.UNMASK]["c04"]
    with pytest.raises(RoundLost, match="too few right shares of c00 arrived; wrong ones came from c02") as caught:
        result(this.server)
    assert caught.value.culprits == ("c02",)


def test_a_wrong_share_kills_rounds_unseen_where_secrets_are_not_checked(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsecure.secagg.unmasking._is_advertised", lambda *arguments: True)
    this, _ = finished_with_wrong_share(new_round, update_of)
    with pytest.raises(RoundLost, match="do not cancel") as caught:
        result(this.server)
    assert caught.value.culprits == ()


def test_a_wrong_share_becomes_a_wrong_model_where_sums_are_not_checked_either(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsecure.secagg.unmasking._is_advertised", lambda *arguments: True)
    this, _ = finished_with_wrong_share(new_round, update_of)
    decode = Encoding.decode

    def trusting(self: Encoding, total: np.ndarray, clients: int) -> Any:
        total[5] = clients  # whatever the weight came to
        total[-2:] = clients
        return decode(self, total, clients)

    monkeypatch.setattr(Encoding, "decode", trusting)
    monkeypatch.setattr(Encoding, "_mean", lambda self, sums, weight, clients: sums * (self.step / weight))
    assert np.abs(result(this.server).mean.values).max() > 1  # no mean of numbers in [-1, 1]


def lie_to_the_victim(this: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to masking: c03 seals another share for the victim than the one that it commits to."""
    seal = dealing.seal_record

    def lie(secret: bytes, roster: bytes, dealer: int, holder: int, record: bytes, *rest: Any) -> bytes:
        if holder == 0:
            record = bytes([record[0] ^ 1]) + record[1:]
        return seal(secret, roster, dealer, holder, record, *rest)

    this.advertise()
    shares = {}
    for name in this.names:
        with monkeypatch.context() as patch:
            if name == "c03":
                patch.setattr(dealing, "seal_record", lie)
            shares[name] = this.clients[name].share(this.server.request(Step.SHARE, name), this.consortium.now)
    this.store(Step.SHARE, shares)


def test_a_dealer_whose_shares_are_not_what_it_committed_to(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = new_round(4)
    lie_to_the_victim(this, monkeypatch)
    with pytest.raises(MessageRejected, match="the share from c03 is not what it committed to"):
        this.mask({VICTIM: update_of(1)}, [VICTIM])


def test_a_dealer_whose_shares_are_not_what_it_committed_to_frames_a_holder_that_does_not_look(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The victim gives out what it got; that is not what was committed to, and the server blames the victim."""

    def trusting(secret: bytes, roster: bytes, dealer: int, holder: int, sealed: bytes, commitments: bytes) -> Any:
        key, context = dealing._channel(secret, roster, dealer, holder, commitments)
        return keys.unseal(key, sealed, context)

    monkeypatch.setattr(dealing, "unseal_record", trusting)
    this = new_round(4)
    lie_to_the_victim(this, monkeypatch)
    this.mask({name: update_of(seed) for seed, name in enumerate(this.names)})
    this.confirm()
    this.unmask()
    assert result(this.server).culprits == (VICTIM,)


def test_commitments_that_were_changed_on_the_way(new_round: NewRound, update_of: UpdateOf) -> None:
    this = new_round(4)
    this.advertise()
    this.share()
    message = wire.Shares.FromString(this.stored[Step.SHARE]["c03"])
    message.commitments = bytes([message.commitments[0] ^ 1]) + message.commitments[1:]
    this.stored[Step.SHARE]["c03"] = messages.serialised(message)
    with pytest.raises(MessageRejected, match="the share from c03 is not what it committed to"):
        this.mask({VICTIM: update_of(1)}, [VICTIM])


def test_a_dealer_that_shares_another_secret_than_it_advertised(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = new_round(4)
    this.advertise()
    share = shamir.share
    with monkeypatch.context() as patch:
        patch.setattr(shamir, "share", lambda secrets, *rest: share([bytes(32), secrets[1]], *rest))
        lie = this.clients["c03"].share(this.server.request(Step.SHARE, "c03"), this.consortium.now)
    this.store(
        Step.SHARE,
        {
            name: this.clients[name].share(this.server.request(Step.SHARE, name), this.consortium.now)
            for name in this.names[:3]
        }
        | {"c03": lie},
    )
    this.mask({name: update_of(seed) for seed, name in enumerate(this.names)})
    this.confirm()
    this.unmask()
    with pytest.raises(
        RoundLost, match="the shares that c03 dealt are not of the secrets that it advertised"
    ) as caught:
        result(this.server)
    assert caught.value.culprits == ("c03",)
