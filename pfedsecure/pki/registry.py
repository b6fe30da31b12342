"""The authority's append-only records, one JSON object a line: every certificate that it issued, every one that it
revoked, and every member that it removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import Subject
from pfedsecure.pki.files import exists, read_list, reported

REMOVED_FILE = "removed.jsonl"
"""In the authority's folder: members that later rotations leave out too, until they are approved again."""

REVOKED_FILE = "revoked.jsonl"
"""In the authority's folder: certificates that count no longer."""

_SEALING_KEY_BYTES = 32

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class IssuedRecord:
    """One issued certificate. `serial` and `fingerprint` in hexadecimal, `not_after` in ISO 8601 with its offset.

    A client that got a kit has more: the key to which its secrets are sealed (`keys.sealing_hex`), and the author
    certificate that went with it. Here alone a pseudonym stands beside a name.
    """

    serial: str
    name: str
    role: str
    fingerprint: str
    not_after: str
    sealing_key: str | None = None
    pseudonym: str | None = None
    author_serial: str | None = None
    succeeds: str | None = None
    """Fingerprints of earlier keys of the same party, the newest first, with spaces between."""

    @classmethod
    def of(cls, subject: Subject, succeeds: Sequence[str] = ()) -> IssuedRecord:
        """The line for a certificate with this subject; `succeeds`: fingerprints of the party's earlier keys, newest
        first.
        """
        serial, until = f"{subject.serial:x}", subject.not_after.isoformat()
        line = " ".join(succeeds) or None
        return cls(serial, subject.name, subject.role, subject.fingerprint, until, succeeds=line)

    def with_author(self, sealing_key: str, pseudonym: str, author_serial: int) -> IssuedRecord:
        """That of the same certificate, when its kit brings all that a client gets."""
        return replace(self, sealing_key=sealing_key, pseudonym=pseudonym, author_serial=f"{author_serial:x}")

    def is_live(self, now: datetime) -> bool:
        """Whether the certificate has not expired at `now` (timezone-aware)."""
        return now <= datetime.fromisoformat(self.not_after)


@dataclass(frozen=True)
class RemovedRecord:
    """A member that gets no further cohort secret. `serial`: of its newest certificate; a later one brings it back."""

    name: str
    serial: str
    at: str


@dataclass(frozen=True)
class RevokedRecord:
    """A certificate that counts no longer, `not_after` being when it would have ended anyhow.

    `fingerprint`: of its key, which is never to be certified again; None where a newer certificate of it stays good.
    """

    serial: str
    name: str
    not_after: str
    at: str
    fingerprint: str | None = None


def append(path: Path, record: IssuedRecord | RemovedRecord | RevokedRecord) -> None:
    """Adds `record` and waits until it is on disk; IdentityError when it cannot be written."""
    content = {key: value for key, value in vars(record).items() if value is not None}
    line = json.dumps(content).encode() + b"\n"
    with reported(path), path.open("ab", buffering=0) as file:
        file.write(line)
        os.fsync(file.fileno())


def read(path: Path) -> list[IssuedRecord]:
    """All issued certificates, oldest first.

    IdentityError when the file is missing or damaged: without it no name is protected.
    """
    return _read(path, _issued)


def read_removed(path: Path) -> list[RemovedRecord]:
    """All removals, oldest first; none when there is no file. IdentityError when it is damaged."""
    return _read(path, lambda content: RemovedRecord(**content)) if exists(path) else []


def read_revoked(path: Path) -> list[RevokedRecord]:
    """All revocations, oldest first; none when there is no file. IdentityError when it is damaged."""
    return _read(path, _revoked) if exists(path) else []


def _revoked(content: dict[str, str]) -> RevokedRecord:
    record = RevokedRecord(**content)
    int(record.serial, 16)
    if datetime.fromisoformat(record.not_after).tzinfo is None or datetime.fromisoformat(record.at).tzinfo is None:
        raise ValueError("a time without its offset")
    return record


def _issued(content: dict[str, str]) -> IssuedRecord:
    record = IssuedRecord(**content)
    datetime.fromisoformat(record.not_after)
    if record.sealing_key is not None and len(bytes.fromhex(record.sealing_key)) != _SEALING_KEY_BYTES:
        raise ValueError("no sealing key")
    return record


def _read(path: Path, parse: Callable[[dict[str, str]], _Record]) -> list[_Record]:
    records = []
    for number, line in enumerate(read_list(path).splitlines(keepends=True), start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut short")
            records.append(parse(json.loads(line)))
        except (ValueError, TypeError):
            raise IdentityError(f"{path} line {number} is damaged: restore the file from its backup") from None
    return records
