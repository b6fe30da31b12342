"""Messages that are malformed, too large or out of place: refused by name, and nothing is said or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import Sharing, Step, Update, messages
from pfedsecure.secagg.roster import MAX_ADVERTISEMENT_BYTES, write_roster
from pfedsecure.wire.v1 import secagg_pb2 as wire

NewRound = Callable[..., Any]
UPDATE = Update(np.array([0.5, -0.5, 0.25, 0.0, 1.0], np.float32), 10)


def changed(step: Step, data: bytes, **fields: Any) -> bytes:
    """The server's request for `step` with some fields replaced."""
    kinds = {
        Step.SHARE: wire.Roster,
        Step.MASK: wire.Inbox,
        Step.CONFIRM: wire.Survivors,
        Step.UNMASK: wire.Confirmation,
    }
    return messages.serialised(altered(kinds[step].FromString(data), fields))


def altered(message: Any, fields: dict[str, Any]) -> Any:
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("step", "fields", "message"),
    [
        (Step.SHARE, {"advertisements": []}, "roster has 0 clients"),
        (Step.SHARE, {"advertisements": [b"\xff"] * 3}, "an advertisement cannot be decoded"),
        (Step.SHARE, {"advertisements": [b"x" * 5000] * 3}, f"5000 bytes, at most {MAX_ADVERTISEMENT_BYTES}"),
        (Step.MASK, {"participants": b""}, "bitmap of participants has 0 bytes, expected 1"),
        (Step.MASK, {"participants": b"\x1f"}, "bitmap of participants names clients beyond the roster"),
        (Step.MASK, {"participants": b"\x0e"}, "participants do not include this client"),
        (Step.MASK, {"participants": b"\x03"}, "2 participants of a cohort of 4 are too few"),
        (Step.MASK, {"participants": b"\x07"}, "shares from clients that do not take part"),
        (Step.MASK, {"dealers": [1, 2, 9]}, "dealers of the inbox are not distinct clients"),
        (Step.MASK, {"dealers": [1, 3, 2]}, "dealers of the inbox are not distinct clients"),
        (Step.MASK, {"dealers": [0, 1, 2]}, "clients that do not take part, or from this client"),
        (Step.MASK, {"dealers": [1, 2]}, "the inbox lacks the share from c03"),
        (Step.MASK, {"sealed": b"short"}, "the inbox's sealed shares has 5 bytes, expected 300"),
        (Step.MASK, {"commitments": b""}, "the inbox's commitments has 0 bytes, expected 192"),
        (Step.MASK, {"sealed": bytes(300)}, "the share from c01 is not what it committed to"),
        (Step.CONFIRM, {"survivors": b"\x0f\x00"}, "bitmap of survivors has 2 bytes"),
        (Step.CONFIRM, {"survivors": b"\x0e"}, "survivors do not include this client"),
        (Step.CONFIRM, {"survivors": b"\x03"}, "2 survivors of a cohort of 4 are too few"),
        (Step.UNMASK, {"survivors": b"\x07"}, "other survivors than this client signed"),
        (Step.UNMASK, {"signers": [0, 1]}, "signers and signatures do not match"),
        (Step.UNMASK, {"signers": [0, 1, 2, 4]}, "signers of the confirmation are not distinct clients"),
        (Step.UNMASK, {"signatures": [b""] * 3}, "c00 did not sign these survivors"),
    ],
)
def test_requests_that_clients_refuse(step: Step, fields: dict[str, Any], message: str, done: Any) -> None:
    client = done.before(step)
    before = client._state.SerializeToString(deterministic=True)
    with pytest.raises(MessageRejected, match=message):
        done.ask(client, step, changed(step, done.server.request(step, "c00"), **fields))
    assert client._state.SerializeToString(deterministic=True) == before
    done.ask(client, step, done.server.request(step, "c00"))


@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.CONFIRM, Step.UNMASK])
def test_oversized_requests_are_refused_unread(step: Step, done: Any) -> None:
    with pytest.raises(MessageRejected, match="bytes, at most"):
        done.ask(done.before(step), step, bytes(20_000_000))


def test_a_roster_without_the_own_advertisement_is_refused(done: Any, new_round: NewRound) -> None:
    roster = write_roster([client.reply for client in new_round(4).clients.values()])
    with pytest.raises(MessageRejected, match="does not hold this client's own advertisement"):
        done.ask(done.before(Step.SHARE), Step.SHARE, roster)


def test_too_few_of_the_own_holders(done: Any, new_round: NewRound, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sparse graph a quorum may take part and still not hold enough of one client's shares."""
    monkeypatch.setattr(Sharing, "of", lambda parameters, n: Sharing(n, 2 * n // 3 + 1, 2, 2))
    monkeypatch.setattr(
        Sharing, "draw_holders", lambda self, own, entropy: np.sort((own + np.array([1, 2])) % self.clients)
    )
    this = new_round(8)
    this.advertise()
    this.share([name for name in this.names if name not in ("c01", "c02")])
    with pytest.raises(MessageRejected, match="too few holders of this client's shares take part"):
        this.mask(dict.fromkeys(this.names, UPDATE), ["c00"])


# --- what the server refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "fields", "message"),
    [
        (Step.SHARE, {"holders": [1, 2]}, "go to 2 clients, they must go to 3 others"),
        (Step.SHARE, {"holders": [0, 1, 2]}, "must go to 3 others"),
        (Step.SHARE, {"holders": [1, 1, 2]}, "the holders in the shares of c00 are not distinct"),
        (Step.SHARE, {"sealed": b"short"}, "the shares of c00 has 5 bytes, expected 300"),
        (Step.SHARE, {"commitments": b"short"}, "the commitments of c00 has 5 bytes, expected 192"),
        (Step.SHARE, {"own_commitments": b""}, "the own commitments of c00 has 0 bytes, expected 64"),
        (Step.MASK, {"vector": bytes(31)}, "the masked vector has 31 bytes, expected 32"),
        (Step.MASK, {"participants_digest": bytes(32)}, "another cohort or other participants"),
        (Step.CONFIRM, {"signature": b"nothing"}, "the signature of c00 is not for the survivors of round 7"),
        (Step.UNMASK, {"shares": bytes(36)}, "the shares that c00 gives out has 36 bytes, expected 144"),
    ],
)
def test_messages_that_the_server_refuses(step: Step, fields: dict[str, Any], message: str, done: Any) -> None:
    kinds = {
        Step.SHARE: wire.Shares,
        Step.MASK: wire.MaskedInput,
        Step.CONFIRM: wire.SurvivorSignature,
        Step.UNMASK: wire.Unmasking,
    }
    data = messages.serialised(altered(kinds[step].FromString(done.stored[step]["c00"]), fields))
    with pytest.raises(MessageRejected, match=message):
        done.server.check(step, "c00", data, done.consortium.now)


@pytest.mark.parametrize("step", list(Step))
def test_strangers_have_no_part_and_oversized_messages_are_refused(step: Step, done: Any) -> None:
    with pytest.raises(MessageRejected, match="bytes, at most"):
        done.server.check(step, "c00", bytes(1_000_000), done.consortium.now)
    if step is Step.ADVERTISE:
        with pytest.raises(MessageRejected, match="c09 sent an advertisement of c00"):
            done.server.check(step, "c09", done.stored[step]["c00"], done.consortium.now)
        return
    with pytest.raises(MessageRejected, match=f"c09 has no part in step {step.name} of round 7"):
        done.server.check(step, "c09", done.stored[step]["c00"], done.consortium.now)
    with pytest.raises(MessageRejected, match=f"c09 has no part in step {step.name} of round 7"):
        done.server.request(step, "c09")
