"""What happened so far, read from the tables round by round: nothing of a round changes once it has ended.

A federation of a thousand clients has a thousand rows for each of its rounds. Whoever asks where it stands, a page
every few seconds say, must not have all of them read again while everybody's calls wait.
"""

from __future__ import annotations

from sqlalchemy import Connection, Integer, bindparam, cast, func, select
from sqlalchemy.orm import Session

from pfed_server.schema import CLOSED, OPEN, PartRow, ReportRow, RoundRow
from pfed_server.store import History, RoundRecord, Traffic

_ROUNDS_AFTER = (
    select(
        RoundRow.number,
        RoundRow.outcome,
        RoundRow.opened_at,
        RoundRow.closed_at,
        RoundRow.metrics,
        func.count(),
        func.sum(cast(PartRow.counted, Integer)),
        func.sum(PartRow.bytes_received),
        func.sum(PartRow.bytes_sent),
    )
    .join(PartRow)
    .where(RoundRow.number > bindparam("known"))
    .group_by(RoundRow.number)
    .order_by(RoundRow.number)
)
_LAST_ROUNDS_AFTER = (
    select(PartRow.member, func.max(PartRow.round))
    .join(RoundRow)
    .where(RoundRow.number > bindparam("known"), RoundRow.outcome == CLOSED, PartRow.counted)
    .group_by(PartRow.member)
)
_REPORTS = select(ReportRow.author, func.count()).group_by(ReportRow.author)


class HistoryReader:
    """Of one database. A round that has ended is read once, and remembered."""

    def __init__(self) -> None:
        self._ended: list[RoundRecord] = []
        self._last_rounds: dict[str, int] = {}

    def read(self, session: Session) -> History:
        """All of it as of now; called one at a time."""
        known = self._ended[-1].number if self._ended else 0
        session.flush()
        connection = session.connection()
        rounds = _rounds_after(connection, known)
        last_rounds = self._last_rounds | _last_rounds_after(connection, known)
        reports = connection.execute(_REPORTS)
        history = History([*self._ended, *rounds], last_rounds, dict(reports.all()))
        self._ended = [record for record in history.rounds if record.outcome != OPEN]
        self._last_rounds = last_rounds
        return history


def _rounds_after(connection: Connection, number: int) -> list[RoundRecord]:
    return [
        RoundRecord(
            number=number,
            outcome=outcome,
            cohort=cohort,
            updates=updates,
            seconds=None if closed_at is None else closed_at - opened_at,
            traffic=Traffic(int(received), int(sent)),  # sums are decimal numbers to PostgreSQL
            metrics=metrics,
        )
        for number, outcome, opened_at, closed_at, metrics, cohort, updates, received, sent in connection.execute(
            _ROUNDS_AFTER, {"known": number}
        )
    ]


def _last_rounds_after(connection: Connection, number: int) -> dict[str, int]:
    """By member: the newest closed round that has its update, where that is a later one than `number`."""
    return dict(connection.execute(_LAST_ROUNDS_AFTER, {"known": number}).all())
