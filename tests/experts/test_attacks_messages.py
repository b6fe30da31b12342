"""Anything at all instead of an expert, thousands of times: refused by name, or the very expert that was meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected
from pfedsecure.experts.plain import PlainExperts
from pfedsecure.experts.sealed import SealedServerExperts, padded_bytes
from pfedsecure.wire.v1.expert_pb2 import SealedExpert, SignedExpert

ContextOf = Callable[..., np.ndarray]
SHAPE = (2, 3)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` cut short, with bytes changed, taken out, put in, doubled or appended; or anything else."""
    kind = draw(st.sampled_from(["cut", "change", "take out", "insert", "double", "append", "anything"]))
    start = draw(st.integers(0, len(data) - 1))
    match kind:
        case "cut":
            return data[:start]
        case "change":
            new = draw(st.binary(min_size=1, max_size=4))
            return data[:start] + new + data[start + len(new) :]
        case "take out":
            return data[:start] + data[start + draw(st.integers(1, 40)) :]
        case "insert":
            return data[:start] + draw(st.binary(min_size=1, max_size=8)) + data[start:]
        case "double":
            return data + data[start:]
        case "append":
            return data + draw(st.binary(min_size=1, max_size=40))
        case _:
            return draw(st.binary(max_size=300))


@st.composite
def misfit(draw: st.DrawFn, sealed: SealedExpert) -> bytes:
    """A well-formed message with one field or more of another value; lengths are often right."""
    changed = SealedExpert.FromString(sealed.SerializeToString())
    for name, values in {
        "epoch": st.sampled_from([0, 1, 2, 2**32 - 1]),
        "round": st.sampled_from([0, 1, 3, 4, 5, 2**64 - 1]),
        "author": st.one_of(st.text(max_size=40), st.just("00" * 16)),
        "salt": st.one_of(st.binary(min_size=32, max_size=32), st.binary(max_size=64)),
        "ciphertext": st.one_of(damaged(sealed.ciphertext), st.just(bytes(padded_bytes(SHAPE) + 16))),
    }.items():
        if draw(st.booleans()):
            setattr(changed, name, draw(values))
    return changed.SerializeToString()


def refusal(attempt: Callable[[], object]) -> str:
    """What is said on refusing, in one line; nothing when it was not refused. Another error is the test's."""
    try:
        attempt()
    except MessageRejected as error:
        said = str(error)
    else:
        return ""
    assert said
    assert "\n" not in said
    return said


FUZZ = settings(max_examples=1000, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def refuses_or_reads(alice: Any, bob: Any, context_of: ContextOf) -> Callable[[bytes], None]:
    """Gives bob something in the place of alice's expert, whose context is `context_of(1)`."""
    reader = bob.experts()
    expected = context_of(1)
    secrets = [bob.raw_secret(1).hex(), alice.raw_secret(1).hex()]

    def attempt(content: bytes) -> None:
        bob.seen.clear()
        received = []
        said = refusal(lambda: received.append(reader.unpack(content, alice.pseudonym, 5)))
        assert not any(secret in said for secret in secrets)
        assert bob.seen == ({} if said else {alice.pseudonym: 4})
        for context in received:
            np.testing.assert_array_equal(context, expected)

    return attempt


@pytest.mark.slow
def test_whatever_the_server_gives_out_a_client_refuses_it(
    alice: Any, context_of: ContextOf, refuses_or_reads: Callable[[bytes], None]
) -> None:
    envelope = alice.experts().pack(context_of(1), 4)

    @FUZZ
    @given(st.one_of(damaged(envelope), misfit(SealedExpert.FromString(envelope))))
    def check(data: bytes) -> None:
        refuses_or_reads(data)

    refuses_or_reads(envelope)
    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # on damaged certificates
def test_whatever_a_member_seals_a_client_refuses_it(
    alice: Any, insider: Any, context_of: ContextOf, refuses_or_reads: Callable[[bytes], None]
) -> None:
    """In alice's name: nothing but what she signed is ever read, and nothing inside stops the client."""
    label = alice.label(4)
    signed = insider.open(alice.experts().pack(context_of(1), 4), label)
    parts = [signed.expert, signed.certificate, signed.signature]

    @FUZZ
    @given(st.tuples(*(st.one_of(st.just(part), damaged(part)) for part in parts)))
    def check_parts(changed: tuple[bytes, bytes, bytes]) -> None:
        content = SignedExpert(expert=changed[0], certificate=changed[1], signature=changed[2])
        if content.ByteSize() < padded_bytes(SHAPE):
            refuses_or_reads(insider.seal(content, label))

    @FUZZ
    @given(damaged(signed.SerializeToString()))
    def check_whole(data: bytes) -> None:
        length = padded_bytes(SHAPE)
        refuses_or_reads(insider.seal_bytes(data[:length].ljust(length, b"\0"), label))

    refuses_or_reads(insider.seal(signed, label))
    check_parts()
    check_whole()


@pytest.mark.parametrize(
    ("genuine", "changed"),
    [
        (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05"),  # X.509 version 6
        (b"\x06\x03\x55\x04\x03\x0c\x20", b"\x06\x03\x55\x04\x03\x03\x20"),  # a name that is a bit string
        (b"\x86\x1aurn:pfedsecure", b"\xa3\x1aurn:pfedsecure"),  # an alternative name that is an X.400 address
    ],
    ids=["version", "name", "alternative name"],
)
def test_a_certificate_that_the_parser_has_errors_of_its_own_for(
    alice: Any, insider: Any, context_of: ContextOf, bob: Any, genuine: bytes, changed: bytes
) -> None:
    """Any member could stop all others with it if it came through to them."""
    label = alice.label(4)
    signed = insider.open(alice.experts().pack(context_of(1), 4), label)
    assert genuine in signed.certificate
    signed.certificate = signed.certificate.replace(genuine, changed, 1)
    with pytest.raises(MessageRejected, match="this is no author certificate"):
        bob.experts().unpack(insider.seal(signed, label), alice.pseudonym, 5)


@pytest.mark.slow
def test_whatever_a_client_publishes_the_server_refuses_it_or_names_its_epoch(
    alice: Any, context_of: ContextOf
) -> None:
    """What is inside it cannot judge; the outside is of the one form that peers read, or refused."""
    server = SealedServerExperts(SHAPE)
    envelope = alice.experts().pack(context_of(1), 4)

    @FUZZ
    @given(st.one_of(damaged(envelope), misfit(SealedExpert.FromString(envelope))))
    def check(data: bytes) -> None:
        if refusal(lambda: server.check(data, alice.pseudonym, 4)):
            return
        sealed = SealedExpert.FromString(data)
        assert server.check(data, alice.pseudonym, 4) == sealed.epoch >= 1
        assert (sealed.round, sealed.author) == (4, alice.pseudonym)
        assert len(data) <= server.max_bytes
        assert (len(sealed.salt), len(sealed.ciphertext)) == (32, padded_bytes(SHAPE) + 16)

    check()


@pytest.mark.slow
def test_whatever_comes_in_the_clear(context_of: ContextOf) -> None:
    experts = PlainExperts(SHAPE, 100.0)
    content = experts.pack(context_of(1), 4)

    @FUZZ
    @given(damaged(content))
    def check(data: bytes) -> None:
        for judge in (experts.unpack, experts.check):
            assert refusal(lambda judge=judge: judge(data, "cd" * 16, 5)) or len(data) <= experts.max_bytes

    check()
