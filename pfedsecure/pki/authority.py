"""The certificate authority of one federation: a folder with its key, its certificate, what it issued, and the newest
secret that its clients share.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.x509.oid import NameOID

from pfedsecure.errors import IdentityError
from pfedsecure.pki import epochs, registry
from pfedsecure.pki.author import pseudonym_of
from pfedsecure.pki.certificates import KEY_USE, fingerprint, parse_certificate, to_pem, verify
from pfedsecure.pki.files import exists, locked, make_folder, read_public, reported, write_public, write_secret
from pfedsecure.pki.issuing import CLOCK_SKEW, author_certificate, issue, self_signed
from pfedsecure.pki.keys import new_private_key, private_pem, read_private_key, sealing_hex
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.names import ROLE_URI_PREFIX, SUCCEEDS_URI_PREFIX, Role, is_valid_name, validate_name
from pfedsecure.pki.registry import REMOVED_FILE, REVOKED_FILE, IssuedRecord, RevokedRecord
from pfedsecure.pki.request import SigningRequest, alternative_hosts
from pfedsecure.pki.revocation import RevocationList
from pfedsecure.pki.sealed import SealedSecret

KEY_FILE = "authority.key"
CERTIFICATE_FILE = "authority.crt"
ISSUED_FILE = "issued.jsonl"

MOST_SUCCEEDED = 4
"""Keys of its past that a certificate names: who has not seen a party for more renewals does not know it again."""


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
            write_public(prepared / CERTIFICATE_FILE, to_pem(self_signed(key, federation_name, now)))
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

    def revoked(self) -> list[RevokedRecord]:
        """Every certificate ever revoked, oldest first. Raises IdentityError when the record is damaged."""
        return registry.read_revoked(self.folder / REVOKED_FILE)

    def sign_list(
        self, number: int, revoked: Mapping[int, datetime], valid: tuple[datetime, datetime]
    ) -> RevocationList:
        """See `RevocationList.sign`. What belongs on the list is the business of `revoking.revoke`."""
        return RevocationList.sign(self.certificate, self._key, number, revoked, valid)

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

        The certificate alone: a client with no more is no member to `rotate`. `admit` gives all that its role needs.
        """
        now = now or datetime.now(UTC)
        requested = SigningRequest.parse(csr_pem, "the request")
        with locked(self.folder):
            certificate, record = self._certified(requested, name, role, days, hosts, replace, False, now)
            registry.append(self.folder / ISSUED_FILE, record)
        return certificate

    def admit(
        self,
        csr_pem: bytes,
        *,
        name: str,
        role: Role,
        days: int,
        hosts: Sequence[str] = (),
        replace: bool = False,
        heir: bool = False,
        now: datetime | None = None,
    ) -> Kit:
        """Approves as `approve` does, and makes the kit to install.

        A request that `renewal.renew` made needs no `replace`: the key of a certificate that is still good has agreed.
        Its certificate says which keys it succeeds, so that the server knows the party again. So does that of `heir`:
        the approver vouches that whoever asks is who had the name's last key.

        A client's holds an author certificate and the newest cohort secret, which the first client's approval makes;
        nothing here makes or reads that secret for a server or an operator. Raises IdentityError also when a client's
        request lacks the keys for it, or when the secret that clients already have is missing here.
        """
        now = now or datetime.now(UTC)
        requested = SigningRequest.parse(csr_pem, "the request")
        keys = requested.client_keys if role == "client" else None
        if role == "client" and keys is None:
            raise IdentityError(
                "the request lacks the keys that a client needs, an older version made it: delete that file where it "
                "was made and run `pfed pki request` there again"
            )
        with locked(self.folder):
            certificate, record = self._certified(requested, name, role, days, hosts, replace, heir, now)
            kit = Kit(self.certificate, certificate)
            if keys is not None:
                author = author_certificate(self.certificate, self._key, keys.author, certificate.not_valid_after_utc)
                record = record.with_author(sealing_hex(keys.sealing), pseudonym_of(keys.author), author.serial_number)
                kit = Kit(self.certificate, certificate, author, self.seal(self._epoch(), record))
            registry.append(self.folder / ISSUED_FILE, record)
        return kit

    def seal(self, epoch: epochs.Epoch, client: IssuedRecord) -> SealedSecret:
        """The secret of `epoch` for a client on record with its sealing key."""
        assert client.sealing_key is not None
        key = X25519PublicKey.from_public_bytes(bytes.fromhex(client.sealing_key))
        return SealedSecret.seal(epoch.secret, epoch.number, client.fingerprint, key, self._key)

    def _epoch(self) -> epochs.Epoch:
        """The current epoch; the first one when no client was given any. Called under the lock."""
        epoch = epochs.read(self.folder)
        if epoch is None and any(record.sealing_key is not None for record in self.issued()):
            raise IdentityError(
                f"{self.folder / epochs.EPOCH_FILE} is missing, but clients hold its secret: restore the newest backup"
            )
        return epoch or epochs.first(self.folder)

    def _certified(
        self,
        requested: SigningRequest,
        name: str,
        role: Role,
        days: int,
        hosts: Sequence[str],
        replace: bool,
        heir: bool,
        now: datetime,
    ) -> tuple[x509.Certificate, IssuedRecord]:
        """A certificate and what is to be recorded of it. Called under the lock."""
        validate_name(name)
        until = self._until(now, days)
        if requested.renews is not None and not replace:
            self._refuse_removed(name, role)
        succeeds = self._succeeded(requested, name, role, heir, now)
        self._refuse_taken(name, requested.fingerprint, now, replace or requested.renews is not None)
        marks = (ROLE_URI_PREFIX + role, *(SUCCEEDS_URI_PREFIX + key for key in succeeds))
        alternatives = [*map(x509.UniformResourceIdentifier, marks), *alternative_hosts(role, hosts)]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = issue(
            self.certificate, self._key, requested.key, subject, KEY_USE[role], alternatives, (now - CLOCK_SKEW, until)
        )
        return certificate, IssuedRecord.of(verify(certificate, self.certificate, now), succeeds)

    def _succeeded(
        self, requested: SigningRequest, name: str, role: Role, heir: bool, now: datetime
    ) -> tuple[str, ...]:
        """Fingerprints of earlier keys of whoever made the request, the newest first; see `admit`."""
        held = [record for record in self.issued() if (record.name, record.role) == (name, role)]
        if requested.renews is not None:
            revoked = {record.serial for record in self.revoked()}
            good = [record for record in held if record.is_live(now) and record.serial not in revoked]
            # The newest alone: whoever has a key that was replaced, and not revoked, is somebody else.
            if not good or good[-1].fingerprint not in (requested.renews, requested.fingerprint):
                raise IdentityError(
                    f"this request renews no certificate that {role} {name} has and that is still good: have a new "
                    "request made with `pfed pki request` in another folder, and compare its fingerprint"
                )
        if not held or not (heir or requested.renews or held[-1].fingerprint == requested.fingerprint):
            return ()
        before = (held[-1].fingerprint, *(held[-1].succeeds or "").split())
        return tuple(key for key in before if key != requested.fingerprint)[:MOST_SUCCEEDED]

    def _refuse_removed(self, name: str, role: Role) -> None:
        """A member that a rotation removed does not come back by a renewal, which nobody looks at twice."""
        removed = {record.serial: record.at for record in registry.read_removed(self.folder / REMOVED_FILE)}
        newest = [record for record in self.issued() if (record.name, record.role) == (name, role)][-1:]
        for record in newest:
            if record.serial in removed:
                raise IdentityError(
                    f"{name} was removed from the cohort on {removed[record.serial][:10]}: approve with --replace to "
                    "take it in again"
                )

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
        if any(record.fingerprint == key_fingerprint for record in self.revoked()):
            raise IdentityError(
                "the key of this request was revoked: make new keys with `pfed pki request` in another folder"
            )
        for record in self.issued():  # read even when replacing: nothing is added to a damaged record
            if record.name == name and record.fingerprint != key_fingerprint and record.is_live(now) and not replace:
                raise IdentityError(
                    f"name {name} belongs to another key until {record.not_after[:10]}: choose another name, or "
                    "approve with --replace if its holder lost that key, or it was revoked"
                )


def federation_of(authority: x509.Certificate) -> str:
    """The name of the federation whose authority this certificate is; IdentityError when `create` did not make it."""
    names = [str(attribute.value) for attribute in authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if len(names) != 1 or not is_valid_name(names[0]):
        raise IdentityError("authority certificate names no federation: use one that `pfed pki init` made")
    return names[0]
