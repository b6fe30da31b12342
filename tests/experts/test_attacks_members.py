"""Members that forge, lie and stay on. They have the cohort's secret, and the server hands out what they please."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import MessageRejected
from pfedsecure.experts.plain import write_expert
from pfedsecure.pki.author import VerifiedAuthor, pseudonym_of, verify_author
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.keys import read_private_key
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.expert_pb2 import PlainExpert, SignedExpert

ContextOf = Callable[..., np.ndarray]

NOT_SIGNED = "not signed by its author; some other member made it"
NOT_SEALED = "the envelope was not sealed by this cohort for what it claims, or changed"


def signed_by(member: Any, label: Any, expert: bytes, certificate: bytes) -> SignedExpert:
    """With the key of `member`, and whosever certificate."""
    signature = member.author.sign(label.statement("expert signature", expert))
    return SignedExpert(expert=expert, certificate=certificate, signature=signature)


# ---------------------------------------------------------------------------------------------- in another's name


@pytest.mark.parametrize("certificate_of", ["mallory", "alice"])
def test_a_member_forges_an_expert_in_the_name_of_another(
    cohort: Any, alice: Any, bob: Any, mallory: Any, insider: Any, context_of: ContextOf, certificate_of: str
) -> None:
    """Signed with its own key, beside its own certificate or the victim's, which every envelope holds."""
    label, expert = alice.label(4), write_expert(context_of(666))
    forged = insider.seal(signed_by(mallory, label, expert, cohort.members[certificate_of].author.certificate), label)
    with pytest.raises(MessageRejected, match=NOT_SIGNED):
        bob.experts().unpack(forged, alice.pseudonym, 5)
    assert bob.seen == {}


def test_a_forged_expert_to_a_client_that_does_not_look_at_signatures(
    alice: Any, bob: Any, mallory: Any, insider: Any, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sealing alone stops no member: the forger's numbers are taken for the victim's."""
    monkeypatch.setattr(VerifiedAuthor, "signed", lambda *arguments: True)
    label, expert = alice.label(4), write_expert(context_of(666))
    forged = insider.seal(signed_by(mallory, label, expert, alice.author.certificate), label)
    np.testing.assert_array_equal(bob.experts().unpack(forged, alice.pseudonym, 5), context_of(666))


def test_other_numbers_under_a_genuine_signature(alice: Any, bob: Any, insider: Any, context_of: ContextOf) -> None:
    signed = insider.open(alice.experts().pack(context_of(1), 4), alice.label(4))
    signed.expert = write_expert(context_of(666))
    with pytest.raises(MessageRejected, match=NOT_SIGNED):
        bob.experts().unpack(insider.seal(signed, alice.label(4)), alice.pseudonym, 5)


@pytest.mark.parametrize("signature", [b"", b"\x30\x00", bytes(70), b"\x30\x06\x02\x01\x00\x02\x01\x00"])
def test_no_signature_at_all(alice: Any, bob: Any, insider: Any, context_of: ContextOf, signature: bytes) -> None:
    signed = insider.open(alice.experts().pack(context_of(1), 4), alice.label(4))
    signed.signature = signature
    with pytest.raises(MessageRejected, match=NOT_SIGNED):
        bob.experts().unpack(insider.seal(signed, alice.label(4)), alice.pseudonym, 5)


@pytest.mark.parametrize(
    "changed", [{"round": 6}, {"federation_id": "f2"}, {"plan_digest": "cd" * 32}, {"epoch": 2}], ids=str
)
def test_a_genuine_expert_sealed_again_for_something_else(
    cohort: Any, alice: Any, bob: Any, mallory: Any, insider_of: Any, context_of: ContextOf, changed: dict[str, Any]
) -> None:
    """A member can take an envelope's content out and put it into a new one: the signature says what it was for."""
    envelope = alice.experts().pack(context_of(1), 4)
    label, other = alice.label(4), alice.label(4, **changed)
    cohort.rotate()
    insider = insider_of(mallory)
    sealed_again = insider.seal(insider.open(envelope, label), other)
    reader = bob.experts(federation=other.federation_id, plan=other.plan_digest)
    with pytest.raises(MessageRejected, match=NOT_SIGNED):
        reader.unpack(sealed_again, alice.pseudonym, 9)
    assert bob.seen == {}
    same = insider.seal(insider.open(envelope, label), label)
    np.testing.assert_array_equal(bob.experts().unpack(same, alice.pseudonym, 9), context_of(1))


# ---------------------------------------------------------------------------------------------- no author at all


def test_an_author_certificate_of_another_authority(
    new_cohort: Any, bob: Any, mallory: Any, insider: Any, context_of: ContextOf
) -> None:
    """A member invents authors, as many as it likes; the server lists their pseudonyms."""
    invented = new_cohort().enrol("invented")
    label = mallory.label(4, author=invented.pseudonym)
    forged = insider.seal(signed_by(invented, label, write_expert(context_of(666)), invented.author.certificate), label)
    with pytest.raises(
        MessageRejected, match=rf"author {invented.pseudonym} was not issued by authority [0-9a-f]{{16}}"
    ):
        bob.experts().unpack(forged, invented.pseudonym, 5)


def test_an_author_of_another_authority_to_a_client_that_trusts_any(
    new_cohort: Any, bob: Any, mallory: Any, insider: Any, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = new_cohort()
    invented = other.enrol("invented")
    monkeypatch.setattr(
        "pfedsecure.experts.sealed.verify_author",
        lambda certificate, authority, now: verify_author(certificate, other.authority.certificate, now),
    )
    label = mallory.label(4, author=invented.pseudonym)
    forged = insider.seal(signed_by(invented, label, write_expert(context_of(666)), invented.author.certificate), label)
    np.testing.assert_array_equal(bob.experts().unpack(forged, invented.pseudonym, 5), context_of(666))


def test_a_certificate_that_is_not_an_authors(bob: Any, mallory: Any, insider: Any, context_of: ContextOf) -> None:
    """The one for calls, with its key: a second pseudonym for one member, and its name inside the envelope."""
    key = read_private_key(mallory.folder / "identity.key")
    pem = (mallory.folder / "identity.crt").read_bytes()
    label, expert = mallory.label(4, author=pseudonym_of(key.public_key())), write_expert(context_of(666))
    signed = SignedExpert(
        expert=expert,
        certificate=x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER),
        signature=key.sign(label.statement("expert signature", expert), ec.ECDSA(hashes.SHA256())),
    )
    with pytest.raises(MessageRejected, match="this is no author certificate"):
        bob.experts().unpack(insider.seal(signed, label), label.author, 5)


def test_an_expired_author(cohort: Any, bob: Any, context_of: ContextOf) -> None:
    """Whose certificate ended, also for a reader that verified it while it was valid."""
    brief = cohort.enrol("brief", days=1)
    envelope = brief.experts().pack(context_of(1), 4)
    reader = bob.experts()
    reader.unpack(envelope, brief.pseudonym, 5)
    bob.clock += timedelta(days=3)
    for again in (reader, bob.experts()):
        with pytest.raises(MessageRejected, match=rf"certificate of author {brief.pseudonym} expired on"):
            again.unpack(envelope, brief.pseudonym, 5)


# ---------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.ones((3, 2)), r"has shape \(3, 2\), expected \(2, 3\)"),
        (np.ones(6), r"has shape \(6,\), expected \(2, 3\)"),
        (np.array([[1, 2, np.nan], [4, 5, 6]]), "holds numbers that are not finite"),
        (np.array([[1, 2, np.inf], [4, 5, 6]]), "holds numbers that are not finite"),
        (np.array([[1, 2, -np.inf], [4, 5, 6]]), "holds numbers that are not finite"),
        (np.full((2, 3), 41), r"has norm 100, over the plan's prompt\.max_norm 100"),
        (np.full((2, 3), 3e38), r"has norm 7\.35e\+38, over the plan's prompt\.max_norm 100"),
    ],
)
def test_an_author_that_signs_numbers_nobody_can_use(
    bob: Any, mallory: Any, insider: Any, numbers: np.ndarray, message: str
) -> None:
    label = mallory.label(4)
    expert = PlainExpert(context=to_tensor(numbers.astype(np.float32))).SerializeToString()
    envelope = insider.seal(signed_by(mallory, label, expert, mallory.author.certificate), label)
    with pytest.raises(MessageRejected, match=rf"^expert {mallory.pseudonym[:8]} {message}"):
        bob.experts().unpack(envelope, mallory.pseudonym, 5)
    assert bob.seen == {}


def test_an_expert_of_another_size(bob: Any, mallory: Any, context_of: ContextOf) -> None:
    for shape in ((2, 4), (16, 512), (1, 1)):
        envelope = mallory.experts(shape).pack(context_of(1, shape), 4)
        with pytest.raises(MessageRejected, match=r"more than an envelope|not of the form"):
            bob.experts().unpack(envelope, mallory.pseudonym, 5)


# ---------------------------------------------------------------------------------------------- come and gone


def test_a_removed_member_opens_nothing_new(
    cohort: Any, alice: Any, bob: Any, mallory: Any, context_of: ContextOf
) -> None:
    """With what it still has, and with its old secret taken for the new one."""
    old = alice.experts().pack(context_of(1), 4)
    cohort.rotate(without=["mallory"])
    new = alice.experts().pack(context_of(2), 5)
    with pytest.raises(MessageRejected, match="no cohort secret of epoch 2 here, only of 1: install the newest kit"):
        mallory.experts().unpack(new, alice.pseudonym, 6)
    for guess in ({2: mallory.raw_secret(1)}, {2: bytes(32)}):
        with pytest.raises(MessageRejected, match=NOT_SEALED):
            mallory.experts(secrets=CohortSecrets.of(guess)).unpack(new, alice.pseudonym, 6)
    np.testing.assert_array_equal(bob.experts().unpack(new, alice.pseudonym, 6), context_of(2))
    np.testing.assert_array_equal(mallory.experts().unpack(old, alice.pseudonym, 6), context_of(1))


def test_a_removed_member_that_is_given_the_new_secret_opens_everything(
    cohort: Any, alice: Any, bob: Any, mallory: Any, context_of: ContextOf
) -> None:
    """It is the secret that keeps it out, and nothing else."""
    cohort.rotate(without=["mallory"])
    envelope = alice.experts().pack(context_of(2), 5)
    leaked = CohortSecrets.of({2: bob.raw_secret(2)})
    np.testing.assert_array_equal(mallory.experts(secrets=leaked).unpack(envelope, alice.pseudonym, 6), context_of(2))


def test_a_removed_member_can_lend_for_one_epoch_more(
    cohort: Any, alice: Any, mallory: Any, context_of: ContextOf
) -> None:
    """Not stopped: whoever stays keeps the secret before, for those who are late. It is the one before and no more."""
    cohort.rotate(without=["mallory"])
    poison = mallory.experts().pack(context_of(666), 5)
    np.testing.assert_array_equal(alice.experts().unpack(poison, mallory.pseudonym, 6), context_of(666))
    cohort.rotate()
    late = mallory.experts().pack(context_of(666), 7)
    with pytest.raises(MessageRejected, match="no cohort secret of epoch 1 here, only of 2 and 3"):
        alice.experts().unpack(late, mallory.pseudonym, 8)


def test_a_new_member_is_told_what_it_cannot_open(cohort: Any, alice: Any, context_of: ContextOf) -> None:
    """What was sealed before it came; the message is one line and the client goes on."""
    envelope = alice.experts().pack(context_of(1), 4)
    cohort.rotate()
    carol = cohort.enrol("carol")
    with pytest.raises(
        MessageRejected, match=r"^expert [0-9a-f]{8}: no cohort secret of epoch 1 here, only of 2: [^\n]+$"
    ):
        carol.experts().unpack(envelope, alice.pseudonym, 5)
    sealed_again = alice.experts().pack(context_of(1), 4)
    np.testing.assert_array_equal(carol.experts().unpack(sealed_again, alice.pseudonym, 5), context_of(1))
