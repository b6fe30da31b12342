"""What the coordinator needs of a database: a snapshot to decide on, and one transaction for each thing that happens.

Each method that changes something is one transaction: after it returns the change survives a crash, and when it raises
or the process is killed nothing of it has happened. The coordinator calls one method at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pfedsecure.matching.interface import PoolEntry


@dataclass(frozen=True)
class Member:
    """A client that has joined. `fingerprint` binds its name to the key it first came with."""

    name: str
    fingerprint: str
    instance_id: str
    expert_id: str
    """Pseudonym under which peers see the member's expert."""
    taking_part: bool


@dataclass(frozen=True)
class Part:
    """What has arrived from one member of a round's cohort: SHA-256 of the update and of the publication."""

    update_digest: bytes | None = None
    publication_digest: bytes | None = None


@dataclass(frozen=True)
class OpenRound:
    """The round under way. Times in seconds since the epoch, UTC."""

    number: int
    opened_at: float
    deadline: float
    parts: Mapping[str, Part]
    """By member; the keys are the cohort."""


@dataclass(frozen=True)
class State:
    """Where the federation stands, without the payloads."""

    federation_id: str
    version: int
    """Grows with every change that all clients can see."""
    last_round: int
    """Number of the newest round, open or not; 0 before the first."""
    rounds_completed: int
    members: Mapping[str, Member]
    open_round: OpenRound | None


@dataclass(frozen=True)
class Traffic:
    """Bytes of payload that went between the server and one member."""

    received: int = 0
    sent: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.received + other.received, self.sent + other.sent)


@dataclass(frozen=True)
class RoundRecord:
    """A round as the operator sees it. `outcome`: open, closed or abandoned; `seconds` is None while it is open."""

    number: int
    outcome: str
    cohort: int
    updates: int
    seconds: float | None
    traffic: Traffic


@dataclass(frozen=True)
class History:
    """What happened so far, for the operator."""

    rounds: Sequence[RoundRecord]
    last_rounds: Mapping[str, int]
    """By member: the newest closed round that has its update."""


class Store(Protocol):
    """The state of one federation. What changes it returns the State after the change."""

    def load(self) -> State: ...

    def history(self) -> History: ...

    def save_member(self, member: Member) -> State:
        """Add a member or change it."""

    def touch(self) -> State:
        """Raise the version: something that is not stored has changed."""

    def open_round(self, number: int, opened_at: float, deadline: float, cohort: Sequence[str]) -> State:
        """Begin a round, and take the experts of members that left out of the pool."""

    def record_update(self, number: int, name: str, contribution: bytes, digest: bytes, traffic: Traffic) -> State:
        """Keep an update until its round closes; add to the member's traffic."""

    def record_publication(
        self, number: int, name: str, expert: bytes, sketch: bytes, digest: bytes, traffic: Traffic
    ) -> State:
        """Keep an expert out of sight until its round closes; add to the member's traffic."""

    def updates(self, number: int) -> dict[str, bytes]:
        """The contributions of an open round by member."""

    def close_round(
        self, number: int, closed_at: float, global_prompt: bytes | None, traffic: Mapping[str, Traffic]
    ) -> State:
        """End a round: with a new global prompt the staged experts enter the pool; with None it is abandoned.

        Either way the contributions are forgotten; their digests stay.
        """

    def global_prompt(self, round_number: int) -> bytes:
        """The newest global prompt made before round `round_number`; empty when there was none."""

    def pool(self) -> list[PoolEntry]:
        """What the open round matches against: the newest expert of each member, none of this round."""

    def experts(self, expert_ids: Sequence[str]) -> dict[str, bytes]:
        """Those of the pool's experts that are asked for, by id."""

    def close(self) -> None: ...
