"""Identities in the protocol: who signs, and whose signatures are believed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import UNREADABLE, verify
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.keys import require_p256

# Deterministic (RFC 6979): a signature never depends on the quality of the randomness of the moment.
_ALGORITHM = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


@dataclass(frozen=True)
class Credentials:
    """A client's certificate, DER, with its private key."""

    certificate: bytes
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of(cls, identity: Identity) -> Credentials:
        """Those of a party's TLS identity. Raises IdentityError when its key cannot be read."""
        return cls(identity.certificate.public_bytes(Encoding.DER), identity.private_key())

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256."""
        return self.key.sign(data, _ALGORITHM)


@dataclass(frozen=True)
class Signer:
    """Whose signature to expect: a client of the federation, proved by its certificate, which ends at `until`."""

    name: str
    fingerprint: str
    key: ec.EllipticCurvePublicKey
    until: datetime

    def signed(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` is this client's for `data`."""
        try:
            self.key.verify(signature, data, _ALGORITHM)
        except InvalidSignature:
            return False
        return True


class Certificates:
    """Judges client certificates under one authority, and remembers those it accepted.

    A certificate is verified once; later only the clock can change the verdict, and is asked again. Keep one object for
    all rounds of a process: verifying a cohort anew costs more than all the rest of a round.
    """

    def __init__(self, authority: x509.Certificate) -> None:
        self._authority = authority
        self._accepted: dict[bytes, tuple[Signer, datetime]] = {}

    def signer(self, certificate: bytes, now: datetime | None) -> Signer:
        """The client that a DER certificate speaks for, at `now` (timezone-aware). Raises IdentityError.

        None leaves out the clock and nothing else: for a certificate that was accepted when it came.
        """
        digest = hashlib.sha256(certificate).digest()
        known = self._accepted.get(digest)
        if known is not None and (now is None or known[1] <= now <= known[0].until):
            return known[0]
        try:
            parsed = x509.load_der_x509_certificate(certificate)
            since = max(parsed.not_valid_before_utc, self._authority.not_valid_before_utc)
            until = min(parsed.not_valid_after_utc, self._authority.not_valid_after_utc)
        except UNREADABLE:
            raise IdentityError("a certificate is not X.509 in DER: get it from its owner again") from None
        subject = verify(parsed, self._authority, now or since)
        if subject.role != "client":
            raise IdentityError(f"{subject.role} {subject.name} is not a client: only clients take part in a round")
        key = require_p256(parsed.public_key(), f"certificate of {subject.name}")
        signer = Signer(subject.name, subject.fingerprint, key, until)
        self._accepted[digest] = signer, since
        return signer


@lru_cache(maxsize=16)
def certificates_under(authority: x509.Certificate) -> Certificates:
    """The one object of this process for `authority`: parties that share a process verify nothing twice."""
    return Certificates(authority)
