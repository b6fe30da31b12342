"""Attacks on the protocol, each twice: as it is stopped, and as it succeeds when what stops it is taken out.

"Succeeds" means that the attacker holds the victim's numbers: every test that takes a protection out ends by
comparing them. The attacker is the server, with whatever else the test gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import (
    ClientRound,
    Credentials,
    Encoding,
    RoundLost,
    RoundSetting,
    ServerRound,
    Sharing,
    Step,
    Update,
    dealing,
    keys,
    messages,
    result,
    shamir,
)
from pfedsecure.secagg.cohort import Cohort
from pfedsecure.secagg.masking import Masks, pair_info, self_info
from pfedsecure.secagg.roster import write_roster
from pfedsecure.wire.v1 import secagg_pb2 as wire

NewRound = Callable[..., Any]
UpdateOf = Callable[..., Update]
VICTIM = "c00"


def check_read(this: ServerRound, vector: np.ndarray, secret: Update) -> None:
    """The attacker has the victim's update: its weight exactly, its values up to the rounding."""
    mean = this.encoding.decode(vector, 1)
    assert mean is not None
    assert mean.total_weight == secret.weight
    assert np.abs(mean.values - secret.values).max() < this.encoding.step


def strip(this: ServerRound, victim: int, seed: bytes, mask_key: bytes) -> np.ndarray:
    """The victim's vector: its masked input less all its masks, from both of its secrets."""
    vector = this.masked_input(victim).copy()
    masks = Masks(this.encoding.length, this.encoding.dtype)
    masks.subtract(vector, keys.derive(seed, self_info(this.participants_digest, victim)))
    agreement = keys.Agreement(mask_key)
    for partner in np.flatnonzero((this.holds | this.holds.T)[victim]).tolist():
        if partner != victim:
            secret = agreement.secret(this.advertisements[partner].mask_key, "a partner")
            key = keys.derive(secret, pair_info(this.participants_digest, victim, partner))
            (masks.subtract if victim < partner else masks.add)(vector, key)
    return vector


def secret_from(this: ServerRound, dealer: int, shares: dict[int, bytes]) -> bytes:
    """A dealer's secret from shares by holder."""
    chosen = sorted(shares)[: this.sharing.threshold]
    assert len(chosen) == this.sharing.threshold
    rows = np.stack([shamir.from_bytes(shares[holder])[0] for holder in chosen])
    (secret,) = shamir.reconstruct(np.array([chosen]) + 1, rows[None])
    assert secret is not None
    return secret


def given_out(this: ServerRound, helper: int, reply: bytes, dealer: int) -> bytes:
    """The share of `dealer` in what a helper gave out."""
    place = np.flatnonzero(this.holds[:, helper]).tolist().index(dealer)
    return messages.records(
        wire.Unmasking.FromString(reply).shares, shamir.SHARE_BYTES, this.holds[:, helper].sum(), ""
    )[place]


def play_the_others(
    this: Any, others: Iterable[ClientRound], secret: Update, update_of: UpdateOf
) -> tuple[ServerRound, np.ndarray]:
    """Take `VICTIM` through sharing and masking among clients that the attacker plays itself, and read its input.

    The attacker holds the keys with which enough of the victim's shares are sealed.
    """
    victim, others = this.clients[VICTIM], list(others)
    roster = write_roster([client.reply for client in (victim, *others)])
    shares = [client.share(roster, this.consortium.now) for client in (victim, *others)]
    # Names are the numbers, because a clone has the victim's neighbours' name or all have one.
    numbers = [str(index) for index in range(len(others) + 1)]
    advertised = dict(zip(numbers, wire.Roster.FromString(roster).advertisements, strict=True))
    stored = {Step.ADVERTISE: advertised, Step.SHARE: dict(zip(numbers, shares, strict=True))}
    server = ServerRound(this.setting, this.consortium.certificates, stored)
    stored[Step.MASK] = {"0": victim.mask(server.request(Step.MASK, "0"), secret)}
    server = ServerRound(this.setting, this.consortium.certificates, stored)
    records = {}
    for place, holder in enumerate(server.dealt[0].holders):
        box = server.dealt[0].sealed[place * dealing.SEALED_BYTES :][: dealing.SEALED_BYTES]
        agreed = keys.Agreement(others[holder - 1]._state.share_key).secret(server.advertisements[0].share_key, VICTIM)
        record = dealing.unseal_record(agreed, server.roster_digest, 0, holder, box, server.commitments(0, holder))
        assert record is not None
        records[holder] = record
    seed, mask_key = (
        secret_from(server, 0, {holder: dealing.share_of(record, kind) for holder, record in records.items()})
        for kind in dealing.Kind
    )
    return server, strip(server, 0, seed, mask_key)


# --- different models ------------------------------------------------------------------------------------------------


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


# --- survivors --------------------------------------------------------------------------------------------------------


def survivors_of(this: ServerRound, without: Iterable[int] = ()) -> bytes:
    """The server's word for who survived."""
    chosen = np.ones(len(this.names), bool)
    chosen[list(without)] = False
    return messages.serialised(wire.Survivors(survivors=messages.to_bitmap(chosen)))


def confirmation_of(survivors: bytes, signatures: dict[int, bytes]) -> bytes:
    return messages.serialised(
        wire.Confirmation(
            survivors=wire.Survivors.FromString(survivors).survivors,
            signers=sorted(signatures),
            signatures=[wire.SurvivorSignature.FromString(signatures[i]).signature for i in sorted(signatures)],
        )
    )


def up_to_masking(new_round: NewRound, update_of: UpdateOf, clients: int) -> tuple[Any, ServerRound, Update]:
    this = new_round(clients)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    this.advertise()
    this.share()
    this.mask(updates)
    return this, this.server, updates[VICTIM]


def ask(this: Any, views: dict[int, bytes]) -> dict[int, bytes]:
    """Tell clients who survived, each its own version, and ask them to unmask; every one signs what it is told."""
    signed = {i: this.clients[this.names[i]].confirm(view) for i, view in views.items()}
    replies = {}
    for i, view in views.items():
        fellows = {j: signed[j] for j, theirs in views.items() if theirs == view}
        replies[i] = this.clients[this.names[i]].unmask(confirmation_of(view, fellows))
    return replies


def test_half_are_told_that_a_live_client_dropped_out(new_round: NewRound, update_of: UpdateOf) -> None:
    this, server, _ = up_to_masking(new_round, update_of, 4)
    with pytest.raises(MessageRejected, match="2 clients signed the survivors, 3 of 4 must"):
        ask(this, dict.fromkeys((0, 1), survivors_of(server)) | dict.fromkeys((2, 3), survivors_of(server, [0])))


def test_half_are_told_that_a_live_client_dropped_out_and_half_is_a_quorum(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of share of one client: nothing but a quorum of more than half, with margin, keeps them apart."""
    monkeypatch.setattr(Sharing, "of", lambda parameters, n: Sharing(n, n // 2, n - 1, n // 2))
    this, server, secret = up_to_masking(new_round, update_of, 4)
    replies = ask(this, dict.fromkeys((0, 1), survivors_of(server)) | dict.fromkeys((2, 3), survivors_of(server, [0])))
    seed = secret_from(server, 0, {i: given_out(server, i, replies[i], 0) for i in (0, 1)})
    mask_key = secret_from(server, 0, {i: given_out(server, i, replies[i], 0) for i in (2, 3)})
    check_read(server, strip(server, 0, seed, mask_key), secret)


def test_a_client_that_lives_does_not_help_to_unmask_without_it(new_round: NewRound, update_of: UpdateOf) -> None:
    this, server, _ = up_to_masking(new_round, update_of, 4)
    with pytest.raises(MessageRejected, match="the survivors do not include this client"):
        this.clients[VICTIM].confirm(survivors_of(server, [0]))


def sparse_views(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, ServerRound, Update, list[int], dict[int, bytes]]:
    """A sparse cohort: the victim's six mask partners hear that all live, everybody else that these six dropped out."""
    monkeypatch.setattr(Sharing, "of", lambda parameters, n: Sharing(n, 2 * n // 3 + 1, 3, 2))
    monkeypatch.setattr(
        Sharing, "draw_holders", lambda self, own, entropy: np.sort((own + np.array([1, 5, 11])) % self.clients)
    )
    this, server, secret = up_to_masking(new_round, update_of, 24)
    partners = np.flatnonzero((server.holds | server.holds.T)[0])
    partners = partners[partners != 0].tolist()
    assert len(partners) == 6
    views = {i: survivors_of(server) if i in partners or i == 0 else survivors_of(server, partners) for i in range(24)}
    return this, server, secret, partners, views


def test_survivors_that_differ_between_clients(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    this, _, _, _, views = sparse_views(new_round, update_of, monkeypatch)
    with pytest.raises(MessageRejected, match="7 clients signed the survivors, 17 of 24 must"):
        ask(this, views)


def test_survivors_that_differ_between_clients_who_do_not_look_at_signatures(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The victim's seed from its partners, its partners' mask keys from the others: its input alone."""
    monkeypatch.setattr(Cohort, "require_signatures", lambda *arguments: None)
    this, server, secret, partners, views = sparse_views(new_round, update_of, monkeypatch)
    replies = ask(this, views)
    told = {False: [i for i in views if i not in partners and i != 0], True: partners}

    def collected(dealer: int, of: list[int]) -> bytes:
        return secret_from(
            server, dealer, {i: given_out(server, i, replies[i], dealer) for i in of if server.holds[dealer, i]}
        )

    vector = server.masked_input(0).copy()
    masks = Masks(server.encoding.length, server.encoding.dtype)
    masks.subtract(vector, keys.derive(collected(0, told[True]), self_info(server.participants_digest, 0)))
    for partner in partners:
        agreement = keys.Agreement(collected(partner, told[False]))
        key = keys.derive(
            agreement.secret(server.advertisements[0].mask_key, VICTIM),
            pair_info(server.participants_digest, 0, partner),
        )
        masks.subtract(vector, key)
    check_read(server, vector, secret)


def test_signatures_of_others_or_for_other_survivors_do_not_count(new_round: NewRound, update_of: UpdateOf) -> None:
    this, server, _ = up_to_masking(new_round, update_of, 5)
    everybody, fewer = survivors_of(server), survivors_of(server, [0])
    signed = {i: this.clients[name].confirm(everybody if i < 2 else fewer) for i, name in enumerate(this.names)}
    client = this.clients["c01"]
    with pytest.raises(MessageRejected, match="c02 did not sign these survivors: clients were told different ones"):
        client.unmask(confirmation_of(everybody, signed))
    with pytest.raises(MessageRejected, match="other survivors than this client signed"):
        client.unmask(confirmation_of(fewer, signed))
    with pytest.raises(MessageRejected, match="not distinct clients"):
        client.unmask(confirmation_of_list(everybody, [0, 0, 1, 1, 1], [signed[0]] * 5))


def confirmation_of_list(survivors: bytes, signers: list[int], signatures: list[bytes]) -> bytes:
    return messages.serialised(
        wire.Confirmation(
            survivors=wire.Survivors.FromString(survivors).survivors,
            signers=signers,
            signatures=[wire.SurvivorSignature.FromString(one).signature for one in signatures],
        )
    )


# --- a second answer --------------------------------------------------------------------------------------------------


def test_a_second_unmasking(new_round: NewRound, update_of: UpdateOf) -> None:
    this, server, _ = up_to_masking(new_round, update_of, 4)
    ask(this, dict.fromkeys(range(4), survivors_of(server)))
    for name in this.names[1:]:
        with pytest.raises(MessageRejected, match="step CONFIRM of round 7 does not follow UNMASK"):
            this.clients[name].confirm(survivors_of(server, [0]))


def test_a_second_unmasking_by_clients_that_forget(new_round: NewRound, update_of: UpdateOf) -> None:
    """Clients whose state after MASK never reached the disk, killed and started again: they answer a second time."""
    this, server, secret = up_to_masking(new_round, update_of, 4)
    first = ask(this, dict.fromkeys(range(4), survivors_of(server)))
    for name in this.names:
        this.clients[name] = ClientRound.restore(
            this.states[name][Step.MASK - 1],
            this.setting,
            this.consortium.client(name),
            this.consortium.certificates,
            now=this.consortium.now,
            save=this.states[name].append,
        )
    second = ask(this, dict.fromkeys((1, 2, 3), survivors_of(server, [0])))
    seed = secret_from(server, 0, {i: given_out(server, i, first[i], 0) for i in range(4)})
    mask_key = secret_from(server, 0, {i: given_out(server, i, second[i], 0) for i in (1, 2, 3)})
    check_read(server, strip(server, 0, seed, mask_key), secret)


# --- who takes part ---------------------------------------------------------------------------------------------------


def from_round_six(new_round: NewRound) -> Any:
    """An older round of the same clients, whose ephemeral secrets the attacker has, say from backups of their disks."""
    return new_round(4, number=6, names=["c01", "c02", "c03"])


def test_replayed_advertisements(new_round: NewRound) -> None:
    this, older = new_round(4, names=[VICTIM]), from_round_six(new_round)
    roster = write_roster([this.clients[VICTIM].reply, *(client.reply for client in older.clients.values())])
    with pytest.raises(MessageRejected, match="advertisement of c01 is for round 6, this is round 7: it was replayed"):
        this.clients[VICTIM].share(roster, this.consortium.now)


def test_replayed_advertisements_to_a_client_that_does_not_look_at_the_round(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who once had the ephemeral secrets of some clients plays them for ever, without their certified keys."""
    monkeypatch.setattr("pfedsecure.secagg.roster._check_setting", lambda *arguments: None)
    this, older = new_round(4, names=[VICTIM]), from_round_six(new_round)
    for client in older.clients.values():
        client._setting = this.setting
    secret = update_of(1)
    server, read = play_the_others(this, older.clients.values(), secret, update_of)
    check_read(server, read, secret)


def impostors(this: Any) -> list[ClientRound]:
    """The server in the place of c01 to c03: their certificates, which are public, and keys of its own."""
    return [
        ClientRound.begin(
            this.setting,
            Credentials(this.consortium.client(name).certificate, ec.generate_private_key(ec.SECP256R1())),
            this.consortium.certificates,
            save=lambda state: None,
        )
        for name in ("c01", "c02", "c03")
    ]


def test_swapped_keys(new_round: NewRound) -> None:
    this = new_round(4, names=[VICTIM])
    roster = write_roster([client.reply for client in (this.clients[VICTIM], *impostors(this))])
    with pytest.raises(
        MessageRejected, match="advertisement of c01 is not signed by it: its keys may be somebody else's"
    ):
        this.clients[VICTIM].share(roster, this.consortium.now)


def test_one_swapped_key(new_round: NewRound) -> None:
    this = new_round(4)
    honest = wire.Advertisement.FromString(this.clients["c01"].reply)
    honest.mask_key = keys.public_key(b"s" * 32)
    roster = [this.clients[name].reply for name in this.names]
    roster[1] = messages.serialised(honest)
    with pytest.raises(MessageRejected, match="advertisement of c01 is not signed by it"):
        this.clients[VICTIM].share(write_roster(roster), this.consortium.now)


def test_swapped_keys_to_a_client_that_does_not_look_at_signatures(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsecure.secagg.roster._check_signature", lambda *arguments: None)
    this = new_round(4, names=[VICTIM])
    secret = update_of(1)
    server, read = play_the_others(this, impostors(this), secret, update_of)
    check_read(server, read, secret)


def clones(this: Any) -> list[ClientRound]:
    """Three clients with one certificate, that of a client that colludes."""
    return [
        ClientRound.begin(
            this.setting, this.consortium.client("c01"), this.consortium.certificates, save=lambda state: None
        )
        for _ in range(3)
    ]


def test_clones_of_one_certificate(new_round: NewRound) -> None:
    this = new_round(4, names=[VICTIM])
    roster = write_roster([client.reply for client in (this.clients[VICTIM], *clones(this))])
    with pytest.raises(MessageRejected, match=r"name of c01 stands twice in the roster .* one party poses as several"):
        this.clients[VICTIM].share(roster, this.consortium.now)


def test_clones_of_one_certificate_to_a_client_that_does_not_count(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsecure.secagg.roster.check_distinct", lambda members: None)
    this = new_round(4, names=[VICTIM])
    secret = update_of(1)
    server, read = play_the_others(this, clones(this), secret, update_of)
    check_read(server, read, secret)


@pytest.mark.parametrize("clients", [1, 2])
def test_a_cohort_below_the_minimum(clients: int, new_round: NewRound) -> None:
    this = new_round(clients)
    this.stored[Step.ADVERTISE] = {name: client.reply for name, client in this.clients.items()}
    with pytest.raises(MessageRejected, match=f"the roster has {clients} clients, this client takes part with 3 to"):
        this.share()
    assert not this.server.ready(Step.ADVERTISE)


def test_a_cohort_of_two_without_a_minimum(
    new_round: NewRound, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other client reads the victim's input off the published mean."""
    monkeypatch.setattr("pfedsecure.secagg.setting.SMALLEST_COHORT", 1)
    this = new_round(2, minimum_cohort=2)
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    mean = this.run(updates).mean
    secret, known = updates[VICTIM], updates["c01"]
    weight = mean.total_weight - known.weight
    read = (mean.values * mean.total_weight - known.values.astype(float) * known.weight) / weight
    assert weight == secret.weight
    assert np.abs(read - secret.values).max() <= this.server.encoding.error_bound(2) / weight


# --- wrong shares -----------------------------------------------------------------------------------------------------


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


def test_a_dealer_whose_shares_are_not_what_it_committed_to(new_round: NewRound, update_of: UpdateOf) -> None:
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


# --- participants -----------------------------------------------------------------------------------------------------


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
