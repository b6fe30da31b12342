"""The store in SQLite: one file, one process, every change one transaction that is on disk before it returns."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Self

from sqlalchemy import Engine, delete, func, insert, select, update
from sqlalchemy.orm import Session, sessionmaker

from pfed_server.database import StateFolder, empty_log, in_memory_engine
from pfed_server.history_reader import HistoryReader
from pfed_server.schema import (
    ABANDONED,
    CLOSED,
    OPEN,
    LedgerRow,
    MatchingRow,
    MemberRow,
    MessageRow,
    MetaRow,
    PartRow,
    PoolRow,
    ReportRow,
    RoundRow,
)
from pfed_server.store import (
    Closing,
    History,
    LedgerRecord,
    Member,
    OpenRound,
    Part,
    PooledExpert,
    State,
    StoredPublication,
    Traffic,
)
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.plan import Plan


class SqlStore:
    """The `Store` of one federation; made by `open` or `in_memory`. Methods may be called from any thread."""

    def __init__(self, engine: Engine, folder: StateFolder | None = None) -> None:
        self._engine = engine
        self._folder = folder
        self._transaction = sessionmaker(engine).begin
        # Of what happens once for every member of every round only the difference is read again: a thousand members
        # send thousands of messages a round. This process alone writes, and one call at a time.
        self._newest: State | None = None
        self._history = HistoryReader()

    @classmethod
    def open(cls, folder: Path, plan: Plan) -> Self:
        """The state in `folder`, made there for `plan` when there is none. Locks the folder until `close`.

        Raises StateLocked when another process uses it, StateError when it cannot be used, is corrupted, of another
        schema version or of another plan; nothing has been changed then.
        """
        state_folder = StateFolder(folder)
        try:
            return cls(state_folder.open_database(plan), state_folder)
        except BaseException:
            state_folder.release()
            raise

    @classmethod
    def in_memory(cls, plan: Plan) -> Self:
        """A state that ends with the process, for simulations."""
        return cls(in_memory_engine(plan))

    def close(self) -> None:
        self._engine.dispose()
        if self._folder is not None:
            self._folder.release()

    def load(self) -> State:
        with self._transaction() as session:
            self._newest = _state(session)
            self._history.read(session)  # the long part of it, before anybody waits for it
        return self._newest

    def history(self) -> History:
        with self._transaction() as session:
            return self._history.read(session)

    def save_member(self, member: Member) -> State:
        with self._transaction() as session:
            known = session.get(MemberRow, member.name)
            same_pseudonym = known is None or known.expert_id == member.expert_id
            if not same_pseudonym:
                # Under its new pseudonym nobody could verify an expert that was published under the old one.
                _drop_experts(session, [member.name])
            session.merge(MemberRow(**asdict(member)))
            state = _newer_state(session, self._newest if same_pseudonym else None)
        return self._is_now(replace(state, members={**state.members, member.name: member}))

    def expel(self, names: Collection[str]) -> State:
        with self._transaction() as session:
            _drop_experts(session, names)
            session.execute(update(MemberRow).where(MemberRow.name.in_(names)).values(taking_part=False))
            state = _newer_state(session)
        return self._is_now(state)

    def advance_ledger(self, name: str, known: bytes, new: bytes) -> LedgerRecord:
        with self._transaction() as session:
            row = session.get(LedgerRow, name)
            before = LedgerRecord() if row is None else LedgerRecord(row.number, row.head)
            if not new or before.head != known:
                return before
            after = LedgerRecord(before.number + 1, new)
            session.merge(LedgerRow(member=name, number=after.number, head=after.head))
            return after

    def touch(self) -> State:
        with self._transaction() as session:
            state = _newer_state(session, self._newest)
        return self._is_now(state)

    def open_round(self, number: int, opened_at: float, deadline: float, cohort: Sequence[str]) -> State:
        left = select(MemberRow.name).where(MemberRow.taking_part.is_(False))
        with self._transaction() as session:
            session.execute(delete(PoolRow).where(PoolRow.member.in_(left)))
            session.add(RoundRow(number=number, opened_at=opened_at, deadline=deadline, outcome=OPEN))
            session.flush()
            session.add_all(PartRow(round=number, member=name) for name in cohort)
            state = _newer_state(session)
        return self._is_now(state)

    def record_message(
        self, number: int, step: int, name: str, message: bytes, traffic: Traffic, *, counts: bool
    ) -> State:
        with self._transaction() as session:
            session.add(MessageRow(round=number, step=step, member=name, message=message))
            part = session.get_one(PartRow, (number, name))
            part.step, part.message_digest = step, hashlib.sha256(message).digest()
            part.counted = part.counted or counts
            _add_traffic(part, traffic)
            now = _part(part)
        return self._has_part(name, now)

    def message(self, number: int, step: int, name: str) -> bytes:
        with self._transaction() as session:
            return session.get_one(MessageRow, (number, step, name)).message

    def open_step(self, number: int, step: int, deadline: float) -> State:
        with self._transaction() as session:
            row = session.get_one(RoundRow, number)
            row.step, row.deadline = step, deadline
            state = _newer_state(session)
        return self._is_now(state)

    def record_publication(self, number: int, name: str, publication: StoredPublication, traffic: Traffic) -> State:
        with self._transaction() as session:
            part = session.get_one(PartRow, (number, name))
            part.expert, part.sketch, part.epoch = publication.expert, publication.sketch, publication.epoch
            part.publication_digest = publication.digest
            _add_traffic(part, traffic)
            now = _part(part)
        return self._has_part(name, now)

    def replace_expert(self, number: int, name: str, publication: StoredPublication) -> State:
        with self._transaction() as session:
            entry = session.get_one(PoolRow, name)
            entry.round, entry.expert, entry.sketch = number, publication.expert, publication.sketch
            entry.epoch, entry.digest = publication.epoch, publication.digest
            state = _newer_state(session)
        return self._is_now(state)

    def save_setup(self, epoch: int, name: str, setup: bytes, drop: int | None) -> State:
        with self._transaction() as session:
            session.execute(delete(MatchingRow).where(MatchingRow.epoch == drop))
            session.add(MatchingRow(epoch=epoch, member=name, setup=setup))
            state = _newer_state(session)
        return self._is_now(state)

    def distrust_setup(self, epoch: int) -> State:
        with self._transaction() as session:
            session.execute(update(MatchingRow).where(MatchingRow.epoch == epoch).values(setup=None))
            state = _newer_state(session)
        return self._is_now(state)

    def setups(self) -> dict[int, bytes]:
        with self._transaction() as session:
            rows = session.execute(select(MatchingRow.epoch, MatchingRow.setup).where(MatchingRow.setup.is_not(None)))
            return {row.epoch: row.setup for row in rows}

    def record_report(self, reporter: str, expert_id: str) -> bool:
        with self._transaction() as session:
            author = session.scalars(select(MemberRow.name).where(MemberRow.expert_id == expert_id)).one()
            if session.get(ReportRow, (author, reporter)) is not None:
                return False
            session.add(ReportRow(author=author, reporter=reporter))
            return True

    def close_round(self, number: int, closed_at: float, closing: Closing, traffic: Mapping[str, Traffic]) -> State:
        with self._transaction() as session:
            row = session.get_one(RoundRow, number)
            row.outcome = ABANDONED if closing.global_prompt is None else CLOSED
            row.closed_at, row.global_prompt = closed_at, closing.global_prompt
            row.metrics = dict(closing.metrics or {})
            for name, bytes_since in traffic.items():
                _add_traffic(session.get_one(PartRow, (number, name)), bytes_since)
            session.flush()
            if closing.global_prompt is not None:
                _reveal_experts(session, number)
            session.execute(delete(MessageRow).where(MessageRow.round == number))
            session.execute(update(PartRow).where(PartRow.round == number).values(expert=None, sketch=None))
            state = _newer_state(session)
        empty_log(self._engine)
        return self._is_now(state)

    def global_prompt(self, round_number: int) -> bytes:
        with self._transaction() as session:
            newest = session.scalars(
                select(RoundRow.global_prompt)
                .where(RoundRow.outcome == CLOSED, RoundRow.number < round_number)
                .order_by(RoundRow.number.desc())
                .limit(1)
            ).first()
            return newest or b""

    def pool(self) -> list[PoolEntry]:
        with self._transaction() as session:
            rows = session.execute(
                select(PoolRow.member, MemberRow.expert_id, PoolRow.sketch, PoolRow.digest)
                .join(MemberRow)
                .order_by(PoolRow.member)
            )
            return [PoolEntry(*row) for row in rows]

    def experts(self, expert_ids: Sequence[str]) -> dict[str, bytes]:
        with self._transaction() as session:
            rows = session.execute(
                select(MemberRow.expert_id, PoolRow.expert).join(PoolRow).where(MemberRow.expert_id.in_(expert_ids))
            )
            return dict(rows.all())

    def _is_now(self, state: State) -> State:
        """`state` has been committed."""
        self._newest = state
        return state

    def _has_part(self, name: str, part: Part) -> State:
        """The state in which a member's part of the open round is `part`, which has been committed."""
        if self._newest is None or self._newest.open_round is None:
            return self.load()
        open_round = self._newest.open_round
        parts = {**open_round.parts, name: part}
        return self._is_now(replace(self._newest, open_round=replace(open_round, parts=parts)))


def _newer_state(session: Session, same: State | None = None) -> State:
    """The state with the next version: read, unless nothing else of `same` has changed."""
    session.execute(update(MetaRow).values(version=MetaRow.version + 1))
    return _state(session) if same is None else replace(same, version=same.version + 1)


def _state(session: Session) -> State:
    session.flush()
    federation_id, version = session.execute(select(MetaRow.federation_id, MetaRow.version)).one()
    members = session.execute(select(*(getattr(MemberRow, field.name) for field in fields(Member))))
    pooled = session.execute(select(PoolRow.member, PoolRow.round, PoolRow.epoch, PoolRow.digest))
    setups = session.execute(select(MatchingRow.epoch, MatchingRow.member, MatchingRow.setup.is_(None))).all()
    completed = select(func.count()).select_from(RoundRow).where(RoundRow.outcome == CLOSED)
    return State(
        federation_id=federation_id,
        version=version,
        last_round=session.scalar(select(func.max(RoundRow.number))) or 0,
        rounds_completed=session.scalar(completed) or 0,
        members={row.name: Member(*row) for row in members},
        pooled={row.member: PooledExpert(row.round, row.epoch, row.digest) for row in pooled},
        matching_epochs=frozenset(epoch for epoch, _, wrong in setups if not wrong),
        distrusted_setups=frozenset((epoch, member) for epoch, member, wrong in setups if wrong),
        open_round=_open_round(session),
    )


def _open_round(session: Session) -> OpenRound | None:
    row = session.execute(
        select(RoundRow.number, RoundRow.opened_at, RoundRow.step, RoundRow.deadline).where(RoundRow.outcome == OPEN)
    ).one_or_none()
    if row is None:
        return None
    parts = session.execute(
        select(PartRow.member, PartRow.step, PartRow.message_digest, PartRow.publication_digest, PartRow.epoch)
        .where(PartRow.round == row.number)
        .order_by(PartRow.member)
    )
    return OpenRound(*row, parts={part.member: Part(*part[1:]) for part in parts})


def _part(row: PartRow) -> Part:
    return Part(row.step, row.message_digest, row.publication_digest, row.epoch)


def _drop_experts(session: Session, names: Collection[str]) -> None:
    """Forget what is lent of members, and what was to be lent when the open round closes."""
    session.execute(delete(PoolRow).where(PoolRow.member.in_(names)))
    staged = update(PartRow).where(PartRow.member.in_(names), PartRow.expert.is_not(None))
    session.execute(staged.values(expert=None, sketch=None, epoch=0, publication_digest=None))


def _reveal_experts(session: Session, number: int) -> None:
    """Put the experts staged in a round in the place of the older ones of the same members."""
    columns = (PartRow.member, PartRow.round, PartRow.expert, PartRow.sketch, PartRow.epoch, PartRow.publication_digest)
    staged = select(*columns).where(PartRow.round == number, PartRow.expert.is_not(None))
    session.execute(delete(PoolRow).where(PoolRow.member.in_(select(staged.subquery().c.member))))
    session.execute(insert(PoolRow).from_select(["member", "round", "expert", "sketch", "epoch", "digest"], staged))


def _add_traffic(part: PartRow, traffic: Traffic) -> None:
    part.bytes_received += traffic.received
    part.bytes_sent += traffic.sent
