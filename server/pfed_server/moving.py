"""Moving a federation under way from its file into PostgreSQL: all of it, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, insert, select

from pfed_server import migrations
from pfed_server.database import StateFolder, empty_log
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

    Every row is written in one transaction, and compared with what it was before that ends; after it the file is put
    aside. Killed at any moment it can be run again. Raises StateLocked while a server runs, StateError when either
    place cannot be used or the database has something else, ServerUnreachable; the federation is in its file then.
    """
    with ExitStack() as stack:
        state_folder = StateFolder(folder)
        stack.callback(state_folder.release)
        source = state_folder.open_to_move()
        stack.callback(source.dispose)
        engine, federation_id = set_up(location, partial(_copied, source=source, location=location))
        engine.dispose()
        empty_log(source)  # what was committed is in the file itself
        source.dispose()
        return Moved(federation_id, state_folder.has_moved(federation_id))


def _copied(target: Connection, source: Engine, location: Location) -> str:
    """The id of the federation that was copied, or was already there as it is here."""
    with source.begin() as here:
        federation_id = str(here.execute(select(MetaRow.federation_id)).scalar_one())
        if migrations.current(target) is None:
            Base.metadata.create_all(target)
            migrations.mark_newest(target)
            for table in Base.metadata.sorted_tables:
                for rows in here.execute(select(table)).mappings().partitions(ROWS_AT_ONCE):
                    target.execute(insert(table), [dict(row) for row in rows])
        for table in Base.metadata.sorted_tables:
            if _digest(here.execute(select(table))) != _digest(target.execute(select(table))):
                raise StateError(
                    f"{location}: has something else in table {table.name} than the federation to be moved; give an "
                    "empty database"
                )
    return federation_id


def _digest(rows: Iterable[Any]) -> tuple[int, int]:
    """The same for the same rows in any order."""
    digests = [int.from_bytes(hashlib.sha256(repr(tuple(row)).encode()).digest(), "big") for row in rows]
    return len(digests), sum(digests)
