"""The certificate authority of one federation: a folder with its key, its certificate and what it issued."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pfedsecure.errors import IdentityError
from pfedsecure.pki import registry
from pfedsecure.pki.certificates import KEY_USE, fingerprint, parse_certificate, to_pem, verify
from pfedsecure.pki.files import exists, locked, make_folder, read_public, reported, write_public, write_secret
from pfedsecure.pki.keys import new_private_key, private_pem, read_private_key
from pfedsecure.pki.names import ROLE_URI_PREFIX, Role, is_valid_name, validate_name
from pfedsecure.pki.registry import IssuedRecord
from pfedsecure.pki.request import SigningRequest, alternative_hosts

KEY_FILE = "authority.key"
CERTIFICATE_FILE = "authority.crt"
ISSUED_FILE = "issued.jsonl"

_LIFETIME = timedelta(days=3650)
_CLOCK_SKEW = timedelta(minutes=5)  # certificates start this much in the past: not all clocks agree


@dataclass(frozen=True)
class Authority:
    """A loaded authority. Its folder is the federation's most valuable secret: whoever reads it can be anybody."""

    folder: Path
    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)  # the certificate names it

    @classmethod
    def create(cls, folder: Path, federation_name: str, *, now: datetime | None = None) -> Authority:
        """Makes a new authority in `folder`, which must be absent or empty; all its files appear at once.

        Raises IdentityError when the name is not allowed or something is already there.
        """
        validate_name(federation_name)
        now = now or datetime.now(UTC)
        make_folder(folder.parent)
        key = new_private_key()
        with reported(folder), tempfile.TemporaryDirectory(prefix=".authority.", dir=folder.parent) as scratch:
            prepared = Path(scratch) / "authority"
            make_folder(prepared)
            write_secret(prepared / KEY_FILE, private_pem(key))
            write_public(prepared / CERTIFICATE_FILE, to_pem(_self_signed(key, federation_name, now)))
            write_public(prepared / ISSUED_FILE, b"")
            try:
                prepared.rename(folder)
            except OSError:
                raise IdentityError(
                    f"{folder} is not empty: choose another folder for a new authority, nothing was changed"
                ) from None
        return cls.load(folder, now=now)

    @classmethod
    def load(cls, folder: Path, *, now: datetime | None = None) -> Authority:
        """The authority in `folder`; IdentityError when it is missing, damaged, expired or open to other users."""
        now = now or datetime.now(UTC)
        path = folder / CERTIFICATE_FILE
        if not exists(path):
            raise IdentityError(f"{folder} holds no authority: make one with `pfed pki init {folder}`")
        certificate = parse_certificate(read_public(path), str(path))
        key = read_private_key(folder / KEY_FILE)
        if fingerprint(key.public_key()) != fingerprint(certificate.public_key()):
            raise IdentityError(f"{folder / KEY_FILE} is not the key of {path}: restore both from one backup")
        if now > certificate.not_valid_after_utc:
            raise IdentityError(f"authority in {folder} expired: make a new one and approve every party again")
        return cls(folder, certificate, key)

    @property
    def fingerprint(self) -> str:
        """Of the authority's public key, to be compared out of band by everybody who installs a kit."""
        return fingerprint(self.certificate.public_key())

    def issued(self) -> list[IssuedRecord]:
        """Every certificate ever issued, oldest first. Raises IdentityError when the record is missing or damaged."""
        return registry.read(self.folder / ISSUED_FILE)

    def approve(
        self,
        csr_pem: bytes,
        *,
        name: str,
        role: Role,
        days: int,
        hosts: Sequence[str] = (),
        replace: bool = False,
        now: datetime | None = None,
    ) -> x509.Certificate:
        """Signs a certificate for the key in `csr_pem`; name, role and hosts are the approver's words, not the CSR's.

        The certificate is on record before it is returned. A second certificate for the name of a live one is
        refused when the key differs, unless `replace`; the old certificate stays valid until it expires. Raises
        IdentityError for that, for a damaged request, and for a lifetime of no days or beyond the authority's.
        """
        now = now or datetime.now(UTC)
        requested = SigningRequest.parse(csr_pem, "the request")
        validate_name(name)
        until = self._until(now, days)
        extensions = [x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role), *alternative_hosts(role, hosts)]
        with locked(self.folder):
            self._refuse_taken(name, requested.fingerprint, now, replace)
            certificate = self._sign(requested.key, name, role, extensions, now, until)
            registry.append(self.folder / ISSUED_FILE, IssuedRecord.of(verify(certificate, self.certificate, now)))
        return certificate

    def _until(self, now: datetime, days: int) -> datetime:
        if days < 1:
            raise IdentityError(f"a certificate for {days} days makes no sense: give 1 day or more")
        end = self.certificate.not_valid_after_utc
        if days > (end - now).days:
            raise IdentityError(
                f"the authority itself ends on {end:%Y-%m-%d}: approve for {(end - now).days} days or less"
            )
        return now + timedelta(days=days)

    def _refuse_taken(self, name: str, key_fingerprint: str, now: datetime, replace: bool) -> None:
        for record in self.issued():  # read even when replacing: nothing is added to a damaged record
            if record.name == name and record.fingerprint != key_fingerprint and record.is_live(now) and not replace:
                raise IdentityError(
                    f"name {name} belongs to another key until {record.not_after[:10]}: "
                    "choose another name, or approve with --replace if its holder lost that key"
                )

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        role: Role,
        alternatives: Sequence[x509.GeneralName],
        now: datetime,
        until: datetime,
    ) -> x509.Certificate:
        return (
            _builder(key, self._key.public_key(), now, until)
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([KEY_USE[role]]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def federation_of(authority: x509.Certificate) -> str:
    """The name of the federation whose authority this certificate is; IdentityError when `create` did not make it."""
    names = [str(attribute.value) for attribute in authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if len(names) != 1 or not is_valid_name(names[0]):
        raise IdentityError("authority certificate names no federation: use one that `pfed pki init` made")
    return names[0]


def _self_signed(key: ec.EllipticCurvePrivateKey, federation_name: str, now: datetime) -> x509.Certificate:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation_name),
            x509.NameAttribute(NameOID.COMMON_NAME, "pfedsecure authority"),
        ]
    )
    return (
        _builder(key.public_key(), key.public_key(), now, now + _LIFETIME)
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    key: ec.EllipticCurvePublicKey, issuer: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits: the most that 20 positive octets hold
        .not_valid_before(now - _CLOCK_SKEW)
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
