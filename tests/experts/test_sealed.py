"""Sealed experts between clients that keep to the rules, and the server that carries them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import IdentityError, MessageRejected
from pfedsecure.experts.claim import Claim, verify_claim
from pfedsecure.experts.sealed import SealedServerExperts, padded_bytes
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.wire.v1.expert_pb2 import SealedExpert

ContextOf = Callable[..., np.ndarray]
SHAPE = (2, 3)
FEDERATION = "0f" * 16


@pytest.mark.parametrize("shape", [(1, 1), SHAPE, (16, 512)])
def test_what_is_packed_is_unpacked_by_every_member(cohort: Any, context_of: ContextOf, shape: tuple[int, int]) -> None:
    context = context_of(1, shape)
    alice = cohort.members["alice"]
    envelope = alice.experts(shape).pack(context, 4)
    for reader in cohort.members.values():
        received = reader.experts(shape).unpack(envelope, alice.pseudonym, 5)
        assert received.dtype == np.float32
        np.testing.assert_array_equal(received, context)
        assert reader.seen == {alice.pseudonym: 4}
    assert SealedServerExperts(shape).check(envelope, alice.pseudonym, 4) == 1


def test_a_claim_is_good_for_one_client_of_one_federation(cohort: Any, alice: Any, bob: Any) -> None:
    authority = alice.authority.certificate
    claim, caller = alice.experts().claim("ab" * 32), "ab" * 32
    assert verify_claim(claim, authority, FEDERATION, caller, alice.clock) == alice.pseudonym
    refused = [(claim, FEDERATION, "cd" * 32), (claim, "another", caller)]
    refused += [(Claim(bob.experts().claim(caller).certificate, claim.signature), FEDERATION, caller)]
    for one, federation, who in refused:
        with pytest.raises(IdentityError, match="is not claimed by its author for this client and federation"):
            verify_claim(one, authority, federation, who, alice.clock)
    with pytest.raises(IdentityError, match="expired"):
        verify_claim(claim, authority, FEDERATION, caller, alice.clock + timedelta(days=10_000))


def test_packing_again_gives_the_same_bytes_and_everything_counts(cohort: Any, alice: Any, bob: Any) -> None:
    """Also after a restart: a client that crashed sends the envelope that the server may already have."""
    context = np.ones(SHAPE, np.float32)
    envelopes = [alice.experts().pack(context, 1), alice.experts().pack(context.copy(), 1)]
    assert envelopes[0] == envelopes[1]
    others = [
        alice.experts().pack(np.nextafter(context, np.float32(2)), 1),
        alice.experts().pack(context, 2),
        alice.experts(federation="f2").pack(context, 1),
        alice.experts(plan="cd" * 32).pack(context, 1),
        bob.experts().pack(context, 1),
    ]
    cohort.rotate()
    others.append(alice.experts().pack(context, 1))
    assert len({envelopes[0], *others}) == 7
    parsed = [SealedExpert.FromString(envelope) for envelope in (envelopes[0], *others)]
    for field in ("salt", "ciphertext"):
        assert len({getattr(sealed, field) for sealed in parsed}) == 7


def test_an_envelope_looks_like_noise_and_says_who_when_and_no_more(alice: Any, context_of: ContextOf) -> None:
    zeros, envelope = (alice.experts().pack(context, 3) for context in (np.zeros(SHAPE, np.float32), context_of(1)))
    sealed = SealedExpert.FromString(envelope)
    assert (sealed.epoch, sealed.round, sealed.author) == (1, 3, alice.pseudonym)
    assert len(sealed.salt) == 32
    assert context_of(1).tobytes() not in envelope
    assert len(zeros) == len(envelope)
    flat = SealedExpert.FromString(zeros).ciphertext  # of hundreds of zeros of padding and context
    assert np.bincount(np.frombuffer(flat, np.uint8), minlength=256).max() < 40


def test_all_envelopes_of_a_plan_have_one_length(cohort: Any, new_cohort: Any, context_of: ContextOf) -> None:
    """Whoever the author, however long its certificate and signature; only digits of round and epoch are seen."""
    longest = new_cohort("h" * 64)
    members = [cohort.enrol(f"client-{number}", days=number + 1) for number in range(8)]
    members += [longest.enrol("c" * 64), longest.enrol("d")]
    certificates = {len(member.author.certificate) for member in members}
    signatures = {len(member.author.sign(bytes([number]))) for number in range(8) for member in members}
    assert len(certificates) > 1
    assert len(signatures) > 1
    lengths = {
        len(member.experts().pack(context_of(seed) * scale, number))
        for member in members
        for seed, (scale, number) in enumerate([(0, 1), (1, 2), (1000, 127)])
    }
    (length,) = lengths
    assert len(members[0].experts().pack(context_of(1), 128)) == length + 1
    assert len(members[0].experts((3, 2)).pack(context_of(1, (3, 2)), 1)) == length
    assert len(members[0].experts((3, 3)).pack(context_of(1, (3, 3)), 1)) == length + 12


def test_the_longest_envelope(alice: Any, context_of: ContextOf) -> None:
    """With the largest round that the wire has, and the largest epoch."""
    epoch, number = 2**31 - 1, 2**64 - 1
    server = SealedServerExperts(SHAPE)
    experts = alice.experts(secrets=CohortSecrets.of({epoch: bytes(32)}))
    envelope = experts.pack(context_of(1), number)
    assert padded_bytes(SHAPE) < len(envelope) <= server.max_bytes
    assert server.check(envelope, alice.pseudonym, number) == epoch


def test_no_name_of_a_client_is_anywhere_in_an_envelope(
    cohort: Any, oracle: Any, context_of: ContextOf, bob: Any
) -> None:
    author = cohort.enrol("Hospital-Zum-Guten-Hirten")
    envelope = author.experts().pack(context_of(1), 1)
    sealed = SealedExpert.FromString(envelope)
    label = author.label(1)
    setting = oracle.Setting(
        bob.raw_secret(1), label.federation_id, label.plan_digest, label.round, label.author, label.epoch
    )
    plaintext = setting.open(sealed.salt, sealed.ciphertext)
    identity = (author.folder / "identity.crt").read_bytes()
    assert b"BEGIN CERTIFICATE" in identity
    for text in (envelope, plaintext):
        assert not any(word in text.lower() for word in (b"hospital-zum", b"guten", b"hirten"))
    assert author.pseudonym.encode() in plaintext
    assert author.pseudonym.encode() in envelope


def test_experts_of_both_epochs_are_read_after_a_rotation(cohort: Any, alice: Any, bob: Any) -> None:
    """Until their authors have sealed them again."""
    context = np.ones(SHAPE, np.float32)
    before = alice.experts().pack(context, 1)
    cohort.rotate()
    assert alice.experts().epoch == 2
    after = alice.experts().pack(context, 1)
    reader = bob.experts()
    for envelope in (before, after, before):
        np.testing.assert_array_equal(reader.unpack(envelope, alice.pseudonym, 2), context)
    cohort.rotate()
    with pytest.raises(MessageRejected, match="no cohort secret of epoch 1 here, only of 2 and 3"):
        reader.unpack(before, alice.pseudonym, 2)


def test_an_expert_is_read_again_and_newer_ones_follow(alice: Any, bob: Any, context_of: ContextOf) -> None:
    reader = bob.experts()
    for number in (2, 2, 3, 7):
        envelope = alice.experts().pack(context_of(number), number)
        np.testing.assert_array_equal(reader.unpack(envelope, alice.pseudonym, 8), context_of(number))
        assert bob.seen == {alice.pseudonym: number}


def test_a_refused_expert_is_not_noted(alice: Any, bob: Any, context_of: ContextOf) -> None:
    """Otherwise a forger could have a client refuse what the author really publishes."""
    envelope = SealedExpert.FromString(alice.experts().pack(context_of(1), 7))
    envelope.round = 6
    with pytest.raises(MessageRejected):
        bob.experts().unpack(envelope.SerializeToString(), alice.pseudonym, 8)
    with pytest.raises(MessageRejected, match="norm"):
        bob.experts().unpack(alice.experts().pack(context_of(1) * 1e6, 7), alice.pseudonym, 8)
    assert bob.seen == {}


def test_packing_without_the_secret_is_an_error_of_this_client(alice: Any, context_of: ContextOf) -> None:
    experts = alice.experts()
    (alice.folder / "cohort.json").unlink()
    with pytest.raises(IdentityError, match="holds no cohort secret: have its request approved again"):
        experts.pack(context_of(1), 1)
    with pytest.raises(IdentityError, match="holds no cohort secret"):
        _ = experts.epoch


# ---------------------------------------------------------------------------------------------- the server


def test_the_server_takes_an_envelope_for_what_it_is_and_for_nothing_else(
    alice: Any, bob: Any, context_of: ContextOf
) -> None:
    """With no key at all: a shape is all it knows."""
    server = SealedServerExperts(SHAPE)
    envelope = alice.experts().pack(context_of(1), 4)
    assert server.check(envelope, alice.pseudonym, 4) == 1
    for content, author, number, message in [
        (envelope, bob.pseudonym, 4, "^the expert is under another pseudonym than its author joined with$"),
        (envelope, alice.pseudonym, 3, "^the expert is sealed for round 4, not for 3$"),
        (envelope, alice.pseudonym, 5, "^the expert is sealed for round 4, not for 5$"),
        (alice.experts((3, 3)).pack(context_of(1, (3, 3)), 4), alice.pseudonym, 4, "is not of the form of this plan"),
        (alice.experts((1, 3)).pack(context_of(1, (1, 3)), 4), alice.pseudonym, 4, "is not of the form of this plan"),
        (envelope + bytes(200), alice.pseudonym, 4, "more than an envelope of this plan"),
        (b"\xff", alice.pseudonym, 4, "the expert is not a SealedExpert"),
        (b"", alice.pseudonym, 4, "is not of the form of this plan"),
    ]:
        with pytest.raises(MessageRejected, match=message) as caught:
            server.check(content, author, number)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"epoch": 0},
        {"salt": b""},
        {"salt": bytes(31)},
        {"salt": bytes(33)},
        {"ciphertext": b""},
        {"ciphertext": bytes(padded_bytes(SHAPE) + 15)},
        {"ciphertext": bytes(padded_bytes(SHAPE) + 17)},
    ],
)
def test_both_sides_refuse_another_form(
    alice: Any, bob: Any, context_of: ContextOf, changed: dict[str, int | bytes]
) -> None:
    sealed = SealedExpert.FromString(alice.experts().pack(context_of(1), 4))
    for name, value in changed.items():
        setattr(sealed, name, value)
    for judge in (
        lambda content: SealedServerExperts(SHAPE).check(content, alice.pseudonym, 4),
        lambda content: bob.experts().unpack(content, alice.pseudonym, 5),
    ):
        with pytest.raises(MessageRejected, match="the envelope is not of the form of this plan"):
            judge(sealed.SerializeToString())


def test_the_server_returns_the_epoch(cohort: Any, alice: Any, context_of: ContextOf) -> None:
    for epoch in (1, 2, 3):
        assert SealedServerExperts(SHAPE).check(alice.experts().pack(context_of(1), 9), alice.pseudonym, 9) == epoch
        cohort.rotate()
