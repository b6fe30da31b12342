"""A server that picks or plays the victim's cohort: each attack as it is stopped, and as it succeeds.

"Succeeds" means that the attacker holds the victim's numbers, as in `test_attacks_server`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import ClientRound, Credentials, Step, Update, keys, messages
from pfedsecure.secagg.roster import write_roster
from pfedsecure.wire.v1 import secagg_pb2 as wire

NewRound = Callable[..., Any]
UpdateOf = Callable[..., Update]
VICTIM = "c00"


def from_round_six(new_round: NewRound) -> Any:
    """An older round of the same clients, whose ephemeral secrets the attacker has, say from backups of their disks."""
    return new_round(4, number=6, names=["c01", "c02", "c03"])


def test_replayed_advertisements(new_round: NewRound) -> None:
    this, older = new_round(4, names=[VICTIM]), from_round_six(new_round)
    roster = write_roster([this.clients[VICTIM].reply, *(client.reply for client in older.clients.values())])
    with pytest.raises(MessageRejected, match="advertisement of c01 is for round 6, this is round 7: it was replayed"):
        this.clients[VICTIM].share(roster, this.consortium.now)


def test_replayed_advertisements_to_a_client_that_does_not_look_at_the_round(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who once had the ephemeral secrets of some clients plays them for ever, without their certified keys."""
    monkeypatch.setattr("pfedsecure.secagg.roster._check_setting", lambda *arguments: None)
    this, older = new_round(4, names=[VICTIM]), from_round_six(new_round)
    for client in older.clients.values():
        client._setting = this.setting
    secret = update_of(1)
    server, read = attacker.play_the_others(this, older.clients.values(), secret)
    attacker.check_read(server, read, secret)


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
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsecure.secagg.roster._check_signature", lambda *arguments: None)
    this = new_round(4, names=[VICTIM])
    secret = update_of(1)
    server, read = attacker.play_the_others(this, impostors(this), secret)
    attacker.check_read(server, read, secret)


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
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsecure.secagg.roster.check_distinct", lambda members: None)
    this = new_round(4, names=[VICTIM])
    secret = update_of(1)
    server, read = attacker.play_the_others(this, clones(this), secret)
    attacker.check_read(server, read, secret)


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
