"""Every way in which a certificate can be wrong. Forged ones carry a genuine signature where it helps."""

from __future__ import annotations

import base64
import shutil
import subprocess
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pfedsecure.errors import IdentityError
from pfedsecure.pki.author import verify_author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import fingerprint, hosts_of, parse_certificate, spaced, to_pem, verify
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.keys import new_private_key, read_private_key
from pfedsecure.secagg import Certificates

Enrol = Callable[..., Identity]


def now() -> datetime:
    return datetime.now(UTC)


CLIENT_MARK = x509.UniformResourceIdentifier("urn:pfedsecure:role:client")


def forged(
    authority: Authority,
    *,
    names: tuple[str, ...] = ("mallory",),
    alternatives: tuple[x509.GeneralName, ...] = (CLIENT_MARK,),
    usage: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.CLIENT_AUTH,),
    is_authority: bool = False,
    extra: tuple[x509.ExtensionType, bool] | None = None,
    key: ec.EllipticCurvePrivateKey | None = None,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
) -> x509.Certificate:
    """A certificate of any form, signed with the authority's key unless by another `issuer`."""
    issuing, signer = issuer or (authority.certificate, read_private_key(authority.folder / "authority.key"))
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]))
        .issuer_name(issuing.subject)
        .public_key((key or new_private_key()).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - timedelta(days=1))
        .not_valid_after(now() + timedelta(days=1))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    if extra:
        builder = builder.add_extension(*extra)
    return builder.sign(signer, hashes.SHA256())


def test_a_genuine_certificate_gives_its_subject(authority: Authority, enrolled: Enrol) -> None:
    identity = enrolled(authority, "alice", days=10)
    subject = verify(identity.certificate, authority.certificate, now())
    assert (subject.name, subject.role, subject.serial) == ("alice", "client", identity.certificate.serial_number)
    assert timedelta(days=9) < subject.not_after - now() < timedelta(days=11)
    assert subject.fingerprint == fingerprint(identity.private_key().public_key())


def test_the_forger_of_these_tests_can_also_make_a_genuine_one(authority: Authority) -> None:
    assert verify(forged(authority), authority.certificate, now()).name == "mallory"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"names": ()}, "carries no valid name and role"),
        ({"names": ("a", "b")}, "carries no valid name and role"),
        ({"names": ("../alice",)}, "carries no valid name and role"),
        ({"alternatives": ()}, "carries no valid name and role"),
        ({"alternatives": (x509.DNSName("a.org"),)}, "carries no valid name and role"),
        ({"alternatives": (x509.UniformResourceIdentifier("urn:pfedsecure:role:root"),)}, "no valid name and role"),
        (
            {"alternatives": (CLIENT_MARK, x509.UniformResourceIdentifier("urn:pfedsecure:role:operator"))},
            "carries no valid name and role",
        ),
        ({"usage": ()}, "certificate of client mallory is not acceptable"),
        ({"usage": (ExtendedKeyUsageOID.SERVER_AUTH,)}, "extended key usage does not fit the role"),
        (
            {"usage": (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)},
            "extended key usage does not fit the role",
        ),
        ({"is_authority": True}, "certificate of client mallory is not acceptable"),
        (
            {"extra": (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)},
            "certificate of client mallory is not acceptable",
        ),
    ],
)
def test_malformed_certificates_are_refused_even_with_a_genuine_signature(
    authority: Authority, fault: dict[str, object], message: str
) -> None:
    with pytest.raises(IdentityError, match=message) as caught:
        verify(forged(authority, **fault), authority.certificate, now())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_client_certificate_is_no_authority(authority: Authority, enrolled: Enrol) -> None:
    alice = enrolled(authority, "alice")
    by_alice = forged(authority, issuer=(alice.certificate, alice.private_key()))
    with pytest.raises(IdentityError, match="mallory was not issued by authority"):
        verify(by_alice, authority.certificate, now())
    with pytest.raises(IdentityError, match="certificate of client mallory is not acceptable"):
        verify(by_alice, alice.certificate, now())


def test_there_are_no_intermediate_authorities(authority: Authority) -> None:
    key = new_private_key()
    intermediate = forged(authority, names=("sub",), is_authority=True, key=key)
    with pytest.raises(IdentityError, match="mallory was not issued by authority"):
        verify(forged(authority, issuer=(intermediate, key)), authority.certificate, now())


def test_another_authority_of_the_same_name_does_not_count(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", "hospitals")
    assert other.certificate.subject == authority.certificate.subject
    with pytest.raises(
        IdentityError, match=r"client alice was not issued by authority [0-9a-f]{16}: use a certificate"
    ):
        verify(enrolled(other, "alice").certificate, authority.certificate, now())


@pytest.mark.parametrize("flip", [40, -1, -40])
def test_a_single_changed_bit_is_noticed(authority: Authority, enrolled: Enrol, flip: int) -> None:
    der = bytearray(enrolled(authority, "alice").certificate.public_bytes(Encoding.DER))
    der[flip] ^= 1
    with pytest.raises(IdentityError):
        verify(parse_certificate(_as_pem(bytes(der)), "alice"), authority.certificate, now())


def test_whatever_bits_are_changed_the_error_is_ours(authority: Authority, enrolled: Enrol) -> None:
    """The parser has errors of its own for some; one that came through would end whoever reads the certificate."""
    der = enrolled(authority, "alice").certificate.public_bytes(Encoding.DER)
    with warnings.catch_warnings(category=CryptographyDeprecationWarning, action="ignore"):
        for position in range(len(der)):
            for bit in (0x01, 0x20, 0x80):
                changed = der[:position] + bytes([der[position] ^ bit]) + der[position + 1 :]
                with pytest.raises(IdentityError):
                    verify(parse_certificate(_as_pem(changed), "alice"), authority.certificate, now())
                with pytest.raises(IdentityError):
                    Certificates(authority.certificate).signer(changed, now())
                with pytest.raises(IdentityError):
                    verify_author(changed, authority.certificate, now())


def test_validity_windows(authority: Authority, enrolled: Enrol) -> None:
    certificate = enrolled(authority, "alice", days=1).certificate
    assert verify(certificate, authority.certificate, certificate.not_valid_after_utc).name == "alice"
    with pytest.raises(IdentityError, match=r"certificate of client alice expired on 20.* UTC: request a new one"):
        verify(certificate, authority.certificate, certificate.not_valid_after_utc + timedelta(seconds=1))
    assert verify(certificate, authority.certificate, certificate.not_valid_before_utc).name == "alice"
    with pytest.raises(IdentityError, match=r"alice is valid only from .* UTC: check the clocks"):
        verify(certificate, authority.certificate, certificate.not_valid_before_utc - timedelta(seconds=1))


def test_an_expired_authority_vouches_for_nobody(tmp_path: Path) -> None:
    past = now() - timedelta(days=3650 - 1, hours=12)
    old = Authority.create(tmp_path / "old", "hospitals", now=past)
    certificate = forged(old)
    assert verify(certificate, old.certificate, now()).name == "mallory"
    with pytest.raises(IdentityError, match=r"authority [0-9a-f]{16} expired on"):
        verify(certificate, old.certificate, now() + timedelta(hours=18))


def test_hosts(authority: Authority, enrolled: Enrol) -> None:
    server = enrolled(authority, "fl", "server", hosts=("fl.example.org", "::1", "10.0.0.7"))
    assert hosts_of(server.certificate) == ["fl.example.org", "::1", "10.0.0.7"]
    assert hosts_of(enrolled(authority, "alice").certificate) == []


def test_parse_refuses_anything_but_one_certificate(authority: Authority) -> None:
    pem = to_pem(authority.certificate)
    assert parse_certificate(pem, "x") == authority.certificate
    for bad in (b"", b"no", pem + pem, pem[:200]):
        with pytest.raises(IdentityError, match="x is not one PEM certificate"):
            parse_certificate(bad, "x")


def test_spaced() -> None:
    assert spaced("0a1b2c") == "0a:1b:2c"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_openssl_agrees(authority: Authority, enrolled: Enrol) -> None:
    """A second implementation accepts chain and purposes strictly, and computes the same fingerprint."""
    server = enrolled(authority, "fl", "server", hosts=("fl.example.org", "127.0.0.1"))
    client = enrolled(authority, "alice")
    for identity, purpose, other in ((server, "sslserver", "sslclient"), (client, "sslclient", "sslserver")):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", str(identity.folder / "authority.crt"), "-purpose"]
        assert subprocess.run([*command, purpose, identity.certificate_path], capture_output=True).returncode == 0
        assert subprocess.run([*command, other, identity.certificate_path], capture_output=True).returncode != 0
    pipeline = f"openssl pkey -in {client.key_path} -pubout -outform DER | openssl dgst -sha256 -r"
    printed = subprocess.run(pipeline, shell=True, capture_output=True, text=True, check=True).stdout
    assert printed.split()[0] == client.subject.fingerprint


def _as_pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
