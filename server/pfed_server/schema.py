"""The tables, as `migrations` has them at its newest. Times are seconds since the epoch, UTC."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, Integer, LargeBinary, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

OPEN, CLOSED, ABANDONED = "open", "closed", "abandoned"
"""Outcomes of rounds."""


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, type[TypeEngine[Any]]]] = {bytes: LargeBinary, dict[str, float]: JSON}


_Bytes = BigInteger().with_variant(Integer, "sqlite")
"""A number of bytes; SQLite's integers are of any size."""


class MetaRow(Base):
    """The one row about the federation itself."""

    __tablename__ = "meta"
    __table_args__ = (CheckConstraint("id = 1"),)

    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    federation_id: Mapped[str]
    plan_json: Mapped[str]
    version: Mapped[int]
    changes: Mapped[int] = mapped_column(server_default=text("0"))


class MemberRow(Base):
    __tablename__ = "members"

    name: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    instance_id: Mapped[str]
    expert_id: Mapped[str] = mapped_column(unique=True)
    taking_part: Mapped[bool]
    serial: Mapped[str] = mapped_column(server_default="")
    not_after: Mapped[float] = mapped_column(server_default=text("0"))


class LedgerRow(Base):
    """The newest head of a member's privacy ledger, and its running number."""

    __tablename__ = "ledgers"

    member: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    number: Mapped[int]
    head: Mapped[bytes]


_IS_OPEN = text("outcome = 'open'")


class RoundRow(Base):
    __tablename__ = "rounds"
    __table_args__ = (
        CheckConstraint("outcome IN ('open', 'closed', 'abandoned')"),
        CheckConstraint("(outcome = 'open') = (closed_at IS NULL)"),
        CheckConstraint("(outcome = 'closed') = (global_prompt IS NOT NULL)"),
        Index("one_open_round", "outcome", unique=True, sqlite_where=_IS_OPEN, postgresql_where=_IS_OPEN),
    )

    number: Mapped[int] = mapped_column(primary_key=True)
    opened_at: Mapped[float]
    step: Mapped[int] = mapped_column(default=1)
    deadline: Mapped[float]
    outcome: Mapped[str]
    closed_at: Mapped[float | None]
    global_prompt: Mapped[bytes | None] = mapped_column(deferred=True)
    metrics: Mapped[dict[str, float]] = mapped_column(default=dict)


class PartRow(Base):
    """One member's part in one round. The expert is emptied when the round closes; the rest stays.

    `changed` is the number of the change, as `meta` counts them, after which the row was as it is.
    """

    __tablename__ = "parts"

    round: Mapped[int] = mapped_column(ForeignKey(RoundRow.number), primary_key=True)
    member: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    step: Mapped[int] = mapped_column(default=0)
    message_digest: Mapped[bytes | None]
    counted: Mapped[bool] = mapped_column(default=False)
    expert: Mapped[bytes | None] = mapped_column(deferred=True)
    sketch: Mapped[bytes | None] = mapped_column(deferred=True)
    epoch: Mapped[int] = mapped_column(default=0)
    publication_digest: Mapped[bytes | None]
    bytes_received: Mapped[int] = mapped_column(_Bytes, default=0)
    bytes_sent: Mapped[int] = mapped_column(_Bytes, default=0)
    changed: Mapped[int] = mapped_column(server_default=text("0"), default=0)


class MessageRow(Base):
    """What a member sent in one step of the open round's aggregation."""

    __tablename__ = "messages"

    round: Mapped[int] = mapped_column(ForeignKey(RoundRow.number), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    member: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    message: Mapped[bytes]


class QueryRow(Base):
    """What a member asked of matching in the open round, by its SHA-256, and how often it was answered."""

    __tablename__ = "queries"

    round: Mapped[int] = mapped_column(ForeignKey(RoundRow.number), primary_key=True)
    member: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    digest: Mapped[bytes]
    answers: Mapped[int]


class PresenceRow(Base):
    """When a member was last heard of, where several servers have to know: by the database's clock."""

    __tablename__ = "presence"

    member: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    heard_at: Mapped[float]


class ReportRow(Base):
    """A member that could not use another's expert."""

    __tablename__ = "reports"

    author: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    reporter: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)


class MatchingRow(Base):
    """What matching needs in an epoch of the cohort's secret, as a member made it; None for what proved to be wrong."""

    __tablename__ = "matching"

    epoch: Mapped[int] = mapped_column(primary_key=True)
    member: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    setup: Mapped[bytes | None] = mapped_column(deferred=True)


class PoolRow(Base):
    """The newest visible expert of a member, and the round it comes from."""

    __tablename__ = "pool"

    member: Mapped[str] = mapped_column(ForeignKey(MemberRow.name), primary_key=True)
    round: Mapped[int] = mapped_column(ForeignKey(RoundRow.number))
    expert: Mapped[bytes] = mapped_column(deferred=True)
    sketch: Mapped[bytes] = mapped_column(deferred=True)
    epoch: Mapped[int]
    digest: Mapped[bytes]
