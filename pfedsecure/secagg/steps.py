"""The five steps of a round, what is agreed between them, and what is signed."""

from __future__ import annotations

from enum import IntEnum

from pfedsecure.secagg.messages import Members, to_bitmap
from pfedsecure.secagg.transcript import digest, transcript


class Step(IntEnum):
    """What a client sends. The server answers with what the next step needs, once it has closed this one."""

    ADVERTISE = 1
    SHARE = 2
    MASK = 3
    CONFIRM = 4
    UNMASK = 5


def participants_digest(roster_digest: bytes, participants: Members) -> bytes:
    """Of the clients that shared their secrets, within their roster: what masks and signatures are made for."""
    return digest("participants", roster_digest, to_bitmap(participants))


def survivors_statement(participants_digest: bytes, survivors: Members) -> bytes:
    """What a client signs: of these participants these survive, and the masked inputs of no others are summed."""
    return transcript("survivors", participants_digest, to_bitmap(survivors))
