"""The cryptography of envelopes, against a second implementation and against two-time pads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.errors import IdentityError
from pfedsecure.experts.envelope import SALT_BYTES, Label, seal, unseal
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.wire.v1.expert_pb2 import SealedExpert

ContextOf = Callable[..., np.ndarray]

ONE, TWO = bytes(range(32)), bytes(range(32, 64))
LABEL = Label("federation", "ab" * 32, 7, "cd" * 16, 1)


def setting_of(oracle: Any, label: Label, secret: bytes) -> Any:
    return oracle.Setting(secret, label.federation_id, label.plan_digest, label.round, label.author, label.epoch)


@given(
    plaintext=st.binary(max_size=300),
    secret=st.binary(min_size=32, max_size=32),
    federation=st.text(max_size=20),
    plan=st.text(max_size=20),
    author=st.text(max_size=20),
    number=st.integers(0, 2**64 - 1),
    epoch=st.integers(1, 2**31 - 1),
)
def test_a_second_implementation_seals_and_opens_the_same(
    oracle: Any, plaintext: bytes, secret: bytes, federation: str, plan: str, author: str, number: int, epoch: int
) -> None:
    label, secrets = Label(federation, plan, number, author, epoch), CohortSecrets.of({epoch: secret})
    setting = setting_of(oracle, label, secret)
    salt, ciphertext = seal(plaintext, label, secrets)
    assert (salt, ciphertext) == setting.seal(plaintext)
    assert unseal(salt, ciphertext, label, secrets) == setting.open(salt, ciphertext) == plaintext


@pytest.mark.parametrize("number", [1, 127, 128, 2**40])
def test_a_second_implementation_makes_the_same_envelopes(
    oracle: Any, cohort: Any, alice: Any, bob: Any, context_of: ContextOf, number: int
) -> None:
    """From the author's key, its certificate and the cohort's secret, and down to the last byte."""
    context = context_of(1)
    envelope = alice.experts().pack(context, number)
    setting = setting_of(oracle, alice.label(number), bob.raw_secret(1))
    assert oracle.unpack(envelope, setting) == context.tobytes()
    theirs = oracle.pack(context, setting, alice.author.certificate, alice.author_key())
    assert theirs == envelope
    np.testing.assert_array_equal(bob.experts().unpack(theirs, alice.pseudonym, number + 1), context)


@pytest.mark.slow
def test_no_two_different_plaintexts_share_key_and_nonce(
    oracle: Any, cohort: Any, new_cohort: Any, context_of: ContextOf
) -> None:
    """Over authors, contexts, rounds, epochs, federations, plans and authorities, also where all else is the same."""
    other = new_cohort()
    other.enrol("alice")
    used: dict[tuple[bytes, bytes], bytes] = {}
    salts: set[bytes] = set()
    envelopes = 0

    def note(member: Any, envelope: bytes, **changed: object) -> None:
        nonlocal envelopes
        sealed = SealedExpert.FromString(envelope)
        setting = setting_of(oracle, member.label(sealed.round, **changed), member.raw_secret(sealed.epoch))
        used[setting.key_and_nonce(sealed.salt)] = setting.open(sealed.salt, sealed.ciphertext)
        salts.add(sealed.salt)
        envelopes += 1

    for epoch in (1, 2):
        for member in (*cohort.members.values(), *other.members.values()):
            assert member.secrets().epoch == epoch
            for federation, plan in itertools.product(("f1", "f2"), ("ab" * 32, "cd" * 32)):
                experts = member.experts(federation=federation, plan=plan)
                for number, seed in itertools.product(range(1, 9), range(8)):
                    note(
                        member,
                        experts.pack(context_of(seed), number),
                        federation_id=federation,
                        plan_digest=plan,
                        epoch=epoch,
                    )
        cohort.rotate()
        other.rotate()
    assert envelopes == 2 * 4 * 4 * 64
    assert len(used) == len(salts) == envelopes
    assert len(set(used.values())) == envelopes
    assert len({key for key, _ in used}) == envelopes


@pytest.mark.parametrize("field", ["federation_id", "plan_digest", "round", "author", "epoch"])
def test_key_and_nonce_change_with_everything_that_an_envelope_is_for(oracle: Any, field: str) -> None:
    """One plaintext, and one field differs: a salt of its own, so that nothing rests on what a plaintext holds."""
    secrets = CohortSecrets.of({1: ONE, 2: ONE})
    changed = replace(LABEL, **{field: getattr(LABEL, field) * 2})
    (salt, ciphertext), (other, others) = (seal(b"expert", label, secrets) for label in (LABEL, changed))
    assert salt != other
    assert ciphertext[:6] != others[:6]
    assert unseal(salt, ciphertext, changed, secrets) is None


@given(st.binary(min_size=16, max_size=64), st.binary(min_size=16, max_size=64))
def test_two_envelopes_are_no_two_time_pad(one: bytes, two: bytes) -> None:
    """With one keystream for both, the server would read the difference of two prompts off the difference of both."""
    secrets = CohortSecrets.of({1: ONE})
    ciphertexts = [seal(text, LABEL, secrets)[1][:16] for text in (one, two)]
    difference, expected = (
        bytes(x ^ y for x, y in zip(*pair, strict=True)) for pair in (ciphertexts, (one[:16], two[:16]))
    )
    assert (difference == expected) == (one == two)


def test_fields_do_not_run_into_each_other() -> None:
    """No two labels with other borders have the same bytes."""
    for one, two in [
        (replace(LABEL, federation_id="ab", plan_digest="cd"), replace(LABEL, federation_id="a", plan_digest="bcd")),
        (replace(LABEL, author="ab"), replace(LABEL, plan_digest=LABEL.plan_digest + "ab", author="")),
    ]:
        assert one.statement("x") != two.statement("x")
    assert LABEL.statement("x", b"a", b"b") != LABEL.statement("x", b"ab", b"")
    assert LABEL.statement("xa") != LABEL.statement("x", b"a")


def test_purposes_have_keys_of_their_own() -> None:
    """What signs is not what seals: the statements of one label differ, as do the keys of one secret."""
    assert len({LABEL.statement(purpose) for purpose in ("expert salt", "expert envelope", "expert signature")}) == 3
    secrets = CohortSecrets.of({1: ONE})
    assert secrets.derive(1, "expert salt") != secrets.derive(1, "expert content key")


@pytest.mark.parametrize("length", [0, 1, 15, 16, 31, 33, 300])
def test_what_is_no_ciphertext_or_no_salt_opens_to_nothing(length: int) -> None:
    secrets = CohortSecrets.of({1: ONE})
    salt, ciphertext = seal(b"expert", LABEL, secrets)
    assert len(salt) == SALT_BYTES
    assert unseal(salt, bytes(length), LABEL, secrets) is None
    assert unseal(bytes(length), ciphertext, LABEL, secrets) is None


def test_nothing_is_sealed_or_opened_without_the_secret_of_the_epoch() -> None:
    salt, ciphertext = seal(b"expert", LABEL, CohortSecrets.of({1: ONE}))
    others = CohortSecrets.of({2: ONE})
    with pytest.raises(IdentityError, match="no cohort secret of epoch 1 here, only of 2"):
        seal(b"expert", LABEL, others)
    with pytest.raises(IdentityError, match="no cohort secret of epoch 1 here, only of 2"):
        unseal(salt, ciphertext, LABEL, others)
    assert unseal(salt, ciphertext, LABEL, CohortSecrets.of({1: TWO})) is None
