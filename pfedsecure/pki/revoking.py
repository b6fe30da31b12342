"""What the authority does to revoke: it puts certificates on record as revoked, and signs the list of all of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pfedsecure.errors import IdentityError
from pfedsecure.pki import registry
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.files import exists, locked, read_public, write_public
from pfedsecure.pki.registry import REMOVED_FILE, REVOKED_FILE, IssuedRecord, RemovedRecord, RevokedRecord
from pfedsecure.pki.revocation import RevocationList

NUMBER_FILE = "revocation.json"
"""In the authority's folder: the number of the newest list."""


AFTER_EXPIRY = timedelta(days=7)
"""So long a certificate counts here as one that may still be taken: a server whose clock is behind takes it until then.

Otherwise the thief's certificate would leave the list while there is a server that it is still good for.
"""


@dataclass(frozen=True)
class Revocation:
    """What a revocation did. `revoked`: certificates that were good until now. `kept`: newest ones that stay good."""

    revoked: tuple[IssuedRecord, ...]
    kept: tuple[IssuedRecord, ...]
    list: RevocationList


def revoke(
    authority: Authority,
    names: Collection[str],
    *,
    keep_newest: bool = False,
    days: int = 30,
    now: datetime | None = None,
) -> Revocation:
    """Revokes every certificate of `names` that some clock may still find good, and signs a list of all revoked ones.

    With `keep_newest` the newest certificate of each name in each of its roles stays good: for a key that was lost or
    stolen and has been replaced. Whoever holds a revoked key under another name is revoked with it, and no revoked key
    is ever certified again. A client none of whose certificates is good any more gets no cohort secret from the next
    rotation on. Revoking twice is harmless; with no names the list is signed again, its next one due in `days`.

    All is on record before the list is signed. Raises IdentityError, with nothing done, for a name that has no
    certificate that could be revoked or was, and for the authority's own records where they are damaged.
    """
    now = now or datetime.now(UTC)
    if days < 1:
        raise IdentityError(f"a list that is good for {days} days makes no sense: give 1 day or more")
    with locked(authority.folder):
        issued = [record for record in authority.issued() if record.is_live(now - AFTER_EXPIRY)]
        before = {record.serial for record in authority.revoked()}
        for name in sorted(names):
            if all(record.name != name for record in issued):
                raise IdentityError(
                    f"{name} has no certificate that is still valid: `pfed pki show {authority.folder}` lists them"
                )
        newest = {(record.name, record.role): record for record in issued}
        kept = [record for record in newest.values() if keep_newest and record.name in names]
        chosen = [record for record in issued if record.name in names and record not in kept]
        keys = {record.fingerprint for record in chosen} - {record.fingerprint for record in kept}
        chosen += [record for record in issued if record.fingerprint in keys and record not in chosen]
        revoked = [record for record in chosen if record.serial not in before]
        at = now.isoformat(timespec="seconds")
        for record in revoked:
            key = record.fingerprint if record.fingerprint in keys else None
            entry = RevokedRecord(record.serial, record.name, record.not_after, at, key)
            registry.append(authority.folder / REVOKED_FILE, entry)
        removed = {record.serial for record in registry.read_removed(authority.folder / REMOVED_FILE)}
        for record in newest.values():
            if record.role == "client" and record in chosen and record.serial not in removed:
                registry.append(authority.folder / REMOVED_FILE, RemovedRecord(record.name, record.serial, at))
        good = (record for record in kept if record.serial not in before and record.is_live(now))
        return Revocation(tuple(revoked), tuple(good), _signed(authority, days, now))


def _signed(authority: Authority, days: int, now: datetime) -> RevocationList:
    """The list of what is on record. Certificates that expired long enough ago are left out: nobody takes them."""
    number = _next_number(authority.folder / NUMBER_FILE, now)
    revoked = {
        int(record.serial, 16): datetime.fromisoformat(record.at)
        for record in authority.revoked()
        if datetime.fromisoformat(record.not_after) >= now - AFTER_EXPIRY
    }
    return authority.sign_list(number, revoked, (now, now + timedelta(days=days)))


def _next_number(path: Path, now: datetime) -> int:
    """A number above every one before, taken on disk before it is used.

    At least the seconds since 1970, so that an authority that is restored from an older backup goes on above the lists
    that it no longer knows of: servers refuse any that is not above what they have.
    """
    try:
        last = int(json.loads(read_public(path))["number"]) if exists(path) else 0
    except (ValueError, KeyError, TypeError):
        raise IdentityError(f"{path} is damaged: restore it from its newest backup") from None
    number = max(last + 1, int(now.timestamp()))
    write_public(path, json.dumps({"number": number}).encode() + b"\n")
    return number
