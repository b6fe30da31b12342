"""Shares on their way: sealed from dealer to holder, with commitments by which everybody can tell a wrong one.

A dealer shares two secrets, the seed of its own mask and its private mask key; a holder's record is one share of
each. Commitments are SHA-256 of share, dealer, holder and roster. They hide (a share is uniform over more than 2**256
values) and bind. The dealer seals them together with the record, so the holder knows that the server has the same,
and whoever later shows another share than it got is found out; so is a dealer whose shares, all as committed, give
another secret than the one in its advertisement.
"""

from __future__ import annotations

from enum import IntEnum

from pfedsecure.secagg import keys
from pfedsecure.secagg.entropy import Entropy
from pfedsecure.secagg.shamir import SHARE_BYTES
from pfedsecure.secagg.transcript import digest, transcript

COMMITMENT_BYTES = 32


class Kind(IntEnum):
    """Which secret a share is of; also its place in a record."""

    SEED = 0
    MASK_KEY = 1


RECORD_BYTES = len(Kind) * SHARE_BYTES
SEALED_BYTES = RECORD_BYTES + keys.SEAL_BYTES
COMMITMENTS_BYTES = len(Kind) * COMMITMENT_BYTES


def commit_seed(setting_digest: bytes, seed: bytes) -> bytes:
    """Commitment to a 256-bit seed."""
    return digest("seed commitment", setting_digest, seed)


def share_of(record: bytes, kind: Kind) -> bytes:
    """One of the two shares of a holder's record."""
    return record[kind * SHARE_BYTES : (kind + 1) * SHARE_BYTES]


def commitment_of(commitments: bytes, kind: Kind) -> bytes:
    """One of the two commitments to a record."""
    return commitments[kind * COMMITMENT_BYTES : (kind + 1) * COMMITMENT_BYTES]


def commit_share(roster_digest: bytes, dealer: int, holder: int, kind: Kind, share: bytes) -> bytes:
    """Commitment to one share."""
    return digest("share commitment", roster_digest, dealer, holder, kind, share)


def commit_record(roster_digest: bytes, dealer: int, holder: int, record: bytes) -> bytes:
    """Commitments to both shares of a record."""
    return b"".join(commit_share(roster_digest, dealer, holder, kind, share_of(record, kind)) for kind in Kind)


def seal_record(
    secret: bytes, roster_digest: bytes, dealer: int, holder: int, record: bytes, commitments: bytes, entropy: Entropy
) -> bytes:
    """A record for its holder's eyes alone; `secret`: what dealer and holder share by key agreement."""
    key, context = _channel(secret, roster_digest, dealer, holder, commitments)
    return keys.seal(key, record, context, entropy)


def unseal_record(
    secret: bytes, roster_digest: bytes, dealer: int, holder: int, sealed: bytes, commitments: bytes
) -> bytes | None:
    """The record that `dealer` sealed with these commitments, if it also fits them; otherwise None."""
    key, context = _channel(secret, roster_digest, dealer, holder, commitments)
    record = keys.unseal(key, sealed, context)
    if record is None or commit_record(roster_digest, dealer, holder, record) != commitments:
        return None
    return record


def _channel(secret: bytes, roster_digest: bytes, dealer: int, holder: int, commitments: bytes) -> tuple[bytes, bytes]:
    """Key and associated data. The roster's digest covers federation, round, plan, model and everybody's keys."""
    key = keys.derive(secret, transcript("share", roster_digest, dealer, holder))
    return key, transcript("share context", roster_digest, dealer, holder, commitments)
