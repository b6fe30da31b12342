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


@dataclass(frozen=True)
class Revocation:
    """What a revocation did. `revoked`: certificates that were good until now."""

    revoked: tuple[IssuedRecord, ...]
    list: RevocationList


def revoke(
    authority: Authority,
    names: Collection[str],
    *,
    keep_newest: bool = False,
    days: int = 30,
    now: datetime | None = None,
) -> Revocation:
    """Revokes every certificate of `names` that has not expired, and signs a list of all that are revoked.

    With `keep_newest` the newest certificate of each name stays good: for a key that was lost or stolen and has been
    replaced. Whoever holds a revoked key under another name is revoked with it, and no revoked key is ever certified
    again. A client none of whose certificates is good any more gets no cohort secret from the next rotation on.
    Revoking twice is harmless; with no names the list is signed again, its next one due in `days`.

    All is on record before the list is signed. Raises IdentityError, with nothing done, for a name that has no
    certificate that could be revoked or was, and for the authority's own records where they are damaged.
    """
    now = now or datetime.now(UTC)
    if days < 1:
        raise IdentityError(f"a list that is good for {days} days makes no sense: give 1 day or more")
    with locked(authority.folder):
        issued = [record for record in authority.issued() if record.is_live(now)]
        before = {record.serial for record in authority.revoked()}
        for name in sorted(names):
            if all(record.name != name for record in issued):
                raise IdentityError(
                    f"{name} has no certificate that is still valid: `pfed pki show {authority.folder}` lists them"
                )
        newest = {record.name: record for record in issued}
        kept = {newest[name].serial for name in names} if keep_newest else set()
        chosen = [record for record in issued if record.name in names and record.serial not in kept]
        keys = {record.fingerprint for record in chosen} - {
            record.fingerprint for record in issued if record.serial in kept
        }
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
        return Revocation(tuple(revoked), _signed(authority, days, now))


def _signed(authority: Authority, days: int, now: datetime) -> RevocationList:
    """The list of what is on record. Certificates that have expired are left out: nobody takes them anyhow."""
    number = _next_number(authority.folder / NUMBER_FILE, now)
    revoked = {
        int(record.serial, 16): datetime.fromisoformat(record.at)
        for record in authority.revoked()
        if datetime.fromisoformat(record.not_after) >= now
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
