"""Author certificates: what they say, what they hide, and every way in which one can be wrong or out of place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from pfedsecure.errors import IdentityError
from pfedsecure.pki.author import AUTHOR_KEY_USE, AUTHOR_MARK, Author, author_name, pseudonym_of, verify_author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import fingerprint, to_pem, verify
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.issuing import issue
from pfedsecure.pki.keys import new_private_key, private_pem, read_private_key
from pfedsecure.pki.names import Role
from pfedsecure.wire.peer import Peer
from pfedsecure.wire.tls import channel_credentials, server_credentials

Enrol = Callable[..., Identity]


def now() -> datetime:
    return datetime.now(UTC)


def certificate_of(identity: Identity) -> x509.Certificate:
    return x509.load_pem_x509_certificate((identity.folder / "author.crt").read_bytes())


def test_peers_verify_what_an_author_signs(authority: Authority, enrolled: Enrol) -> None:
    author = Author.load(enrolled(authority, "alice").folder)
    verified = verify_author(author.certificate, authority.certificate, now())
    assert verified.pseudonym == author.pseudonym
    signature = author.sign(b"expert")
    assert verified.signed(signature, b"expert")
    assert not verified.signed(signature, b"Expert")
    assert not verified.signed(signature[:-1], b"expert")
    assert not verified.signed(b"", b"expert")
    assert author.sign(b"expert") == signature  # as RFC 6979 has it: no randomness of the moment
    other = Author.load(enrolled(authority, "bob").folder)
    assert not verified.signed(other.sign(b"expert"), b"expert")
    for shown in (repr(author), repr(verified)):
        assert "key" not in shown.lower()


def test_the_pseudonym_is_the_hash_of_the_key_and_stays(authority: Authority, enrolled: Enrol) -> None:
    alice = enrolled(authority, "alice")
    author = Author.load(alice.folder)
    assert re.fullmatch("[0-9a-f]{32}", author.pseudonym)
    key = read_private_key(alice.folder / "author.key")
    assert fingerprint(key.public_key()).startswith(author.pseudonym)
    assert key.public_key() != alice.private_key().public_key()
    again = authority.admit((alice.folder / "identity.csr").read_bytes(), name="alice", role="client", days=3)
    assert again.author is not None
    assert (
        verify_author(again.author.public_bytes(Encoding.DER), authority.certificate, now()).pseudonym
        == author.pseudonym
    )


def test_the_certificate_names_the_pseudonym_and_nothing_else(authority: Authority, enrolled: Enrol) -> None:
    alice = enrolled(authority, "hospital-of-alice")
    certificate = certificate_of(alice)
    assert certificate.subject.rfc4514_string() == f"CN={Author.load(alice.folder).pseudonym}"
    assert b"alice" not in certificate.public_bytes(Encoding.DER)
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(alternatives) == [x509.UniformResourceIdentifier("urn:pfedsecure:role:author")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [oid.dotted_string for oid in usage] == ["1.3.6.1.5.5.7.3.36"]


def test_the_times_of_a_certificate_do_not_tell_whose_it_is(tmp_path: Path, enrolled: Enrol) -> None:
    """Peers have the clients' own certificates before them, whose times are as good as a name."""
    moment = now().replace(hour=9, minute=30)
    authority = Authority.create(tmp_path / "ca", "hospitals", now=moment - timedelta(days=2))
    windows = []
    for number, name in enumerate(("alice", "bob")):
        identity = enrolled(authority, name, now=moment + timedelta(seconds=number))
        certificate = certificate_of(identity)
        windows.append((certificate.not_valid_before_utc, certificate.not_valid_after_utc))
        assert (
            timedelta()
            <= certificate.not_valid_after_utc - identity.certificate.not_valid_after_utc
            < timedelta(days=1)
        )
    assert windows[0] == windows[1]


def test_an_author_ends_with_its_authority(tmp_path: Path, enrolled: Enrol) -> None:
    authority = Authority.create(tmp_path / "ca", "hospitals")
    certificate = certificate_of(enrolled(authority, "alice", days=3649))
    assert certificate.not_valid_after_utc <= authority.certificate.not_valid_after_utc
    with pytest.raises(IdentityError, match=r"certificate of author [0-9a-f]{32} expired on"):
        verify_author(certificate.public_bytes(Encoding.DER), authority.certificate, now() + timedelta(days=3651))


def test_only_the_authority_knows_who_is_behind_a_pseudonym(authority: Authority, enrolled: Enrol) -> None:
    alice = enrolled(authority, "alice")
    (record,) = authority.issued()
    assert (record.name, record.pseudonym) == ("alice", Author.load(alice.folder).pseudonym)
    assert record.author_serial == f"{certificate_of(alice).serial_number:x}"


# ---------------------------------------------------------------------------------------------- out of place


def test_an_author_certificate_is_no_way_to_call(authority: Authority, enrolled: Enrol) -> None:
    certificate = certificate_of(enrolled(authority, "alice"))
    with pytest.raises(IdentityError, match="certificate carries no valid name and role"):
        verify(certificate, authority.certificate, now())
    with pytest.raises(IdentityError, match="certificate carries no valid name and role"):
        Peer.from_certificate(certificate, authority.certificate, now())


@pytest.mark.parametrize("role", ["client", "operator", "server"])
def test_not_even_one_that_claims_a_role(authority: Authority, role: Role) -> None:
    """Were a role to get into an author certificate by mistake, its key usage would still keep it out."""
    mark = x509.UniformResourceIdentifier(f"urn:pfedsecure:role:{role}")
    with pytest.raises(IdentityError, match="extended key usage does not fit the role"):
        verify(forged(authority, alternatives=[mark]), authority.certificate, now())


async def test_tls_refuses_an_author_certificate(authority: Authority, enrolled: Enrol) -> None:
    """A real handshake with the server's own credentials: the client's identity gets through, its author does not."""
    fl = enrolled(authority, "fl", "server", hosts=["127.0.0.1"])
    alice = enrolled(authority, "alice")
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", server_credentials(fl))
    await server.start()
    as_author = grpc.ssl_channel_credentials(
        to_pem(authority.certificate), (alice.folder / "author.key").read_bytes(), to_pem(certificate_of(alice))
    )
    try:
        for credentials, expected in [
            (channel_credentials(alice), grpc.StatusCode.UNIMPLEMENTED),  # the server has no methods: it answered
            (as_author, grpc.StatusCode.UNAVAILABLE),
        ]:
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/test/Call", bytes, bytes)(b"", timeout=10)
                assert caught.value.code() == expected
    finally:
        await server.stop(None)


def test_the_certificate_of_a_caller_is_no_author(authority: Authority, enrolled: Enrol) -> None:
    for identity in (enrolled(authority, "alice"), enrolled(authority, "fl", "server", hosts=["localhost"])):
        with pytest.raises(IdentityError, match="this is no author certificate"):
            verify_author(identity.certificate.public_bytes(Encoding.DER), authority.certificate, now())


# ---------------------------------------------------------------------------------------------- wrong


def forged(
    authority: Authority,
    *,
    subject: x509.Name | None = None,
    alternatives: list[x509.GeneralName] | None = None,
    usage: x509.ObjectIdentifier = AUTHOR_KEY_USE,
    key: ec.EllipticCurvePrivateKey | None = None,
    days: tuple[int, int] = (-1, 1),
) -> x509.Certificate:
    """An author certificate of any form, with a genuine signature."""
    public = (key or new_private_key()).public_key()
    signer = read_private_key(authority.folder / "authority.key")
    start, end = (now() + timedelta(days=day) for day in days)
    name = author_name(pseudonym_of(public)) if subject is None else subject
    marks = [AUTHOR_MARK] if alternatives is None else alternatives
    return issue(authority.certificate, signer, public, name, usage, marks, (start, end))


def judged(certificate: x509.Certificate, authority: Authority) -> str:
    return verify_author(certificate.public_bytes(Encoding.DER), authority.certificate, now()).pseudonym


def named(*texts: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text) for text in texts])


def test_the_forger_of_these_tests_can_also_make_a_genuine_one(authority: Authority) -> None:
    key = new_private_key()
    assert judged(forged(authority, key=key), authority) == pseudonym_of(key.public_key())


def test_malformed_certificates_are_refused_even_with_a_genuine_signature(authority: Authority) -> None:
    key = new_private_key()
    own = pseudonym_of(key.public_key())
    client = x509.UniformResourceIdentifier("urn:pfedsecure:role:client")
    for bad, message in [
        ({"subject": named(pseudonym_of(new_private_key().public_key()))}, "no author certificate"),  # another's
        ({"subject": named("alice")}, "no author certificate"),
        ({"subject": named(own, "alice")}, "no author certificate"),
        ({"subject": named(own.upper())}, "no author certificate"),
        ({"subject": x509.Name([])}, "no author certificate"),
        ({"alternatives": [client]}, "no author certificate"),
        ({"alternatives": [AUTHOR_MARK, client]}, "no author certificate"),
        ({"alternatives": [AUTHOR_MARK, x509.DNSName("alice.example.org")]}, "no author certificate"),
        ({"usage": ExtendedKeyUsageOID.CLIENT_AUTH}, "extended key usage does not fit the role"),
        ({"days": (-2, -1)}, rf"certificate of author {own} expired on"),
        ({"days": (1, 2)}, rf"certificate of author {own} is valid only from"),
    ]:
        with pytest.raises(IdentityError, match=message) as caught:
            judged(forged(authority, key=key, **bad), authority)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_the_author_of_another_federation(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "hospitals")
    with pytest.raises(IdentityError, match=r"certificate of author [0-9a-f]{32} was not issued by authority"):
        judged(certificate_of(enrolled(other, "alice")), authority)


@pytest.mark.parametrize("flip", [40, -1, -40])
def test_a_single_changed_bit_is_noticed(authority: Authority, enrolled: Enrol, flip: int) -> None:
    der = bytearray(Author.load(enrolled(authority, "alice").folder).certificate)
    der[flip] ^= 1
    with pytest.raises(IdentityError):
        verify_author(bytes(der), authority.certificate, now())


@pytest.mark.parametrize("der", [b"", b"\x30\x00", b"no", b"\x30" * 5000])
def test_what_is_no_certificate_at_all(authority: Authority, der: bytes) -> None:
    with pytest.raises(IdentityError, match="this is no author certificate"):
        verify_author(der, authority.certificate, now())


# ---------------------------------------------------------------------------------------------- on disk


def test_loading_refuses_what_is_not_a_sound_author(authority: Authority, enrolled: Enrol) -> None:
    alice, bob = enrolled(authority, "alice").folder, enrolled(authority, "bob").folder
    with pytest.raises(IdentityError, match=r"certificate of author [0-9a-f]{32} expired on"):
        Author.load(alice, now=now() + timedelta(days=12))
    (alice / "author.key").chmod(0o604)
    with pytest.raises(IdentityError, match=r"author.key is open to other users \(mode 0604\)"):
        Author.load(alice)
    (alice / "author.key").unlink()
    (alice / "author.key").write_bytes(private_pem(new_private_key()))
    (alice / "author.key").chmod(0o600)
    with pytest.raises(IdentityError, match=r"author.key is not the key of .*author.crt: install the kit made for"):
        Author.load(alice)
    (alice / "author.crt").write_bytes(b"no")
    with pytest.raises(IdentityError, match=r"author.crt is not one PEM certificate"):
        Author.load(alice)
    (bob / "author.crt").unlink()
    with pytest.raises(IdentityError, match=r"bob holds no author certificate: have its request approved again"):
        Author.load(bob)


def test_a_record_of_an_older_version_can_be_read(authority: Authority, enrolled: Enrol) -> None:
    path = authority.folder / "issued.jsonl"
    old = {
        "serial": "1",
        "name": "old",
        "role": "client",
        "fingerprint": "00",
        "not_after": "2099-01-01T00:00:00+00:00",
    }
    path.write_text(json.dumps(old) + "\n")
    enrolled(authority, "alice")
    first, second = authority.issued()
    assert (first.name, first.sealing_key, first.pseudonym) == ("old", None, None)
    assert second.pseudonym is not None
    assert json.loads(path.read_text().splitlines()[0]) == old
