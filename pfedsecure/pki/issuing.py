"""The form of the certificates that an authority signs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pfedsecure.pki.author import AUTHOR_KEY_USE, AUTHOR_MARK, author_name, pseudonym_of

CLOCK_SKEW = timedelta(minutes=5)
"""Certificates start this much in the past: not all clocks agree."""

_LIFETIME = timedelta(days=3650)


def issue(
    authority: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    usage: x509.ObjectIdentifier,
    alternatives: Sequence[x509.GeneralName],
    valid: tuple[datetime, datetime],
) -> x509.Certificate:
    """A certificate of `authority`, whose private key is `signer`, for `key`. `valid`: its first and last moment."""
    return (
        _builder(key, signer.public_key(), *valid)
        .subject_name(subject)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(signer, hashes.SHA256())
    )


def author_certificate(
    authority: x509.Certificate, signer: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.Certificate:
    """For an author key of a client whose own certificate ends at `until`.

    Peers see both certificates. Were their times the same to the second, they would tell whose pseudonym it is; so this
    one begins with the authority and ends at the midnight (UTC) that follows.
    """
    midnight = datetime.combine(until.date() + timedelta(days=1), time(), UTC)
    valid = authority.not_valid_before_utc, min(midnight, authority.not_valid_after_utc)
    return issue(authority, signer, key, author_name(pseudonym_of(key)), AUTHOR_KEY_USE, [AUTHOR_MARK], valid)


def self_signed(key: ec.EllipticCurvePrivateKey, federation_name: str, now: datetime) -> x509.Certificate:
    """The certificate of a new authority, for ten years."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation_name),
            x509.NameAttribute(NameOID.COMMON_NAME, "pfedsecure authority"),
        ]
    )
    return (
        _builder(key.public_key(), key.public_key(), now - CLOCK_SKEW, now + _LIFETIME)
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    key: ec.EllipticCurvePublicKey, issuer: ec.EllipticCurvePublicKey, since: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits: the most that 20 positive octets hold
        .not_valid_before(since)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
