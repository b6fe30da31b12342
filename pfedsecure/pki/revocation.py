"""The revocation list: which certificates of an authority count no longer, although they have not expired.

A standard X.509 CRL, so `openssl crl -in FILE -noout -text` shows one. The authority signs it and anybody may carry it;
whoever carries it can keep a new one back, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import UNREADABLE
from pfedsecure.pki.keys import require_p256

_UNDERSTOOD = (x509.CRLNumber, x509.AuthorityKeyIdentifier)


@dataclass(frozen=True)
class RevocationList:
    """A list that the authority signed. Of two lists the one with the higher `number` is the newer.

    `serials`: of the revoked certificates. `next_update`: when a newer list is due at the latest; what is on this one
    stays revoked after that. `pem`: the file.
    """

    number: int
    next_update: datetime
    serials: frozenset[int]
    pem: bytes = field(repr=False)

    @classmethod
    def sign(
        cls,
        authority: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        number: int,
        revoked: Mapping[int, datetime],
        valid: tuple[datetime, datetime],
    ) -> RevocationList:
        """`key`: the authority's. `revoked`: by serial number, since when. `valid`: now, and when the next is due."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(authority.subject)
            .last_update(valid[0])
            .next_update(valid[1])
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        )
        for serial, since in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since)
            builder = builder.add_revoked_certificate(entry.build())
        pem = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
        return cls.read(pem, authority, "the list just made")

    @classmethod
    def read(cls, pem: bytes, authority: x509.Certificate, source: str) -> RevocationList:
        """The list in `pem`, proved to be signed by `authority`, whole and unchanged.

        Not checked: that it is the newest, and that `next_update` has not passed. IdentityError naming `source` for
        anything else than such a list, also for a partial one (a delta, or one with entries of another issuer).
        """
        try:
            found = x509.load_pem_x509_crl(pem)
            issued_here = found.issuer == authority.subject and found.is_signature_valid(
                require_p256(authority.public_key(), "the authority certificate")
            )
            if not issued_here:
                raise IdentityError(f"{source} is not signed by this federation's authority: ask the authority for it")
            if not all(isinstance(extension.value, _UNDERSTOOD) for extension in found.extensions):
                raise ValueError("a partial list, or one whose entries mean something else")
            if any(len(entry.extensions) for entry in found):
                raise ValueError("an entry with conditions")
            number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            next_update = found.next_update_utc
            if next_update is None:
                raise ValueError("a list that says not when the next is due")
            return cls(number, next_update, frozenset(entry.serial_number for entry in found), pem)
        except UNREADABLE:
            raise IdentityError(f"{source} is no revocation list: get the file that `pfed pki revoke` wrote") from None

    def is_overdue(self, now: datetime | None = None) -> bool:
        """Whether the authority should have signed a newer list by `now` (timezone-aware)."""
        return (now or datetime.now(UTC)) > self.next_update
