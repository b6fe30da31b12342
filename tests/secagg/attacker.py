"""What an attacker makes of the messages, shares and keys that it has; the fixture `attacker` is this module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from pfedsecure.secagg import ClientRound, ServerRound, Sharing, Step, Update, dealing, keys, messages, shamir
from pfedsecure.secagg.masking import Masks, pair_info, self_info
from pfedsecure.secagg.roster import write_roster
from pfedsecure.wire.v1 import secagg_pb2 as wire

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


def play_the_others(this: Any, others: Iterable[ClientRound], secret: Update) -> tuple[ServerRound, np.ndarray]:
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


def survivors_of(this: ServerRound, without: Iterable[int] = ()) -> bytes:
    """The server's word for who survived."""
    chosen = np.ones(len(this.names), bool)
    chosen[list(without)] = False
    return messages.serialised(wire.Survivors(survivors=messages.to_bitmap(chosen)))


def confirmation_of(survivors: bytes, signed: Iterable[tuple[int, bytes]]) -> bytes:
    """What makes clients unmask for these survivors: who signed, and each one's reply to CONFIRM."""
    signers, replies = zip(*signed, strict=True)
    return messages.serialised(
        wire.Confirmation(
            survivors=wire.Survivors.FromString(survivors).survivors,
            signers=signers,
            signatures=[wire.SurvivorSignature.FromString(reply).signature for reply in replies],
        )
    )


def up_to_masking(this: Any, update_of: Callable[[int], Update]) -> tuple[ServerRound, Update]:
    """Three honest steps; what the server has then, and the victim's update."""
    updates = {name: update_of(seed) for seed, name in enumerate(this.names)}
    this.advertise()
    this.share()
    this.mask(updates)
    return this.server, updates[VICTIM]


def unmask_by(this: Any, views: dict[int, bytes]) -> dict[int, bytes]:
    """Tell clients who survived, each its own version, and ask them to unmask; every one signs what it is told."""
    signed = {i: this.clients[this.names[i]].confirm(view) for i, view in views.items()}
    replies = {}
    for i, view in views.items():
        fellows = sorted((j, signed[j]) for j, theirs in views.items() if theirs == view)
        replies[i] = this.clients[this.names[i]].unmask(confirmation_of(view, fellows))
    return replies


def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three holders, two shares determine a secret, and client i's holders are i + 1, i + 5 and i + 11."""
    monkeypatch.setattr(Sharing, "of", lambda parameters, n: Sharing(n, 2 * n // 3 + 1, 3, 2))
    monkeypatch.setattr(
        Sharing, "draw_holders", lambda self, own, entropy: np.sort((own + np.array([1, 5, 11])) % self.clients)
    )
