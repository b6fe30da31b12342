"""Whether a server's revocation list is there, of its authority, new enough, and the one that the server has."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from pfed_cli.doctor.findings import Finding
from pfed_server.revocation import KEPT_FILE
from pfedsecure.errors import IdentityError
from pfedsecure.pki.files import exists, read_list
from pfedsecure.pki.identity import read_certificates
from pfedsecure.pki.revocation import RevocationList


def revocations(identity: Path, state: Path, file: Path | None, *, running: bool) -> Iterator[Finding]:
    """Of the list in `file`, and of the one that the server on `state` keeps. `running`: it runs now.

    `identity`: the server's, which has the authority's certificate. Raises IdentityError for a list that is none.
    """
    try:
        authority = read_certificates(identity)[1]
    except IdentityError:
        return  # the check of the identity says so
    given = None if file is None else _read(file, authority)
    kept = _read(state / KEPT_FILE, authority) if exists(state / KEPT_FILE) else None
    counts = max((found for found in (given, kept) if found is not None), key=lambda found: found.number, default=None)
    if counts is None:
        said = "there is no revocation list, so a stolen certificate is good until it expires: give pfed-server --crl"
        yield Finding("revocation", "warning", said)
        return
    if counts.is_overdue(datetime.now(UTC)):
        said = f"a newer list than number {counts.number} was due by {counts.next_update:%Y-%m-%d}"
        yield Finding("revocation", "warning", f"{said}: ask the authority for it (`pfed pki revoke`)")
    else:
        said = f"list {counts.number} has {len(counts.serials)} certificates; the next is due by"
        yield Finding("revocation", "ok", f"{said} {counts.next_update:%Y-%m-%d}")
    if given is not None and kept is not None:
        yield _compared(file, given, kept, running=running)


def _read(path: Path, authority: x509.Certificate) -> RevocationList:
    try:
        return RevocationList.read(read_list(path), authority, str(path))
    except IdentityError as error:
        raise IdentityError(f"{error}; without a good one pfed-server does not start") from None


def _compared(file: Path | None, given: RevocationList, kept: RevocationList, *, running: bool) -> Finding:
    if given.number < kept.number:
        said = f"{file} is list {given.number}, the server has had list {kept.number}, which goes on to count"
        return Finding("revocation", "wrong", f"{said}: ask the authority for the newest")
    if given.number > kept.number and running:
        said = f"the server that runs has list {kept.number}, and not yet list {given.number} in {file}"
        return Finding("revocation", "wrong", f"{said}: is that the file of its --crl, and can it read it?")
    if given.number == kept.number and given.serials != kept.serials:
        said = f"{file} differs from the list that the server has, of the same number {kept.number}"
        return Finding("revocation", "wrong", f"{said}: ask the authority which of them it signed")
    return Finding("revocation", "ok", f"the server has it, or takes it at its start: list {given.number}")
