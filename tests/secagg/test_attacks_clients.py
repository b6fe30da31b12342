"""Clients that deal or give out wrong shares: found and named, and what comes of it where nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import Encoding, RoundLost, Step, Update, dealing, keys, messages, result, shamir
from pfedsecure.secagg.roster import write_advertisement
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


PRIME = 2**255 - 19
SMALL_ORDER = {
    "0": 0,
    "1": 1,
    "-1": PRIME - 1,
    "of order 8": 325606250916557431795983626356110631294008115727848805560023387167927233504,
    "the other of order 8": 39382357235489614581723060781553021112529911719440698176882885853963445705823,
    "0 written otherwise": PRIME,
    "0 with the bit that does not count": 2**255,
}


def advertise_key(this: Any, name: str, field: str, key: bytes) -> None:
    """A client advertises that public key, and everything else by the rules."""
    state = this.clients[name]._state
    mask_key, share_key = keys.public_key(state.mask_key), keys.public_key(state.share_key)
    advertised = {"mask_key": mask_key, "share_key": share_key} | {field: key}
    commitment = dealing.commit_seed(this.setting.digest, state.seed)
    state.reply = state.advertisement = write_advertisement(
        this.setting, this.consortium.client(name), **advertised, seed_commitment=commitment
    )


@pytest.mark.parametrize("key", SMALL_ORDER)
@pytest.mark.parametrize("field", ["mask_key", "share_key"])
def test_a_key_with_which_nothing_is_secret(new_round: NewRound, field: str, key: str) -> None:
    this = new_round(3)
    advertise_key(this, "c01", field, SMALL_ORDER[key].to_bytes(32, "little"))
    with pytest.raises(MessageRejected, match="the X25519 key of c01 is of small order; its client does not follow"):
        this.advertise()


def test_a_key_with_which_nothing_is_secret_makes_everybody_leave_where_the_server_does_not_look(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "require_public_key", lambda *arguments: None)
    this = new_round(4)
    advertise_key(this, "c01", "share_key", bytes(32))
    this.advertise()
    for name in this.names:
        if name != "c01":
            with pytest.raises(MessageRejected, match="the X25519 key of c01 is of small order"):
                this.share([name])


def test_a_key_with_which_nothing_is_secret_and_four_that_do_not_mind_lose_the_sum_where_the_server_does_not_look(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a sparse graph: its partners mask with it, it drops out, and the server cannot make the mask."""
    monkeypatch.setattr(keys, "require_public_key", lambda *arguments: None)
    attacker.sparse(monkeypatch)
    this = new_round(24)
    advertise_key(this, VICTIM, "mask_key", bytes(32))
    this.advertise()
    this.share()
    secret, masked = keys.Agreement.secret, {}
    for seed, name in enumerate(this.names):
        with monkeypatch.context() as patch:
            if name in ("c00", "c01", "c05", "c11"):
                patch.setattr(
                    keys.Agreement,
                    "secret",
                    lambda self, key, peer: key if key == bytes(32) else secret(self, key, peer),
                )
            try:
                masked[name] = this.clients[name].mask(this.server.request(Step.MASK, name), update_of(seed))
            except MessageRejected:
                assert name in ("c13", "c19", "c23"), "who drew the attacker"
    this.store(Step.MASK, masked)
    this.confirm()
    this.unmask()
    with pytest.raises(MessageRejected, match="is of small order"):
        result(this.server)


@pytest.mark.parametrize("weight", ["what is left of the cohort's", "negative"])
def test_a_client_that_makes_up_its_input_sets_the_mean_within_the_clip(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    """What nothing stops, with 1000 as the largest weight: see docs/attacks.md. It knows what the others send."""
    this = new_round(5)
    honest = Update(np.array([0.5, -0.5, 0.25, 0, -0.5], np.float32), 900)
    updates = dict.fromkeys(this.names, honest) | {"c04": Update(honest.values, 1)}
    encode, others, target = Encoding.encode, 4 * honest.weight, np.ones(5)
    claimed = 5 * 1000 - others if weight != "negative" else 5 - others

    def made_up(self: Encoding, update: Update, entropy: Any) -> Any:
        if update.weight != 1:
            return encode(self, update, entropy)
        values = (target * (others + claimed) - others * honest.values) / self.step
        return np.concatenate([np.round(values).astype(np.int64), [claimed, 1, 1]]).astype(self.dtype)

    monkeypatch.setattr(Encoding, "encode", made_up)
    mean = this.run(updates).mean
    assert mean.total_weight == others + claimed
    np.testing.assert_allclose(mean.values, target, rtol=0, atol=1e-9)
