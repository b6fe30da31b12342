"""The development authority: a federation that certifies itself, so that a first trial needs no ceremony.

For development only. Its key lies on the machine of the server, so whoever runs the server, or any process of the
same user, can be any party. A real federation has an authority that is not the server operator: certs/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from pfedsecure.errors import IdentityError
from pfedsecure.pki.author import AUTHOR_CERTIFICATE_FILE, Author
from pfedsecure.pki.authority import CERTIFICATE_FILE as AUTHORITY_CERTIFICATE_FILE
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import read_subject
from pfedsecure.pki.cohort import COHORT_FILE, CohortSecrets
from pfedsecure.pki.files import exists, locked, make_folder, read_public
from pfedsecure.pki.identity import CERTIFICATE_FILE, Identity, read_certificates
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.names import Role, parse_host
from pfedsecure.pki.request import REQUEST_FILE, SigningRequest, request

DEVELOPMENT_FOLDER = Path("certs/dev")
DEVELOPMENT_FEDERATION = "development-only"

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_DAYS = 365


def ensure_development_pki(
    folder: Path = DEVELOPMENT_FOLDER, hosts: Sequence[str] = _LOCAL_HOSTS, *, now: datetime | None = None
) -> Identity:
    """The development server's identity, valid for `hosts`, made in `folder` with its authority if it is not there.

    An expired certificate, or one for other hosts, is replaced by one for the same key. Safe to call from several
    processes at once. Raises IdentityError, also when `folder` holds files of another kind or damaged ones.
    """
    make_folder(folder)
    with locked(folder):
        if not exists(folder / "authority"):
            Authority.create(folder / "authority", DEVELOPMENT_FEDERATION, now=now)
        return _enrolled(folder, "development-server", "server", folder / "server", hosts, now or datetime.now(UTC))


def enrol(folder: Path, name: str, role: Role, destination: Path, *, now: datetime | None = None) -> Identity:
    """The identity of `name` in `destination`, certified by the development authority in `folder` unless it is there.

    The keys are made in `destination`. A live certificate is kept, an expired one replaced for the same key. A client
    gets its author certificate and the cohort secret too; call this in the client's own process, not in the server's.
    A name given before to another key is given again: here the server alone keeps two clients from sharing one. Safe
    to call from several processes at once. Raises IdentityError when there is no development authority, or when
    `destination` holds an identity of another name, role or authority, or a client's that an older version made.
    """
    if not exists(folder / "authority" / AUTHORITY_CERTIFICATE_FILE):
        raise IdentityError(
            f"no development authority in {folder}: start `pfed-server --tls` here first, or install a certificate "
            "that your federation approved with `pfed pki install`"
        )
    with locked(folder):
        return _enrolled(folder, name, role, destination, (), now or datetime.now(UTC))


def _enrolled(folder: Path, name: str, role: Role, destination: Path, hosts: Sequence[str], now: datetime) -> Identity:
    authority = Authority.load(folder / "authority", now=now)
    if exists(destination / CERTIFICATE_FILE):
        certificate, issuer = read_certificates(destination)
        subject = read_subject(certificate)
        if issuer != authority.certificate:
            raise IdentityError(
                f"{destination} holds an identity of another authority than {folder}: use another folder"
            )
        if (subject.name, subject.role) != (name, role):
            raise IdentityError(
                f"{destination} is the identity of {subject.role} {subject.name}, not of {role} {name}: "
                "use another folder"
            )
        if now <= subject.not_after and _covers(certificate, hosts) and _is_complete(destination, role, now):
            return Identity.load(destination, role=role, now=now)
    path = destination / REQUEST_FILE
    if not exists(path):
        request(destination, name, role, hosts)
    csr = read_public(path)
    if role == "client" and SigningRequest.parse(csr, str(path)).client_keys is None:
        raise IdentityError(f"{destination} was enrolled by an older version: delete it, and it is made anew")
    kit = authority.admit(csr, name=name, role=role, days=_DAYS, hosts=hosts, replace=True, now=now)
    return install_kit(destination, kit, now=now)


def _is_complete(destination: Path, role: Role, now: datetime) -> bool:
    """Whether a live identity has all that goes with its role; IdentityError when something of that is damaged."""
    if role != "client":
        return True
    if not exists(destination / AUTHOR_CERTIFICATE_FILE) or not exists(destination / COHORT_FILE):
        return False
    Author.load(destination, now=now)
    CohortSecrets.load(destination)
    return True


def _covers(certificate: x509.Certificate, hosts: Sequence[str]) -> bool:
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {parse_host(host) for host in hosts} <= set(alternatives)
