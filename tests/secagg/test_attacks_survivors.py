"""A server that lies about who survived, or asks twice: each attack as it is stopped, and as it succeeds.

"Succeeds" means that the attacker holds the victim's numbers, as in `test_attacks_server`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import ClientRound, ServerRound, Sharing, Step, Update, keys
from pfedsecure.secagg.cohort import Cohort
from pfedsecure.secagg.masking import Masks, pair_info, self_info

NewRound = Callable[..., Any]
UpdateOf = Callable[..., Update]
VICTIM = "c00"


def two_halves(attacker: Any, server: ServerRound) -> dict[int, bytes]:
    """Two of four clients hear that all live, the others that the victim dropped out."""
    return dict.fromkeys((0, 1), attacker.survivors_of(server)) | dict.fromkeys(
        (2, 3), attacker.survivors_of(server, [0])
    )


def test_half_are_told_that_a_live_client_dropped_out(new_round: NewRound, attacker: Any, update_of: UpdateOf) -> None:
    this = new_round(4)
    server, _ = attacker.up_to_masking(this, update_of)
    with pytest.raises(MessageRejected, match="2 clients signed the survivors, 3 of 4 must"):
        attacker.unmask_by(this, two_halves(attacker, server))


def test_half_are_told_that_a_live_client_dropped_out_and_half_is_a_quorum(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of share of one client: nothing but a quorum of more than half, with margin, keeps them apart."""
    monkeypatch.setattr(Sharing, "of", lambda parameters, n: Sharing(n, n // 2, n - 1, n // 2))
    this = new_round(4)
    server, secret = attacker.up_to_masking(this, update_of)
    replies = attacker.unmask_by(this, two_halves(attacker, server))
    seed = attacker.secret_from(server, 0, {i: attacker.given_out(server, i, replies[i], 0) for i in (0, 1)})
    mask_key = attacker.secret_from(server, 0, {i: attacker.given_out(server, i, replies[i], 0) for i in (2, 3)})
    attacker.check_read(server, attacker.strip(server, 0, seed, mask_key), secret)


def test_a_client_that_lives_does_not_help_to_unmask_without_it(
    new_round: NewRound, attacker: Any, update_of: UpdateOf
) -> None:
    this = new_round(4)
    server, _ = attacker.up_to_masking(this, update_of)
    with pytest.raises(MessageRejected, match="the survivors do not include this client"):
        this.clients[VICTIM].confirm(attacker.survivors_of(server, [0]))


def sparse_views(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, ServerRound, Update, list[int], dict[int, bytes]]:
    """A sparse cohort: the victim's six mask partners hear that all live, everybody else that these six dropped out."""
    attacker.sparse(monkeypatch)
    this = new_round(24)
    server, secret = attacker.up_to_masking(this, update_of)
    partners = np.flatnonzero((server.holds | server.holds.T)[0])
    partners = partners[partners != 0].tolist()
    assert len(partners) == 6
    views = {
        i: attacker.survivors_of(server) if i in partners or i == 0 else attacker.survivors_of(server, partners)
        for i in range(24)
    }
    return this, server, secret, partners, views


def test_survivors_that_differ_between_clients(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    this, _, _, _, views = sparse_views(new_round, attacker, update_of, monkeypatch)
    with pytest.raises(MessageRejected, match="7 clients signed the survivors, 17 of 24 must"):
        attacker.unmask_by(this, views)


def test_survivors_that_differ_between_clients_who_do_not_look_at_signatures(
    new_round: NewRound, attacker: Any, update_of: UpdateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The victim's seed from its partners, its partners' mask keys from the others: its input alone."""
    monkeypatch.setattr(Cohort, "require_signatures", lambda *arguments: None)
    this, server, secret, partners, views = sparse_views(new_round, attacker, update_of, monkeypatch)
    replies = attacker.unmask_by(this, views)
    told = {False: [i for i in views if i not in partners and i != 0], True: partners}

    def collected(dealer: int, of: list[int]) -> bytes:
        return attacker.secret_from(
            server,
            dealer,
            {i: attacker.given_out(server, i, replies[i], dealer) for i in of if server.holds[dealer, i]},
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
    attacker.check_read(server, vector, secret)


def test_signatures_of_others_or_for_other_survivors_do_not_count(
    new_round: NewRound, attacker: Any, update_of: UpdateOf
) -> None:
    this = new_round(5)
    server, _ = attacker.up_to_masking(this, update_of)
    everybody, fewer = attacker.survivors_of(server), attacker.survivors_of(server, [0])
    signed = {i: this.clients[name].confirm(everybody if i < 2 else fewer) for i, name in enumerate(this.names)}
    client = this.clients["c01"]
    with pytest.raises(MessageRejected, match="c02 did not sign these survivors: clients were told different ones"):
        client.unmask(attacker.confirmation_of(everybody, signed.items()))
    with pytest.raises(MessageRejected, match="other survivors than this client signed"):
        client.unmask(attacker.confirmation_of(fewer, signed.items()))
    with pytest.raises(MessageRejected, match="not distinct clients"):
        client.unmask(attacker.confirmation_of(everybody, [(i, signed[i]) for i in (0, 0, 1, 1, 1)]))


# --- a second answer --------------------------------------------------------------------------------------------------


def test_a_second_unmasking(new_round: NewRound, attacker: Any, update_of: UpdateOf) -> None:
    this = new_round(4)
    server, _ = attacker.up_to_masking(this, update_of)
    attacker.unmask_by(this, dict.fromkeys(range(4), attacker.survivors_of(server)))
    for name in this.names[1:]:
        with pytest.raises(MessageRejected, match="step CONFIRM of round 7 does not follow UNMASK"):
            this.clients[name].confirm(attacker.survivors_of(server, [0]))


def test_a_second_unmasking_by_clients_that_forget(new_round: NewRound, attacker: Any, update_of: UpdateOf) -> None:
    """Clients whose state after MASK never reached the disk, killed and started again: they answer a second time."""
    this = new_round(4)
    server, secret = attacker.up_to_masking(this, update_of)
    first = attacker.unmask_by(this, dict.fromkeys(range(4), attacker.survivors_of(server)))
    for name in this.names:
        this.clients[name] = ClientRound.restore(
            this.states[name][Step.MASK - 1],
            this.setting,
            this.consortium.client(name),
            this.consortium.certificates,
            now=this.consortium.now,
            save=this.states[name].append,
        )
    second = attacker.unmask_by(this, dict.fromkeys((1, 2, 3), attacker.survivors_of(server, [0])))
    seed = attacker.secret_from(server, 0, {i: attacker.given_out(server, i, first[i], 0) for i in range(4)})
    mask_key = attacker.secret_from(server, 0, {i: attacker.given_out(server, i, second[i], 0) for i in (1, 2, 3)})
    attacker.check_read(server, attacker.strip(server, 0, seed, mask_key), secret)
