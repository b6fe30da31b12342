"""How a client that joins proves that the pseudonym of its experts is its own, so that nobody else can take it.

Author certificates travel with experts: every member has those of the others. So the author signs, for one federation
and for the key that the client calls with, that the two are one party; a claim that somebody has seen is of no use to
anybody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from pfedsecure.errors import IdentityError
from pfedsecure.pki.author import Author, verify_author
from pfedsecure.pki.statement import statement


@dataclass(frozen=True)
class Claim:
    """An author certificate, DER, and its holder's signature; both empty where the server gives out pseudonyms."""

    certificate: bytes = b""
    signature: bytes = b""


def make_claim(author: Author, federation_id: str, caller: str) -> Claim:
    """The author's claim for whoever calls with the key of fingerprint `caller`, 64 hex digits."""
    return Claim(author.certificate, author.sign(_claimed(federation_id, caller)))


def verify_claim(claim: Claim, authority: x509.Certificate, federation_id: str, caller: str, now: datetime) -> str:
    """The pseudonym that `caller` has proved to be its own. Raises IdentityError."""
    author = verify_author(claim.certificate, authority, now)
    if not author.signed(claim.signature, _claimed(federation_id, caller)):
        raise IdentityError(
            f"the pseudonym {author.pseudonym} is not claimed by its author for this client and federation: use the "
            "author key and the identity of one kit"
        )
    return author.pseudonym


def _claimed(federation_id: str, caller: str) -> bytes:
    return statement("join", federation_id.encode(), bytes.fromhex(caller))
