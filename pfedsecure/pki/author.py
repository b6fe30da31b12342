"""Authors: pseudonyms under which clients sign experts, so that peers can verify one without learning a name.

An author certificate says that a client of the federation holds a key, and not which client: its one name is the
pseudonym, the beginning of the hash of that key. The authority's record alone tells who is behind it. It is no
certificate for calls: `certificates.verify` and TLS refuse it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import UNREADABLE, fingerprint, parse_certificate, verify_issued
from pfedsecure.pki.files import exists, read_public
from pfedsecure.pki.identity import read_certificates
from pfedsecure.pki.keys import read_private_key, require_p256
from pfedsecure.pki.names import ROLE_URI_PREFIX
from pfedsecure.pki.request import AUTHOR_KEY_FILE

AUTHOR_CERTIFICATE_FILE = "author.crt"

AUTHOR_MARK = x509.UniformResourceIdentifier(ROLE_URI_PREFIX + "author")
AUTHOR_KEY_USE = x509.ObjectIdentifier("1.3.6.1.5.5.7.3.36")  # document signing, RFC 9336
PSEUDONYM_DIGITS = 32

# Deterministic (RFC 6979): a signature never depends on the quality of the randomness of the moment.
_ALGORITHM = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


@dataclass(frozen=True)
class Author:
    """A client's own signing identity. `pseudonym`: 32 hex digits. `certificate`: DER, to go with every signature.

    Against peers: the certificate links to the client's name only through the day on which it ends, which every client
    approved on one day for the same time shares. All that one client signs is linked, also across renewed certificates.
    """

    pseudonym: str
    certificate: bytes
    _key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path, *, now: datetime | None = None) -> Author:
        """The author in the identity folder `folder`.

        Guaranteed on return: the key file is open to its owner alone and holds the certificate's key; `verify_author`
        has accepted the certificate under the folder's authority at `now`. Raises IdentityError with what to do.
        """
        _certificate, authority = read_certificates(folder)
        path = folder / AUTHOR_CERTIFICATE_FILE
        if not exists(path):
            raise IdentityError(
                f"{folder} holds no author certificate: have its request approved again and install the kit"
            )
        der = parse_certificate(read_public(path), str(path)).public_bytes(Encoding.DER)
        verified = verify_author(der, authority, now or datetime.now(UTC))
        key = read_private_key(folder / AUTHOR_KEY_FILE)
        if pseudonym_of(key.public_key()) != verified.pseudonym:
            raise IdentityError(
                f"{folder / AUTHOR_KEY_FILE} is not the key of {path}: install the kit made for this key"
            )
        return cls(verified.pseudonym, der, key)

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256, DER."""
        return self._key.sign(data, _ALGORITHM)


@dataclass(frozen=True)
class VerifiedAuthor:
    """Whose signature to expect: some client of the federation, proved by its author certificate."""

    pseudonym: str
    not_after: datetime
    _key: ec.EllipticCurvePublicKey = field(repr=False, compare=False)  # the pseudonym names it

    def signed(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` is this author's for `data`."""
        try:
            self._key.verify(signature, data, _ALGORITHM)
        except InvalidSignature:
            return False
        return True


def verify_author(certificate: bytes, authority: x509.Certificate, now: datetime) -> VerifiedAuthor:
    """The author of a DER certificate, proved to be issued by `authority` itself and valid at `now` (timezone-aware).

    Guaranteed on return: all that `certificates.verify` guarantees, with an author's role and key usage in the place of
    a caller's; the pseudonym is the hash of the key, so nobody else can have it; and the certificate names nothing
    else. Not checked: revocation. Raises IdentityError.
    """
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        subject = parsed.subject
        alternatives = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = require_p256(parsed.public_key(), "an author certificate")
    except UNREADABLE:
        raise _malformed() from None
    pseudonym = pseudonym_of(key)
    if subject != author_name(pseudonym) or list(alternatives) != [AUTHOR_MARK]:
        raise _malformed()
    verify_issued(parsed, authority, now, AUTHOR_KEY_USE, f"author {pseudonym}")
    return VerifiedAuthor(pseudonym, min(parsed.not_valid_after_utc, authority.not_valid_after_utc), key)


def pseudonym_of(key: ec.EllipticCurvePublicKey) -> str:
    """The first 128 bits of the fingerprint: too many for anybody to find a second key for them."""
    return fingerprint(key)[:PSEUDONYM_DIGITS]


def author_name(pseudonym: str) -> x509.Name:
    """The whole subject of an author certificate."""
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, pseudonym)])


def _malformed() -> IdentityError:
    return IdentityError("this is no author certificate: take it from an author that `pfed pki approve` made")
