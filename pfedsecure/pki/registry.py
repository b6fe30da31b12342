"""The authority's append-only record of every certificate it issued, one JSON object a line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import Subject
from pfedsecure.pki.files import read_public, reported


@dataclass(frozen=True)
class IssuedRecord:
    """One issued certificate. `serial` and `fingerprint` in hexadecimal, `not_after` in ISO 8601 with its offset."""

    serial: str
    name: str
    role: str
    fingerprint: str
    not_after: str

    @classmethod
    def of(cls, subject: Subject) -> IssuedRecord:
        return cls(
            f"{subject.serial:x}", subject.name, subject.role, subject.fingerprint, subject.not_after.isoformat()
        )

    def is_live(self, now: datetime) -> bool:
        """Whether the certificate has not expired at `now` (timezone-aware)."""
        return now <= datetime.fromisoformat(self.not_after)


def append(path: Path, record: IssuedRecord) -> None:
    """Adds `record` and waits until it is on disk; IdentityError when it cannot be written."""
    line = json.dumps(vars(record)).encode() + b"\n"
    with reported(path), path.open("ab", buffering=0) as file:
        file.write(line)
        os.fsync(file.fileno())


def read(path: Path) -> list[IssuedRecord]:
    """All records, oldest first.

    IdentityError when the file is missing or damaged: without it no name is protected.
    """
    records = []
    for number, line in enumerate(read_public(path).splitlines(keepends=True), start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut short")
            record = IssuedRecord(**json.loads(line))
            datetime.fromisoformat(record.not_after)
        except (ValueError, TypeError):
            raise IdentityError(f"{path} line {number} is damaged: restore the file from its backup") from None
        records.append(record)
    return records
