"""The store in a database: every change one transaction that is on disk before it returns.

`SqlStore` is the whole of it for SQLite, one file that one process uses; `shared_store` adds what several servers need.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine, bindparam, delete, insert, select, update
from sqlalchemy.orm import Session

from pfed_server.database import StateFolder, empty_log, in_memory_engine
from pfed_server.history_reader import HistoryReader
from pfed_server.reading import count_change, read_state
from pfed_server.schema import (
    ABANDONED,
    CLOSED,
    OPEN,
    LedgerRow,
    MatchingRow,
    MemberRow,
    MessageRow,
    PartRow,
    PoolRow,
    QueryRow,
    ReportRow,
    RoundRow,
)
from pfed_server.store import (
    Closing,
    History,
    LedgerRecord,
    Member,
    QueryRecord,
    SharedStore,
    State,
    StoredPublication,
    Traffic,
)
from pfed_server.writing import drop_experts, reveal_experts, update_parts
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.plan import Plan

# Statements that each member of each round has use for are made once: that takes longer than carrying one out.
_INSERT_MESSAGES = insert(MessageRow)
_MESSAGE = select(MessageRow.message).where(
    MessageRow.round == bindparam("number"),
    MessageRow.step == bindparam("step"),
    MessageRow.member == bindparam("name"),
)
_PROMPT_BEFORE = (
    select(RoundRow.global_prompt)
    .where(RoundRow.outcome == CLOSED, RoundRow.number < bindparam("number"))
    .order_by(RoundRow.number.desc())
    .limit(1)
)


class SqlStore:
    """The `Store` of one federation; made by `open` or `in_memory`.

    Methods may be called from any thread; those that change or read the State one at a time.
    """

    shared: SharedStore | None = None

    def __init__(self, engine: Engine, folder: StateFolder | None = None) -> None:
        self._engine = engine
        self._folder = folder
        # What the next change is decided on. After what happens once for every member of every round it is not read
        # again, only brought up to date: a thousand members send thousands of messages a round.
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
            state = read_state(session)
            self._history.read(session)  # the long part of it, before anybody waits for it
        return self._is_now(state)

    def history(self) -> History:
        with self._transaction() as session:
            return self._history.read(session)

    def save_member(self, member: Member) -> State:
        with self._change() as (session, _):
            known = session.get(MemberRow, member.name)
            same_pseudonym = known is None or known.expert_id == member.expert_id
            if not same_pseudonym:
                # Under its new pseudonym nobody could verify an expert that was published under the old one.
                drop_experts(session, [member.name])
            session.merge(MemberRow(**asdict(member)))
            state = self._next(session, same=same_pseudonym)
        return self._is_now(replace(state, members={**state.members, member.name: member}))

    def expel(self, names: Collection[str]) -> State:
        with self._change() as (session, _):
            drop_experts(session, names)
            session.execute(update(MemberRow).where(MemberRow.name.in_(names)).values(taking_part=False))
            state = read_state(session)
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
        with self._change() as (session, _):
            state = self._next(session, same=True)
        return self._is_now(state)

    def open_round(self, number: int, opened_at: float, deadline: float, cohort: Sequence[str]) -> State:
        left = select(MemberRow.name).where(MemberRow.taking_part.is_(False))
        with self._change() as (session, _):
            session.execute(delete(PoolRow).where(PoolRow.member.in_(left)))
            session.execute(delete(QueryRow))
            session.add(RoundRow(number=number, opened_at=opened_at, deadline=deadline, outcome=OPEN))
            session.flush()
            session.add_all(PartRow(round=number, member=name) for name in cohort)
            state = read_state(session)
        return self._is_now(state)

    def record_messages(
        self, number: int, step: int, messages: Mapping[str, bytes], traffic: Mapping[str, Traffic], *, counts: bool
    ) -> State:
        digests = {name: hashlib.sha256(message).digest() for name, message in messages.items()}
        rows = [
            {"round": number, "step": step, "member": name, "message": message} for name, message in messages.items()
        ]
        with self._change(visible=False) as (session, change):
            session.connection().execute(_INSERT_MESSAGES, rows)
            to: dict[str, Any] = {"step": step, "changed": change} | ({"counted": True} if counts else {})
            parts = {name: {**to, "message_digest": digest} for name, digest in digests.items()}
            update_parts(session, number, parts, traffic)
        return self._have_parts(change, {name: {"step": step, "message_digest": digests[name]} for name in messages})

    def message(self, number: int, step: int, name: str) -> bytes:
        with self._transaction() as session:
            key = {"number": number, "step": step, "name": name}
            message: bytes = session.connection().execute(_MESSAGE, key).scalar_one()
            return message

    def open_step(self, number: int, step: int, deadline: float) -> State:
        with self._change() as (session, _):
            row = session.get_one(RoundRow, number)
            row.step, row.deadline = step, deadline
            state = read_state(session)
        return self._is_now(state)

    def record_publications(
        self, number: int, publications: Mapping[str, StoredPublication], traffic: Mapping[str, Traffic]
    ) -> State:
        with self._change(visible=False) as (session, change):
            parts = {
                name: {
                    "expert": each.expert,
                    "sketch": each.sketch,
                    "epoch": each.epoch,
                    "publication_digest": each.digest,
                    "changed": change,
                }
                for name, each in publications.items()
            }
            update_parts(session, number, parts, traffic)
        known = {
            name: {"publication_epoch": each.epoch, "publication_digest": each.digest}
            for name, each in publications.items()
        }
        return self._have_parts(change, known)

    def replace_expert(self, number: int, name: str, publication: StoredPublication) -> State:
        with self._change() as (session, _):
            entry = session.get_one(PoolRow, name)
            entry.round, entry.expert, entry.sketch = number, publication.expert, publication.sketch
            entry.epoch, entry.digest = publication.epoch, publication.digest
            state = read_state(session)
        return self._is_now(state)

    def save_setup(self, epoch: int, name: str, setup: bytes, drop: int | None) -> State:
        with self._change() as (session, _):
            session.execute(delete(MatchingRow).where(MatchingRow.epoch == drop))
            session.add(MatchingRow(epoch=epoch, member=name, setup=setup))
            state = read_state(session)
        return self._is_now(state)

    def distrust_setup(self, epoch: int) -> State:
        with self._change() as (session, _):
            session.execute(update(MatchingRow).where(MatchingRow.epoch == epoch).values(setup=None))
            state = read_state(session)
        return self._is_now(state)

    def setups(self) -> dict[int, bytes]:
        with self._transaction() as session:
            rows = session.execute(select(MatchingRow.epoch, MatchingRow.setup).where(MatchingRow.setup.is_not(None)))
            return {row.epoch: row.setup for row in rows}

    def record_query(self, number: int, name: str, digest: bytes) -> QueryRecord:
        with self._transaction() as session:
            row = session.get(QueryRow, (number, name))
            if row is None:
                row = QueryRow(round=number, member=name, digest=digest, answers=0)
                session.add(row)
            row.answers += row.digest == digest
            return QueryRecord(row.digest, row.answers)

    def record_report(self, reporter: str, expert_id: str) -> bool:
        with self._transaction() as session:
            author = session.scalars(select(MemberRow.name).where(MemberRow.expert_id == expert_id)).one()
            if session.get(ReportRow, (author, reporter)) is not None:
                return False
            session.add(ReportRow(author=author, reporter=reporter))
            return True

    def close_round(self, number: int, closed_at: float, closing: Closing, traffic: Mapping[str, Traffic]) -> State:
        with self._change() as (session, _):
            row = session.get_one(RoundRow, number)
            row.outcome = ABANDONED if closing.global_prompt is None else CLOSED
            row.closed_at, row.global_prompt = closed_at, closing.global_prompt
            row.metrics = dict(closing.metrics or {})
            session.flush()
            update_parts(session, number, {name: {} for name in traffic}, traffic)
            if closing.global_prompt is not None:
                reveal_experts(session, number)
            session.execute(delete(MessageRow).where(MessageRow.round == number))
            session.execute(update(PartRow).where(PartRow.round == number).values(expert=None, sketch=None))
            state = read_state(session)
        self._is_now(state)
        self._wipe()
        return state

    def global_prompt(self, round_number: int) -> bytes:
        with self._transaction() as session:
            newest: bytes | None = session.connection().scalar(_PROMPT_BEFORE, {"number": round_number})
            return newest or b""

    def pool(self) -> list[PoolEntry]:
        with self._transaction() as session:
            rows = session.execute(
                select(PoolRow.member, MemberRow.expert_id, PoolRow.sketch, PoolRow.digest).join(MemberRow)
            )
            return sorted((PoolEntry(*row) for row in rows), key=lambda entry: entry.owner)

    def experts(self, expert_ids: Sequence[str]) -> dict[str, bytes]:
        with self._transaction() as session:
            rows = session.execute(
                select(MemberRow.expert_id, PoolRow.expert).join(PoolRow).where(MemberRow.expert_id.in_(expert_ids))
            )
            return dict(rows.all())

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def _change(self, *, visible: bool = True) -> Iterator[tuple[Session, int]]:
        """A transaction that changes the state as it is known, and the number of that change."""
        with self._transaction() as session:
            yield session, count_change(session, self._newest, visible=visible)

    def _next(self, session: Session, *, same: bool) -> State:
        """The state after a visible change; nothing else of it has changed when it is the `same`."""
        if self._newest is None or not same:
            return read_state(session)
        return replace(self._newest, version=self._newest.version + 1, changes=self._newest.changes + 1)

    def _is_now(self, state: State) -> State:
        """`state` has been committed."""
        self._newest = state
        return state

    def _have_parts(self, change: int, changed: Mapping[str, Mapping[str, Any]]) -> State:
        """The state after a change in which members' parts of the open round were `changed`; it has been committed."""
        if self._newest is None or self._newest.open_round is None:
            return self.load()
        open_round = self._newest.open_round
        parts = {**open_round.parts, **{name: replace(open_round.parts[name], **to) for name, to in changed.items()}}
        return self._is_now(replace(self._newest, changes=change, open_round=replace(open_round, parts=parts)))

    def _wipe(self) -> None:
        """Have nothing that was deleted remain readable, as far as this database can."""
        empty_log(self._engine)
