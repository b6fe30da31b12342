"""A server's word for the newest head of a member's privacy ledger.

Claimed: whoever shows a ledger with a countersigned head can prove to others that the server knew all rows up to it at
that time, in that order; nobody but the holder of a server's key under the authority can make one. Nothing is claimed
about a server that signs two ledgers, or none: it can only be seen to have done so.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import UNREADABLE, verify
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.keys import require_p256
from pfedsecure.pki.statement import statement

_ALGORITHM = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


@dataclass(frozen=True)
class LedgerHead:
    """What is signed: the `number`-th head that a server remembers of a member; `head` is a SHA-256."""

    federation_id: str
    member: str
    number: int
    head: bytes

    def to_sign(self) -> bytes:
        """What the signature is over: domain-separated and unambiguous, so that no other statement reads the same."""
        return statement(
            "privacy ledger head", self.federation_id.encode(), self.member.encode(), self.number, self.head
        )


@dataclass(frozen=True)
class Countersignature:
    """ECDSA with SHA-256, DER, and the DER certificate of the key that made it."""

    certificate: bytes
    signature: bytes


def countersign(identity: Identity, head: LedgerHead) -> Countersignature:
    """That of a server. Raises IdentityError when its key cannot be read."""
    signature = identity.private_key().sign(head.to_sign(), _ALGORITHM)
    return Countersignature(identity.certificate.public_bytes(Encoding.DER), signature)


def verify_countersignature(
    made: Countersignature, head: LedgerHead, authority: x509.Certificate | None, now: datetime
) -> None:
    """Raise IdentityError unless `made` is for `head` and by a server: its certificate of `authority`, valid at `now`.

    Without an authority only that it is of the key in its own certificate.
    """
    try:
        certificate = x509.load_der_x509_certificate(made.certificate)
        key = require_p256(certificate.public_key(), "the certificate under a privacy ledger's head")
        key.verify(made.signature, head.to_sign(), _ALGORITHM)
    except (*UNREADABLE, InvalidSignature):
        raise IdentityError(
            f"the signature under the head of {head.member}'s privacy ledger is not of its certificate's key"
        ) from None
    if authority is not None and (subject := verify(certificate, authority, now)).role != "server":
        raise IdentityError(f"the head of {head.member}'s privacy ledger is signed by a {subject.role}, not a server")
