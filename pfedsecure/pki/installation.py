"""Installing a kit beside the keys that requested it: every check first, every file after."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki import cohort
from pfedsecure.pki.author import AUTHOR_CERTIFICATE_FILE, pseudonym_of, verify_author
from pfedsecure.pki.certificates import Subject, fingerprint, read_subject, to_pem
from pfedsecure.pki.files import exists, locked, reported, write_public
from pfedsecure.pki.identity import Identity, check_answers, install, read_certificates
from pfedsecure.pki.keys import read_private_key, read_sealing_key
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.request import AUTHOR_KEY_FILE, KEY_FILE, NEXT_KEY_FILE, RENEWAL_FILE, SEALING_KEY_FILE


def install_kit(folder: Path, kit: Kit, *, now: datetime | None = None) -> Identity:
    """Puts all that `kit` brings into `folder`; returns the identity there.

    Guaranteed against whoever had the kit in its hands on the way: nothing of it was changed, the cohort secret is one
    that the authority made for this very client, and no kit brings back an older epoch or another secret for a known
    one. Everything is checked before anything is written. The caller has made sure that the authority of an approval
    is the right one, by its fingerprint; that of a rotation must be the one installed. Raises IdentityError.
    """
    now = now or datetime.now(UTC)
    key_file = KEY_FILE
    if kit.certificate is None:
        if Identity.load(folder, role="client", now=now).authority != kit.authority:
            raise IdentityError(f"this kit is of another authority than the one of {folder}: nothing was done")
    else:
        if _answers_renewal(folder, kit.certificate):
            key_file = NEXT_KEY_FILE
            _check_same_party(folder, kit.certificate, kit.authority)
        subject = check_answers(folder, kit.certificate, kit.authority, now, key_file)
        _check_complete(subject, kit)
    if kit.author is not None:
        _check_author(folder, kit.author, kit.authority, now)
    with locked(folder):
        if kit.sealed is not None:
            owner = fingerprint(kit.authority.public_key())
            recipient = fingerprint(read_private_key(folder / key_file).public_key())
            secret = kit.sealed.open(read_sealing_key(folder / SEALING_KEY_FILE), recipient, kit.authority)
            cohort.write(folder, owner, cohort.extended(folder, owner, kit.sealed.epoch, secret))
        if kit.author is not None:
            write_public(folder / AUTHOR_CERTIFICATE_FILE, to_pem(kit.author))
        if kit.certificate is not None:  # last: it is what makes the identity complete
            if key_file == NEXT_KEY_FILE:  # the old key is gone with this; dying here, installing again goes on
                with reported(folder / KEY_FILE):
                    (folder / NEXT_KEY_FILE).replace(folder / KEY_FILE)
                    (folder / RENEWAL_FILE).unlink(missing_ok=True)
            return install(folder, kit.certificate, kit.authority, now=now)
    return Identity.load(folder, now=now)


def _answers_renewal(folder: Path, certificate: x509.Certificate) -> bool:
    path = folder / NEXT_KEY_FILE
    if not exists(path):
        return False
    return fingerprint(read_private_key(path).public_key()) == fingerprint(certificate.public_key())


def _check_same_party(folder: Path, certificate: x509.Certificate, authority: x509.Certificate) -> None:
    installed, known = read_certificates(folder)
    old, new = read_subject(installed), read_subject(certificate)
    if authority != known or (new.name, new.role) != (old.name, old.role):
        raise IdentityError(
            f"this kit makes {new.role} {new.name} of {old.role} {old.name} in {folder}, or is of another authority: "
            "nothing was done, ask for a new approval"
        )


def _check_complete(subject: Subject, kit: Kit) -> None:
    if subject.role == "client" and kit.sealed is None:
        raise IdentityError(f"this kit lacks the cohort secret of client {subject.name}: ask for a new approval")
    if subject.role != "client" and kit.sealed is not None:
        raise IdentityError(f"this kit gives {subject.role} {subject.name} a secret of clients: ask for a new approval")


def _check_author(folder: Path, certificate: x509.Certificate, authority: x509.Certificate, now: datetime) -> None:
    author = verify_author(certificate.public_bytes(Encoding.DER), authority, now)
    path = folder / AUTHOR_KEY_FILE
    if author.pseudonym != pseudonym_of(read_private_key(path).public_key()):
        raise IdentityError(f"this kit has an author certificate for another key than {path}: ask for a new approval")
