"""Moving a federation under way from its file into PostgreSQL: all of it, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, FromClause, insert, select
from sqlalchemy.exc import SQLAlchemyError

from pfed_server import migrations
from pfed_server.database import StateFolder
from pfed_server.postgres import Location, set_up
from pfed_server.schema import Base, MetaRow
from pfedsecure.errors import StateError

ROWS_AT_ONCE = 100


@dataclass(frozen=True)
class Moved:
    """Which federation was moved, and where its file is now."""

    federation_id: str
    aside: Path


def move(folder: Path, location: Location) -> Moved:
    """Move the federation in the state directory `folder`, whose server is stopped, to the database at `location`.

    Every row is written in one transaction, and compared with what it was. Before that transaction ends the folder is
    marked, so that no server starts on the file any more; after it the file is put aside. Broken off at any moment it
    can be run again, and until then no server starts on a file that may have been moved. Raises StateLocked while a
    server runs, StateError when either place cannot be used or the database has something else, ServerUnreachable.
    """
    with ExitStack() as stack:
        state_folder = StateFolder(folder)
        stack.callback(state_folder.release)
        source = state_folder.open_to_move()
        stack.callback(source.dispose)
        copying = partial(_copied, source=source, state_folder=state_folder, location=location)
        engine, federation_id = set_up(location, copying)
        engine.dispose()
        source.dispose()
        return Moved(federation_id, state_folder.has_moved())


def _copied(target: Connection, source: Engine, state_folder: StateFolder, location: Location) -> str:
    """The id of the federation that was copied, or was already there as it is here."""
    tables = Base.metadata.sorted_tables
    with ExitStack() as stack:
        reading = _Source(stack.enter_context(source.begin()), state_folder)
        (meta,) = reading.rows(MetaRow.__table__)
        if migrations.current(target) is None:
            Base.metadata.create_all(target)
            migrations.mark_newest(target)
            for table in tables:
                for rows in reading.chunks(table):
                    target.execute(insert(table), rows)
        found = target.execute(select(MetaRow.federation_id, MetaRow.changes)).all()
        if found and found[0].federation_id == meta["federation_id"] and found[0].changes != meta["changes"]:
            raise StateError(
                f"{location}: has this federation already, and one of the two has gone on since; if it is that one, "
                "start pfed-server with --database and another --state, and do not move this one again"
            )
        for table in tables:
            if _digest(row.values() for row in reading.rows(table)) != _digest(target.execute(select(table))):
                raise StateError(
                    f"{location}: has something else in table {table.name} than the federation to be moved; give an "
                    "empty database"
                )
    # Before the end of the transaction, which may be the last that is heard of it.
    state_folder.is_elsewhere(meta["federation_id"])
    return str(meta["federation_id"])


class _Source:
    """The file's tables. Raises StateError for what SQLite raises, which is not PostgreSQL's fault."""

    def __init__(self, connection: Connection, state_folder: StateFolder) -> None:
        self._connection = connection
        self._state_folder = state_folder

    def chunks(self, table: FromClause) -> Iterator[list[dict[str, Any]]]:
        try:
            for rows in self._connection.execute(select(table)).mappings().partitions(ROWS_AT_ONCE):
                yield [dict(row) for row in rows]
        except SQLAlchemyError as error:
            raise self._state_folder.explained(error) from None

    def rows(self, table: FromClause) -> Iterator[dict[str, Any]]:
        for rows in self.chunks(table):
            yield from rows


def _digest(rows: Iterable[Any]) -> tuple[int, int]:
    """The same for the same rows in any order."""
    digests = [int.from_bytes(hashlib.sha256(repr(tuple(row)).encode()).digest(), "big") for row in rows]
    return len(digests), sum(digests)
