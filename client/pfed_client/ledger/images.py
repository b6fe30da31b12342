"""Of which images a ledger is: `images.bin`, whose entries tell nothing without the images themselves.

The content of images counts and nothing else: neither labels nor names nor how they are split. So the same images under
other labels have the same ledger, and a set that has one image in common with another shares its releases.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass

SALT_BYTES = 32
_ENTRY_BYTES = 16
"""Two images out of 2^32 have the same entry with a probability below 2^-64; they would count as one, which costs
epsilon and protects all the same."""


@dataclass(frozen=True)
class KnownImages:
    """The images of one ledger: a random `salt`, and a keyed hash of each image's SHA-256."""

    salt: bytes
    entries: frozenset[bytes]

    @classmethod
    def of(cls, digests: Collection[bytes], salt: bytes) -> KnownImages:
        """`digests`: SHA-256 of the content of each image."""
        return cls(salt, frozenset(hmac.digest(salt, digest, "sha256")[:_ENTRY_BYTES] for digest in digests))

    @classmethod
    def from_bytes(cls, content: bytes) -> KnownImages | None:
        """What `to_bytes` wrote; None for anything else."""
        salt, rest = content[:SALT_BYTES], content[SALT_BYTES:]
        entries = [rest[i : i + _ENTRY_BYTES] for i in range(0, len(rest), _ENTRY_BYTES)]
        if len(salt) < SALT_BYTES or not entries or len(entries[-1]) < _ENTRY_BYTES:
            return None
        return cls(salt, frozenset(entries))

    def to_bytes(self) -> bytes:
        return self.salt + b"".join(sorted(self.entries))

    def digest(self) -> str:
        """What the ledger's first row is bound to: SHA-256 of the file, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()
