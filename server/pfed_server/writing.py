"""What several changes of the tables have in common, each for many members at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.exc import NoResultFound
from sqlalchemy.orm import Session

from pfed_server.schema import PartRow, PoolRow
from pfed_server.store import Traffic

# Made once, because that takes longer than carrying it out.
_UPDATE_PARTS = (
    update(PartRow)
    .where(PartRow.round == bindparam("of_round"), PartRow.member == bindparam("of_member"))
    .values(
        bytes_received=PartRow.bytes_received + bindparam("received"),
        bytes_sent=PartRow.bytes_sent + bindparam("sent"),
    )
)


def drop_experts(session: Session, names: Collection[str]) -> None:
    """Forget what is lent of members, and what was to be lent when the open round closes."""
    session.execute(delete(PoolRow).where(PoolRow.member.in_(names)))
    staged = update(PartRow).where(PartRow.member.in_(names), PartRow.expert.is_not(None))
    session.execute(staged.values(expert=None, sketch=None, epoch=0, publication_digest=None))


def reveal_experts(session: Session, number: int) -> None:
    """Put the experts staged in a round in the place of the older ones of the same members."""
    columns = (PartRow.member, PartRow.round, PartRow.expert, PartRow.sketch, PartRow.epoch, PartRow.publication_digest)
    staged = select(*columns).where(PartRow.round == number, PartRow.expert.is_not(None))
    session.execute(delete(PoolRow).where(PoolRow.member.in_(select(staged.subquery().c.member))))
    session.execute(insert(PoolRow).from_select(["member", "round", "expert", "sketch", "epoch", "digest"], staged))


def update_parts(
    session: Session, number: int, parts: Mapping[str, Mapping[str, Any]], traffic: Mapping[str, Traffic]
) -> None:
    """Set columns of members' parts of a round, the same ones of each, and add to their traffic.

    By one statement for all of them. Raises NoResultFound where one has no part.
    """
    if not parts:
        return
    rows = []
    for name, to in parts.items():
        bytes_since = traffic.get(name, Traffic())
        counted = {"received": bytes_since.received, "sent": bytes_since.sent}
        rows.append({"of_round": number, "of_member": name, **counted, **to})
    updated = session.connection().execute(_UPDATE_PARTS, rows)
    if updated.rowcount != len(rows):
        raise NoResultFound(f"{len(rows) - updated.rowcount} of {len(rows)} members have no part in round {number}")
