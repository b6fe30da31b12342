"""From the tables to the `State`: all of it, or what has changed since an older one; and the count of its changes."""

from __future__ import annotations

from dataclasses import fields, replace

from sqlalchemy import Connection, bindparam, func, select, update
from sqlalchemy.orm import Session

from pfed_server.schema import CLOSED, OPEN, MatchingRow, MemberRow, MetaRow, PartRow, PoolRow, RoundRow
from pfed_server.store import Member, OpenRound, Part, PooledExpert, State, StateOvertaken

_PART = (PartRow.member, PartRow.step, PartRow.message_digest, PartRow.publication_digest, PartRow.epoch)

# Statements are made once: making one takes longer than SQLite takes to carry it out.
_COUNT_ONE = update(MetaRow).values({MetaRow.changes: MetaRow.changes + 1}).returning(MetaRow.changes)
_COUNT_VISIBLE = _COUNT_ONE.values({MetaRow.version: MetaRow.version + 1})
_AS_KNOWN = MetaRow.changes == bindparam("known")
_COUNTING = {
    (visible, known): counting.where(_AS_KNOWN) if known else counting
    for visible, counting in ((False, _COUNT_ONE), (True, _COUNT_VISIBLE))
    for known in (False, True)
}
_META = select(MetaRow.federation_id, MetaRow.version, MetaRow.changes)
_COUNTS = select(MetaRow.version, MetaRow.changes)
_MEMBERS = select(*(getattr(MemberRow, field.name) for field in fields(Member)))
_POOLED = select(PoolRow.member, PoolRow.round, PoolRow.epoch, PoolRow.digest)
_SETUPS = select(MatchingRow.epoch, MatchingRow.member, MatchingRow.setup.is_(None))
_ROUNDS = select(func.max(RoundRow.number), func.count().filter(RoundRow.outcome == CLOSED))
_OPEN_ROUND = select(RoundRow.number, RoundRow.opened_at, RoundRow.step, RoundRow.deadline).where(
    RoundRow.outcome == OPEN
)
_PARTS = select(*_PART).where(PartRow.round == bindparam("number"))
_CHANGED_PARTS = _PARTS.where(PartRow.changed > bindparam("known"))


def count_change(session: Session, known: State | None, *, visible: bool) -> int:
    """Count a change of the state, which clients can see when it is `visible`; its number.

    It holds the one row of `meta` until the transaction ends, so that changes come one after the other. Raises
    StateOvertaken when the state is not as `known` any more.
    """
    counting = _COUNTING[visible, known is not None]
    as_known = {} if known is None else {"known": known.changes}
    number: int | None = session.connection().scalar(counting, as_known)
    if number is None:
        raise StateOvertaken("another server has changed the federation meanwhile")
    return number


def read_state(session: Session) -> State:
    """The state as this transaction sees it."""
    session.flush()
    connection = session.connection()
    federation_id, version, changes = connection.execute(_META).one()
    setups = connection.execute(_SETUPS).all()
    last_round, completed = connection.execute(_ROUNDS).one()
    return State(
        federation_id=federation_id,
        version=version,
        last_round=last_round or 0,
        rounds_completed=completed,
        members={row.name: Member(*row) for row in connection.execute(_MEMBERS)},
        pooled={row.member: PooledExpert(row.round, row.epoch, row.digest) for row in connection.execute(_POOLED)},
        matching_epochs=frozenset(epoch for epoch, _, wrong in setups if not wrong),
        distrusted_setups=frozenset((epoch, member) for epoch, member, wrong in setups if wrong),
        open_round=_open_round(connection),
        changes=changes,
    )


def read_newer(session: Session, known: State) -> State:
    """As `read_state`, for whoever knows an older one.

    What happens once for every member of every round changes parts alone, and no version: only those are read again.
    A thousand members send thousands of messages a round.
    """
    connection = session.connection()
    version, changes = connection.execute(_COUNTS).one()
    if (version, changes) == (known.version, known.changes):
        return known
    open_round = known.open_round
    if version != known.version or changes < known.changes or open_round is None:
        return read_state(session)
    changed = connection.execute(_CHANGED_PARTS, {"number": open_round.number, "known": known.changes})
    parts = {**open_round.parts, **{row.member: Part(*row[1:]) for row in changed}}
    return replace(known, changes=changes, open_round=replace(open_round, parts=parts))


def _open_round(connection: Connection) -> OpenRound | None:
    row = connection.execute(_OPEN_ROUND).one_or_none()
    if row is None:
        return None
    parts = connection.execute(_PARTS, {"number": row.number})
    # Sorted here: what a database takes for alphabetical order depends on how it was set up.
    return OpenRound(*row, parts={part.member: Part(*part[1:]) for part in sorted(parts, key=lambda part: part.member)})
