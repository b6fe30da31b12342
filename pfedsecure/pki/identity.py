"""The identity of one party on its own machine: private key, certificate, and the authority that it trusts."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import Subject, fingerprint, parse_certificate, read_subject, to_pem, verify
from pfedsecure.pki.files import exists, read_public, write_public
from pfedsecure.pki.keys import private_pem, read_private_key
from pfedsecure.pki.names import Role
from pfedsecure.pki.request import KEY_FILE

CERTIFICATE_FILE = "identity.crt"
AUTHORITY_FILE = "authority.crt"


@dataclass(frozen=True)
class Identity:
    """A party's own identity, checked by `load`.

    It stays what it was when another is installed in its folder: see `current.CurrentIdentity`.
    """

    folder: Path
    certificate: x509.Certificate
    authority: x509.Certificate
    subject: Subject
    _key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)  # the certificate names it

    @classmethod
    def load(cls, folder: Path, *, role: Role | None = None, now: datetime | None = None) -> Identity:
        """The identity in `folder`, of `role` when one is demanded.

        Guaranteed on return: the key file is open to its owner alone and holds the certificate's key; `verify` has
        accepted the certificate under the folder's authority at `now`. Raises IdentityError with what to do.
        """
        certificate, authority = read_certificates(folder)
        key = read_private_key(folder / KEY_FILE)
        if fingerprint(key.public_key()) != fingerprint(certificate.public_key()):
            raise IdentityError(
                f"{folder / KEY_FILE} is not the key of {folder / CERTIFICATE_FILE}: install the kit made for this key"
            )
        subject = verify(certificate, authority, now or datetime.now(UTC))
        if role is not None and subject.role != role:
            raise IdentityError(f"{folder} is the identity of a {subject.role}, a {role} is needed: use another folder")
        return cls(folder, certificate, authority, subject, key)

    @property
    def key_path(self) -> Path:
        """The file of the private key."""
        return self.folder / KEY_FILE

    @property
    def certificate_path(self) -> Path:
        """The file of the certificate."""
        return self.folder / CERTIFICATE_FILE

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """The private key. Raises IdentityError when its file has become unreadable or open to others."""
        read_private_key(self.key_path)
        return self._key

    def private_key_pem(self) -> bytes:
        """The private key as unencrypted PEM, for TLS. Raises as `private_key`."""
        return private_pem(self.private_key())


def read_certificates(folder: Path) -> tuple[x509.Certificate, x509.Certificate]:
    """Certificate and authority certificate of the identity in `folder`, unverified; IdentityError when not there."""
    path = folder / CERTIFICATE_FILE
    if not exists(path):
        if exists(folder / KEY_FILE):
            raise IdentityError(
                f"{folder} holds a request that is not approved yet: run `pfed pki install KIT {folder}` with its kit"
            )
        raise IdentityError(
            f"{folder} holds no identity: make one with `pfed pki request {folder} --name NAME --role ROLE`"
        )
    authority_path = folder / AUTHORITY_FILE
    return (
        parse_certificate(read_public(path), str(path)),
        parse_certificate(read_public(authority_path), str(authority_path)),
    )


def install(
    folder: Path, certificate: x509.Certificate, authority: x509.Certificate, *, now: datetime | None = None
) -> Identity:
    """Puts an approved certificate beside the key that requested it; returns the identity.

    Everything is checked before anything is written. The caller has made sure that `authority` is the right one, by
    its fingerprint: nothing here can. Raises IdentityError. What else a client gets: `installation.install_kit`.
    """
    check_answers(folder, certificate, authority, now or datetime.now(UTC))
    write_public(folder / AUTHORITY_FILE, to_pem(authority))
    write_public(folder / CERTIFICATE_FILE, to_pem(certificate))  # last: it is what makes the identity complete
    return Identity.load(folder, now=now)


def check_answers(
    folder: Path, certificate: x509.Certificate, authority: x509.Certificate, now: datetime, key_file: str = KEY_FILE
) -> Subject:
    """The subject of `certificate`, which answers the request in `folder` and is acceptable; IdentityError if not.

    `key_file`: that of the key that the request was for.
    """
    key_path = folder / key_file
    if not exists(key_path):
        raise IdentityError(f"{folder} holds no key: name the folder in which `pfed pki request` made the request")
    if fingerprint(read_private_key(key_path).public_key()) != fingerprint(certificate.public_key()):
        raise IdentityError(
            f"this certificate is for {read_subject(certificate).name} with another key than {key_path}: "
            "use the kit that answers this request"
        )
    return verify(certificate, authority, now)
