"""What the coordinator needs of a database: a snapshot to decide on, and one transaction for each thing that happens.

Each method that changes something is one transaction: after it returns the change survives a crash, and when it raises
or the process is killed nothing of it has happened. The coordinator calls one method at a time. A change that was
decided on an older state than the database's is refused with StateOvertaken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    serial: str = ""
    """Of the certificate that it joined with last, in hexadecimal, and when that ends; empty and 0 in plain text."""
    not_after: float = 0.0


@dataclass(frozen=True)
class Part:
    """What has arrived from one member of a round's cohort.

    `step`: the last step of the aggregation that it sent a message of (0: none), with the message's SHA-256; and the
    SHA-256 of its publication, with the epoch of the secret that the expert is sealed with.
    """

    step: int = 0
    message_digest: bytes | None = None
    publication_digest: bytes | None = None
    publication_epoch: int = 0


@dataclass(frozen=True)
class OpenRound:
    """The round under way. Times in seconds since the epoch, UTC."""

    number: int
    opened_at: float
    step: int
    """The open step of the aggregation, from 1."""
    deadline: float
    """Of that step."""
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
    pooled: Mapping[str, PooledExpert]
    """By member: what the pool holds of it."""
    matching_epochs: frozenset[int]
    """For which matching is set up."""
    distrusted_setups: frozenset[tuple[int, str]]
    """Epochs and the members whose set-up for them proved to be wrong."""
    open_round: OpenRound | None
    changes: int = 0
    """Grows with every change of anything here."""


class StateOvertaken(Exception):
    """The database has another state than the one that a change was decided on; nothing has happened."""


@dataclass(frozen=True)
class StoredPublication:
    """What a member publishes. `epoch`: of the secret that the expert is sealed with, or 0; `digest`: of it all."""

    expert: bytes
    sketch: bytes
    epoch: int
    digest: bytes


@dataclass(frozen=True)
class PooledExpert:
    """What the pool holds of a member: round, epoch and the digest of the whole publication."""

    round: int
    epoch: int
    digest: bytes


@dataclass(frozen=True)
class QueryRecord:
    """A member's first query of matching in a round, by its SHA-256, and how often it has come."""

    digest: bytes
    answers: int


@dataclass(frozen=True)
class LedgerRecord:
    """The newest head of a member's privacy ledger, and its running number; 0 and empty before the first."""

    number: int = 0
    head: bytes = b""


@dataclass(frozen=True)
class Closing:
    """How a round ends: with a global prompt, or abandoned, without. `culprits` are not stored."""

    global_prompt: bytes | None = None
    metrics: Mapping[str, float] | None = None
    culprits: Sequence[str] = ()


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
    metrics: Mapping[str, float]
    """Means over the clients that told them."""


@dataclass(frozen=True)
class History:
    """What happened so far, for the operator."""

    rounds: Sequence[RoundRecord]
    last_rounds: Mapping[str, int]
    """By member: the newest closed round that has its update."""
    reports: Mapping[str, int]
    """By member: how many others reported an expert of it as unusable."""


class Store(Protocol):
    """The state of one federation. What changes it returns the State after the change."""

    @property
    def shared(self) -> SharedStore | None:
        """This store, where other processes use it too."""

    def load(self) -> State: ...

    def history(self) -> History: ...

    def save_member(self, member: Member) -> State:
        """Add a member or change it."""

    def expel(self, names: Collection[str]) -> State:
        """Have members take part no longer; their experts are gone at once, also those that nobody has seen yet."""

    def advance_ledger(self, name: str, known: bytes, new: bytes) -> LedgerRecord:
        """What there is of a member's ledger; with `new` in its place where the head was `known`, unless it is empty.

        No client can see it of another: the version stays.
        """

    def touch(self) -> State:
        """Raise the version: something that is not stored has changed."""

    def open_round(self, number: int, opened_at: float, deadline: float, cohort: Sequence[str]) -> State:
        """Begin a round with step 1, and take the experts of members that left out of the pool."""

    def record_messages(
        self, number: int, step: int, messages: Mapping[str, bytes], traffic: Mapping[str, Traffic], *, counts: bool
    ) -> State:
        """Keep members' messages of the open step until its round closes, and add to the members' traffic.

        All or none of them. `counts`: with them the members' updates have arrived.
        """

    def message(self, number: int, step: int, name: str) -> bytes:
        """A message of an open round."""

    def open_step(self, number: int, step: int, deadline: float) -> State:
        """Close the open step of a round and open the next."""

    def record_publications(
        self, number: int, publications: Mapping[str, StoredPublication], traffic: Mapping[str, Traffic]
    ) -> State:
        """Keep members' experts out of sight until their round closes, all or none; add to the members' traffic."""

    def replace_expert(self, number: int, name: str, publication: StoredPublication) -> State:
        """Put an expert of round `number` in the place of the member's older one at once; there must be one."""

    def save_setup(self, epoch: int, name: str, setup: bytes, drop: int | None) -> State:
        """Keep what a member made for matching in an epoch; forget that of the epoch `drop`."""

    def distrust_setup(self, epoch: int) -> State:
        """Forget what there is for an epoch, and remember whose it was."""

    def setups(self) -> dict[int, bytes]:
        """What is kept for matching, by epoch."""

    def record_query(self, number: int, name: str, digest: bytes) -> QueryRecord:
        """Note that a member asked this of matching in the open round; what it asked first is what counts."""

    def record_report(self, reporter: str, expert_id: str) -> bool:
        """Note that a member could not use another's expert; False when that was known already."""

    def close_round(self, number: int, closed_at: float, closing: Closing, traffic: Mapping[str, Traffic]) -> State:
        """End a round: with a new global prompt the staged experts enter the pool; without it is abandoned.

        Either way the messages are forgotten; who sent what stays.
        """

    def global_prompt(self, round_number: int) -> bytes:
        """The newest global prompt made before round `round_number`; empty when there was none."""

    def pool(self) -> list[PoolEntry]:
        """What the open round matches against: the newest expert of each member, none of this round."""

    def experts(self, expert_ids: Sequence[str]) -> dict[str, bytes]:
        """Those of the pool's experts that are asked for, by id."""

    def close(self) -> None: ...


class SharedStore(Store, Protocol):
    """A store that several servers of one federation use at once. One of them at a time makes changes."""

    def acquire(self) -> State:
        """Wait until no other server makes changes, and keep them all from it until `release`; the newest state.

        Between the two every other method works on the same session of the database, which ends with its lock.
        """

    def release(self) -> None:
        """Let others make changes. Raises nothing: a lock that cannot be given back ends with its session."""

    def is_current(self, state: State) -> bool:
        """Whether no server has changed the state since. May be called at any time, from any thread.

        Raises StateOvertaken when the database is another federation's now, or has another schema.
        """

    def refresh(self) -> State:
        """The newest state, of which only what others changed is read again."""

    def hear(self, silence: Mapping[str, float]) -> dict[str, float]:
        """Note how many seconds ago this server heard of members; how many ago any did, of all. Between the two."""
