"""What is hashed, signed or bound to a key: a label and fields, so that no two different meanings share their bytes."""

from __future__ import annotations

import hashlib
from functools import cache

_PROTOCOL = b"pfedsecure secure aggregation v1"


def transcript(label: str, *fields: bytes | int) -> bytes:
    """Protocol, label and fields, each after its length in 8 bytes; an integer counts as its 8 bytes, big-endian.

    Injective for a given label with a given number and kinds of fields.
    """
    parts = [_prefix(label)]
    for field in fields:
        content = field if isinstance(field, bytes) else field.to_bytes(8)
        parts += (len(content).to_bytes(8), content)
    return b"".join(parts)


@cache
def _prefix(label: str) -> bytes:
    return b"".join(len(part).to_bytes(8) + part for part in (_PROTOCOL, label.encode()))


def digest(label: str, *fields: bytes | int) -> bytes:
    """SHA-256 of the transcript."""
    return hashlib.sha256(transcript(label, *fields)).digest()
