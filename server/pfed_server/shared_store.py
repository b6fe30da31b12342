"""The store in PostgreSQL, which several servers of one federation use at once.

Each change is made by the one server that holds the lock, on a state that it has read after it got it. The lock belongs
to the session through which that server writes, so a server that loses its session can write no more. And should a lock
not hold, as behind a proxy that hands sessions around, `count_change` refuses what was decided on an older state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import Connection, Engine, column, extract, func, select, table
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from pfed_server import migrations
from pfed_server.database import StateFolder
from pfed_server.postgres import Location, lock, open_postgres, unlock
from pfed_server.reading import read_newer, read_state
from pfed_server.schema import MetaRow, PresenceRow
from pfed_server.sql_store import SqlStore
from pfed_server.store import SharedStore, State, StateOvertaken
from pfedsecure.plan import Plan

_SCHEMA = select(column("version_num")).select_from(table("alembic_version")).scalar_subquery()


class PostgresStore(SqlStore):
    """The `SharedStore` of one federation; made by `connect`."""

    shared: SharedStore

    def __init__(self, engine: Engine, federation_id: str, folder: StateFolder | None = None) -> None:
        super().__init__(engine, folder)
        self.shared = self
        self._is_of = federation_id, migrations.newest()
        self._looking = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._held: Connection | None = None

    @classmethod
    def connect(cls, location: Location, folder: Path, plan: Plan) -> Self:
        """The federation in the database at `location`, made there for `plan` when there is none.

        `folder` has what is this server's own, and remembers the federation. It is locked until `close`. Raises
        StateLocked when another process uses it, ServerUnreachable when the database cannot be reached, StateError when
        one of the two is of another federation, schema version or plan; nothing has been changed then.
        """
        state_folder = StateFolder(folder)
        try:
            known = state_folder.known_elsewhere()
            engine, federation_id = open_postgres(location, plan, known)
            if known is None:
                state_folder.is_elsewhere(federation_id)
            return cls(engine, federation_id, state_folder)
        except BaseException:
            state_folder.release()
            raise

    def acquire(self) -> State:
        connection = self._engine.connect()
        try:
            lock(connection)
            self._newest_in(connection)
            connection.commit()
            self._held = connection
            return self.refresh()
        except BaseException:
            self._held = connection
            self.release()
            raise

    def release(self) -> None:
        connection, self._held = self._held, None
        assert connection is not None
        unlock(connection)
        connection.close()

    def is_current(self, state: State) -> bool:
        with self._looking.connect() as connection:
            return self._newest_in(connection) == (state.version, state.changes)

    def refresh(self) -> State:
        with self._transaction() as session:
            state = read_state(session) if self._newest is None else read_newer(session, self._newest)
        return self._is_now(state)

    def hear(self, silence: Mapping[str, float]) -> dict[str, float]:
        now = extract("epoch", func.clock_timestamp())
        with self._transaction() as session:
            if silence:
                rows = [{"member": name, "heard_at": now - seconds} for name, seconds in silence.items()]
                heard = insert(PresenceRow).values(rows)
                latest = func.greatest(PresenceRow.heard_at, heard.excluded.heard_at)
                session.execute(heard.on_conflict_do_update(index_elements=["member"], set_={"heard_at": latest}))
            ages = session.execute(select(PresenceRow.member, now - PresenceRow.heard_at))
            return {name: float(seconds) for name, seconds in ages}

    def _newest_in(self, connection: Connection) -> tuple[int, int]:
        """Version and number of changes of the newest state; raises as `is_current`."""
        newest = select(MetaRow.federation_id, MetaRow.version, MetaRow.changes, _SCHEMA)
        federation_id, version, changes, schema = connection.execute(newest).one()
        if (federation_id, schema) != self._is_of:
            raise StateOvertaken("the database has another federation or schema since; start this server again")
        return version, changes

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        if self._held is not None and self._held.invalidated:
            # It would be a new session, which has no lock.
            raise StateOvertaken("the session with the database was lost, and with it the lock")
        with Session(self._engine if self._held is None else self._held) as session, session.begin():
            yield session

    def _wipe(self) -> None:
        """PostgreSQL keeps what was deleted until it vacuums, and in its log: docs/operations.md says so."""
