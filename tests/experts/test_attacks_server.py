"""A server that changes envelopes, mixes them up and plays old ones; it has no secret of the cohort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.wire.v1.expert_pb2 import SealedExpert

ContextOf = Callable[..., np.ndarray]

NOT_SEALED = "the envelope was not sealed by this cohort for what it claims, or changed"


@pytest.fixture
def envelope(alice: Any, context_of: ContextOf) -> bytes:
    """Alice's of round 4."""
    return alice.experts().pack(context_of(1), 4)


@pytest.mark.parametrize(
    "change",
    [
        {"round": 3},
        {"round": 5},
        {"round": 0},
        {"salt": bytes(32)},
        {"ciphertext": "swapped blocks"},
        {"ciphertext": "first byte"},
        {"ciphertext": "a byte of the padding"},
        {"ciphertext": "tag"},
    ],
)
def test_a_tampered_field(alice: Any, bob: Any, envelope: bytes, change: dict[str, Any]) -> None:
    sealed = SealedExpert.FromString(envelope)
    ciphertext = bytearray(sealed.ciphertext)
    match change:
        case {"ciphertext": "swapped blocks"}:
            ciphertext[:16], ciphertext[16:32] = ciphertext[16:32], ciphertext[:16]
        case {"ciphertext": "first byte"}:
            ciphertext[0] ^= 1
        case {"ciphertext": "a byte of the padding"}:
            ciphertext[-40] ^= 1
        case {"ciphertext": "tag"}:
            ciphertext[-1] ^= 1
        case {"round": number}:
            sealed.round = number
        case {"salt": salt}:
            sealed.salt = salt
    sealed.ciphertext = bytes(ciphertext)
    with pytest.raises(MessageRejected, match=f"expert {alice.pseudonym[:8]}: {NOT_SEALED}"):
        bob.experts().unpack(sealed.SerializeToString(), alice.pseudonym, 9)
    assert bob.seen == {}


def test_another_epoch(cohort: Any, alice: Any, bob: Any, envelope: bytes) -> None:
    """An epoch whose secret the reader has is not taken for another one either."""
    cohort.rotate()
    assert bob.secrets().epoch == 2
    bob.experts().unpack(envelope, alice.pseudonym, 9)
    sealed = SealedExpert.FromString(envelope)
    sealed.epoch = 2
    with pytest.raises(MessageRejected, match=NOT_SEALED):
        bob.experts().unpack(sealed.SerializeToString(), alice.pseudonym, 9)


@pytest.mark.slow
def test_every_byte_counts(alice: Any, bob: Any, envelope: bytes) -> None:
    """Each byte of the envelope changed by itself, once in one bit and once in all."""
    reader = bob.experts()
    for place in range(len(envelope)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(envelope)
            changed[place] ^= flip
            with pytest.raises(MessageRejected):
                reader.unpack(bytes(changed), alice.pseudonym, 9)
    assert bob.seen == {}
    reader.unpack(envelope, alice.pseudonym, 9)


@pytest.mark.slow
def test_no_piece_of_an_envelope_passes(alice: Any, bob: Any, envelope: bytes) -> None:
    reader = bob.experts()
    for length in range(len(envelope)):
        with pytest.raises(MessageRejected):
            reader.unpack(envelope[:length], alice.pseudonym, 9)


def test_an_envelope_of_another_author(alice: Any, bob: Any, mallory: Any, context_of: ContextOf) -> None:
    """Mallory's expert under alice's pseudonym, as it is and with alice's pseudonym written over it."""
    envelope = mallory.experts().pack(context_of(2), 4)
    with pytest.raises(MessageRejected, match="the envelope is of another author than was asked for"):
        bob.experts().unpack(envelope, alice.pseudonym, 5)
    sealed = SealedExpert.FromString(envelope)
    sealed.author = alice.pseudonym
    with pytest.raises(MessageRejected, match=NOT_SEALED):
        bob.experts().unpack(sealed.SerializeToString(), alice.pseudonym, 5)
    assert bob.seen == {}


def test_a_replayed_envelope_of_an_older_round(alice: Any, bob: Any, context_of: ContextOf) -> None:
    old, new = (alice.experts().pack(context_of(number), number) for number in (4, 6))
    reader = bob.experts()
    reader.unpack(old, alice.pseudonym, 7)
    reader.unpack(new, alice.pseudonym, 7)
    for again in (reader, bob.experts()):  # what was seen outlives the process
        with pytest.raises(MessageRejected, match="of round 4, a newer one was here before; the server replays it"):
            again.unpack(old, alice.pseudonym, 8)
    np.testing.assert_array_equal(reader.unpack(new, alice.pseudonym, 8), context_of(6))
    assert bob.seen == {alice.pseudonym: 6}


def test_a_replayed_envelope_to_a_client_that_remembers_nothing(
    alice: Any, bob: Any, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(bob.seen), "newest", lambda *arguments: 0)
    old, new = (alice.experts().pack(context_of(number), number) for number in (4, 6))
    reader = bob.experts()
    reader.unpack(new, alice.pseudonym, 7)
    np.testing.assert_array_equal(reader.unpack(old, alice.pseudonym, 8), context_of(4))


def test_an_old_envelope_under_a_new_round(alice: Any, bob: Any, context_of: ContextOf) -> None:
    """The replay that memory alone would not stop."""
    old = SealedExpert.FromString(alice.experts().pack(context_of(4), 4))
    bob.experts().unpack(alice.experts().pack(context_of(6), 6), alice.pseudonym, 7)
    old.round = 7
    with pytest.raises(MessageRejected, match=NOT_SEALED):
        bob.experts().unpack(old.SerializeToString(), alice.pseudonym, 8)


@pytest.mark.parametrize("elsewhere", [{"federation": "f2"}, {"plan": "cd" * 32}])
def test_an_envelope_of_another_federation_or_plan(
    alice: Any, bob: Any, context_of: ContextOf, elsewhere: dict[str, str]
) -> None:
    """Of the same authority, so that clients, certificates and secrets are the same."""
    envelope = alice.experts(**elsewhere).pack(context_of(1), 4)
    with pytest.raises(MessageRejected, match=NOT_SEALED):
        bob.experts().unpack(envelope, alice.pseudonym, 5)
    bob.experts(**elsewhere).unpack(envelope, alice.pseudonym, 5)


@pytest.mark.parametrize("claimed", [5, 6, 2**64 - 1])
def test_an_envelope_that_claims_a_round_that_is_not_closed_yet(
    alice: Any, bob: Any, context_of: ContextOf, claimed: int
) -> None:
    """Sealed and signed in advance by its author, so that nothing it published later would count as newer."""
    envelope = alice.experts().pack(context_of(1), claimed)
    with pytest.raises(MessageRejected, match=f"the envelope claims round {claimed}, which has not been closed yet"):
        bob.experts().unpack(envelope, alice.pseudonym, 5)
    assert bob.seen == {}
    bob.experts().unpack(alice.experts().pack(context_of(1), 4), alice.pseudonym, 5)


def guesses() -> list[dict[int, bytes]]:
    """What a server without the secret may try."""
    return [{1: bytes(32)}, {1: bytes(range(32))}, {1: b"\xff" * 32}]


@pytest.mark.parametrize("guess", guesses())
def test_a_server_without_the_secret_opens_nothing(alice: Any, envelope: bytes, guess: dict[int, bytes]) -> None:
    """Not even with everything else that a member has."""
    server = alice.experts(secrets=CohortSecrets.of(guess))
    with pytest.raises(MessageRejected, match=NOT_SEALED):
        server.unpack(envelope, alice.pseudonym, 5)
    np.testing.assert_equal(alice.experts().unpack(envelope, alice.pseudonym, 5).shape, (2, 3))


@pytest.mark.parametrize("guess", guesses())
def test_a_server_without_the_secret_makes_nothing(
    alice: Any, bob: Any, context_of: ContextOf, guess: dict[int, bytes]
) -> None:
    """Not even with a stolen author key."""
    forged = alice.experts(secrets=CohortSecrets.of(guess)).pack(context_of(1), 4)
    with pytest.raises(MessageRejected, match=NOT_SEALED):
        bob.experts().unpack(forged, alice.pseudonym, 5)


def test_a_server_with_the_secret_reads_everything(mallory: Any, insider: Any, alice: Any, envelope: bytes) -> None:
    """What one member that works with the server gives away: that is why the authority is not the server's."""
    signed = insider.open(envelope, alice.label(4))
    assert insider.seal(signed, alice.label(4)) == envelope
