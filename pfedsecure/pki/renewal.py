"""Renewing an identity before it expires: a new key, vouched for by the old one, in the same folder and under one name.

A client's sealing key and author key stay: kits that are under way can still be opened, and peers know its experts by
the same pseudonym. Who may have lost those to somebody else makes new ones, with `request` in another folder.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pfedsecure.pki.certificates import hosts_of
from pfedsecure.pki.files import exists, write_public
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.keys import new_private_key, read_private_key
from pfedsecure.pki.names import ROLE_URI_PREFIX
from pfedsecure.pki.request import (
    NEXT_KEY_FILE,
    RENEWAL_FILE,
    alternative_hosts,
    client_marks,
    make_key,
    renewal_marks,
)


def renew(folder: Path) -> Path:
    """Makes the next key of the identity in `folder` and a request to certify it; returns the path of the request.

    The identity goes on to work until the kit that answers is installed. Repeating it changes nothing: the request that
    is there is the one to be approved. Raises IdentityError, also when the identity has expired: then it is too late,
    and a new request is made in another folder.
    """
    identity = Identity.load(folder)
    path = folder / RENEWAL_FILE
    if exists(path) and exists(folder / NEXT_KEY_FILE):
        return path
    role, name = identity.subject.role, identity.subject.name
    make_key(folder / NEXT_KEY_FILE, new_private_key())
    key = read_private_key(folder / NEXT_KEY_FILE)
    marks = [x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role)]
    if role == "client":
        marks += client_marks(folder, key.public_key())
    marks += renewal_marks(identity.private_key(), key.public_key())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_extension(
            x509.SubjectAlternativeName([*marks, *alternative_hosts(role, hosts_of(identity.certificate))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    write_public(path, csr.public_bytes(Encoding.PEM))
    return path
