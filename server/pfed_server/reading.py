"""From the tables to the `State`: all of it, or what has changed since an older one; and the count of its changes."""

from __future__ import annotations

from dataclasses import fields, replace

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from pfed_server.schema import CLOSED, OPEN, MatchingRow, MemberRow, MetaRow, PartRow, PoolRow, RoundRow
from pfed_server.store import Member, OpenRound, Part, PooledExpert, State, StateOvertaken

_PART = (PartRow.member, PartRow.step, PartRow.message_digest, PartRow.publication_digest, PartRow.epoch)


def count_change(session: Session, known: State | None, *, visible: bool) -> int:
    """Count a change of the state, which clients can see when it is `visible`; its number.

    It holds the one row of `meta` until the transaction ends, so that changes come one after the other. Raises
    StateOvertaken when the state is not as `known` any more.
    """
    counts = {MetaRow.changes: MetaRow.changes + 1}
    if visible:
        counts[MetaRow.version] = MetaRow.version + 1
    counting = update(MetaRow).values(counts).returning(MetaRow.changes)
    number = session.scalar(counting if known is None else counting.where(MetaRow.changes == known.changes))
    if number is None:
        raise StateOvertaken("another server has changed the federation meanwhile")
    return number


def read_state(session: Session) -> State:
    """The state as this transaction sees it."""
    session.flush()
    federation_id, version, changes = session.execute(
        select(MetaRow.federation_id, MetaRow.version, MetaRow.changes)
    ).one()
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
        changes=changes,
    )


def read_newer(session: Session, known: State) -> State:
    """As `read_state`, for whoever knows an older one.

    What happens once for every member of every round changes parts alone, and no version: only those are read again.
    A thousand members send thousands of messages a round.
    """
    version, changes = session.execute(select(MetaRow.version, MetaRow.changes)).one()
    if (version, changes) == (known.version, known.changes):
        return known
    open_round = known.open_round
    if version != known.version or changes < known.changes or open_round is None:
        return read_state(session)
    changed = select(*_PART).where(PartRow.round == open_round.number, PartRow.changed > known.changes)
    parts = {**open_round.parts, **{row.member: Part(*row[1:]) for row in session.execute(changed)}}
    return replace(known, changes=changes, open_round=replace(open_round, parts=parts))


def _open_round(session: Session) -> OpenRound | None:
    row = session.execute(
        select(RoundRow.number, RoundRow.opened_at, RoundRow.step, RoundRow.deadline).where(RoundRow.outcome == OPEN)
    ).one_or_none()
    if row is None:
        return None
    parts = session.execute(select(*_PART).where(PartRow.round == row.number))
    # Sorted here: what a database takes for alphabetical order depends on how it was set up.
    return OpenRound(*row, parts={part.member: Part(*part[1:]) for part in sorted(parts, key=lambda part: part.member)})
