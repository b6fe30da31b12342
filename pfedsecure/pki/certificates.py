"""Reading and verifying certificates of one federation.

`verify` is the only way from a certificate to a `Subject` that may be trusted, and only a `Subject` may call. Who
wrote an expert is another question, with certificates of its own: `author.verify_author`. Chain, signature, validity
window and critical extensions are judged by cryptography's own X.509 verifier; this module adds what is ours (name and
role) and puts a refusal into one clear line.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from pfedsecure.errors import IdentityError
from pfedsecure.pki.names import ROLE_URI_PREFIX, SUCCEEDS_URI_PREFIX, Role, is_role, is_valid_name

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises while it reads a certificate or request that somebody made to be unreadable."""

KEY_USE = {
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "operator": ExtendedKeyUsageOID.CLIENT_AUTH,
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
}


@dataclass(frozen=True)
class Subject:
    """Who a certificate speaks for. `fingerprint`: SHA-256 of the public key (SPKI, DER), 64 hex digits.

    `succeeds`: those of earlier keys of the same party, by the authority's word.
    """

    name: str
    role: Role
    fingerprint: str
    serial: int
    not_after: datetime
    succeeds: frozenset[str] = frozenset()


def fingerprint(key: PublicKeyTypes) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo, 64 lower-case hex digits; what people compare out of band."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def spaced(hexadecimal: str) -> str:
    """A fingerprint for the eye: pairs of digits with colons between."""
    return ":".join(hexadecimal[i : i + 2] for i in range(0, len(hexadecimal), 2))


def to_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def parse_certificate(pem: bytes, source: str) -> x509.Certificate:
    """The one certificate in `pem`; IdentityError naming `source` when there is none, or more than one."""
    try:
        (certificate,) = x509.load_pem_x509_certificates(pem)
    except UNREADABLE:
        raise IdentityError(f"{source} is not one PEM certificate: get it again from where it was made") from None
    return certificate


def read_subject(certificate: x509.Certificate) -> Subject:
    """What `certificate` claims, unverified. IdentityError when it is not of the form that our authority makes."""
    try:
        names = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        marks = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
        key = certificate.public_key()
    except UNREADABLE:
        raise _malformed() from None
    roles = [mark.removeprefix(ROLE_URI_PREFIX) for mark in marks if mark.startswith(ROLE_URI_PREFIX)]
    if len(names) != 1 or not is_valid_name(names[0]) or len(roles) != 1 or not is_role(roles[0]):
        raise _malformed()
    succeeds = frozenset(
        mark.removeprefix(SUCCEEDS_URI_PREFIX) for mark in marks if mark.startswith(SUCCEEDS_URI_PREFIX)
    )
    serial, not_after = certificate.serial_number, certificate.not_valid_after_utc
    return Subject(names[0], roles[0], fingerprint(key), serial, not_after, succeeds)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a server's certificate is for, unverified; none for other roles."""
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    return [*alternatives.get_values_for_type(x509.DNSName), *map(str, addresses)]


def verify(certificate: x509.Certificate, authority: x509.Certificate, now: datetime) -> Subject:
    """The subject of `certificate`, proved to be issued by `authority` itself and valid at `now` (timezone-aware).

    Guaranteed on return: the authority's signature, both validity windows, no intermediate authority, no critical
    extension that was not understood, not itself an authority, one well-formed name, one role, and a key usage that
    is exactly the one of that role, so that a client's certificate cannot pose as the server or the other way round.
    Not checked: that the presenter holds the private key (TLS does) and revocation. Raises IdentityError.
    """
    subject = read_subject(certificate)
    verify_issued(certificate, authority, now, KEY_USE[subject.role], f"{subject.role} {subject.name}")
    return subject


def verify_caller(pem: bytes, authority: x509.Certificate, now: datetime) -> Subject:
    """As `verify`, for the one certificate in `pem` that a caller showed.

    What does not change with time is judged once for all calls with a certificate: a server is asked thousands of times
    in a round. Its validity is judged each time. Raises IdentityError.
    """
    with suppress(IdentityError):  # what is told of a refusal is about `now`
        subject, since, until = _verified_once(pem, authority)
        if since <= now <= until:
            return subject
    return verify(parse_certificate(pem, _CALLERS), authority, now)


_CALLERS = "the certificate of the caller"


@lru_cache(maxsize=4096)
def _verified_once(pem: bytes, authority: x509.Certificate) -> tuple[Subject, datetime, datetime]:
    """The subject of a certificate, and from when to when it and its authority are valid, both included."""
    certificate = parse_certificate(pem, _CALLERS)
    since = max(certificate.not_valid_before_utc, authority.not_valid_before_utc)
    until = min(certificate.not_valid_after_utc, authority.not_valid_after_utc)
    return verify(certificate, authority, since), since, until


def verify_issued(
    certificate: x509.Certificate, authority: x509.Certificate, now: datetime, usage: x509.ObjectIdentifier, who: str
) -> None:
    """The part of `verify` that is the same for every kind of certificate: all but whom it names.

    `usage`: the one key usage that it must be for. `who` goes into the IdentityError that refuses it.
    """
    # How many bits of a signature's last byte do not count is not signed: one certificate would have several forms.
    if not certificate.public_bytes(Encoding.DER).endswith(b"\0" + certificate.signature):
        raise IdentityError(
            f"certificate of {who} is not in the form that it was issued in: get it from its owner again"
        )
    ca_policy, ee_policy = _policies(usage)
    verifier = (
        PolicyBuilder()
        .store(_store(authority))
        .time(now)
        .extension_policies(ca_policy=ca_policy, ee_policy=ee_policy)
        .build_client_verifier()
    )
    try:
        verifier.verify(certificate, [])
    except VerificationError as error:
        raise IdentityError(_why_refused(certificate, f"certificate of {who}", authority, now, error)) from None


@lru_cache(maxsize=16)
def _store(authority: x509.Certificate) -> Store:
    return Store([authority])


@cache
def _policies(usage: x509.ObjectIdentifier) -> tuple[ExtensionPolicy, ExtensionPolicy]:
    """For authorities and for leaves, whose extended key usage is exactly `usage`."""

    def exactly_that(_policy: Policy, _certificate: x509.Certificate, found: x509.ExtendedKeyUsage) -> None:
        if list(found) != [usage]:
            raise ValueError("extended key usage does not fit the role")

    leaves = ExtensionPolicy.webpki_defaults_ee().require_present(
        x509.ExtendedKeyUsage, Criticality.AGNOSTIC, exactly_that
    )
    return ExtensionPolicy.webpki_defaults_ca(), leaves


def _why_refused(
    certificate: x509.Certificate, who: str, authority: x509.Certificate, now: datetime, error: VerificationError
) -> str:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return f"{who} was not issued by authority {_mark(authority)}: use a certificate that this federation approved"
    for what, window in ((who, certificate), (f"authority {_mark(authority)}", authority)):
        if now > window.not_valid_after_utc:
            return f"{what} expired on {window.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: request a new one"
        if now < window.not_valid_before_utc:
            return f"{what} is valid only from {window.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: check the clocks"
    return f"{who} is not acceptable ({error}): request a new one"


def _mark(authority: x509.Certificate) -> str:
    """The first digits of an authority's fingerprint, enough to see that two differ."""
    return fingerprint(authority.public_key())[:16]


def _malformed() -> IdentityError:
    return IdentityError("certificate carries no valid name and role: use one that `pfed pki approve` made")
