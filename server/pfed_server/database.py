"""Opening the database of a state directory: whose it is, whether it is sound, and how SQLite is to treat it."""

from __future__ import annotations

import hashlib
import logging
import secrets
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from pfed_server.schema import SCHEMA_VERSION, Base, MetaRow
from pfedsecure.console import one_line
from pfedsecure.errors import StateError, StateLocked
from pfedsecure.plan import Plan

DATABASE_FILE = "federation.sqlite"
LOCK_FILE = "lock"

_logger = logging.getLogger(__name__)

_PRAGMAS = ("foreign_keys=ON", "synchronous=FULL", "secure_delete=ON")
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


class StateFolder:
    """A state directory that this process alone uses until `release`. Others on the machine may not look into it."""

    def __init__(self, folder: Path) -> None:
        self._database = folder / DATABASE_FILE
        self._lock = FileLock(folder / LOCK_FILE, timeout=0, mode=0o600, thread_local=False)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
            if not self._database.exists():
                self._database.touch(mode=0o600)  # SQLite gives its other files the same mode
        except Timeout:
            raise StateLocked(
                f"{folder}: another pfed-server uses this state; stop it, or give another --state"
            ) from None
        except OSError as error:
            raise StateError(
                f"{folder}: cannot be used as state directory ({error.strerror}); give another --state"
            ) from None

    def release(self) -> None:
        self._lock.release()

    def open_database(self, plan: Plan) -> Engine:
        """The database for `plan`, made when there is none yet. Raises StateError; nothing has been changed then."""
        engine = _engine(f"sqlite:///{self._database}")
        try:
            if (damage := self._pragma("quick_check(1)")) != "ok":
                raise self._corrupted(damage)
            with engine.begin() as connection:
                if inspect(connection).get_table_names():
                    self._check(connection, plan)
                else:
                    _create(connection, plan)
            self._pragma("journal_mode=WAL")
        except BaseException as error:
            engine.dispose()
            if isinstance(error, (sqlite3.Error, SQLAlchemyError)):
                raise self._explained(error) from None
            raise
        return engine

    def _pragma(self, pragma: str) -> str:
        with closing(sqlite3.connect(self._database)) as connection:
            return str(connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _check(self, connection: Connection, plan: Plan) -> None:
        version = connection.execute(select(MetaRow.schema_version)).scalar_one()
        if version != SCHEMA_VERSION:
            raise StateError(
                f"{self._database}: has schema version {version}, this pfed-server knows {SCHEMA_VERSION}; "
                "start the version of pfedsecure that wrote it, or give another --state"
            )
        plan_json = connection.execute(select(MetaRow.plan_json)).scalar_one()
        if plan_json != plan.to_json():
            digest = hashlib.sha256(plan_json.encode()).hexdigest()
            raise StateError(
                f"{self._database}: belongs to a federation with another plan (digest {digest[:12]}, now "
                f"{plan.digest()[:12]}); start it with that plan, or give another --state"
            )

    def _explained(self, error: sqlite3.Error | SQLAlchemyError) -> StateError:
        cause = error.orig if isinstance(error, DBAPIError) else error
        name = getattr(cause, "sqlite_errorname", None)
        if name in _DAMAGED:
            return self._corrupted(str(cause))
        if name in (None, "SQLITE_ERROR"):
            return StateError(f"{self._database}: is not the state of a pfed-server ({cause}); give another --state")
        return StateError(f"{self._database}: cannot be used ({cause}); check its permissions and the free space")

    def _corrupted(self, damage: str) -> StateError:
        return StateError(
            f"{self._database}: the saved state is corrupted ({one_line(damage)}); restore a copy, or give "
            "another --state to start a new federation"
        )


def in_memory_engine(plan: Plan) -> Engine:
    """A database for `plan` that ends with the process."""
    # The database is its one connection: threads take turns at it.
    one_connection = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    engine = _engine("sqlite://", connect_args={"check_same_thread": False}, **one_connection)
    with engine.begin() as connection:
        _create(connection, plan)
    return engine


def empty_log(engine: Engine) -> None:
    """Have nothing that was deleted remain in the write-ahead log.

    Where somebody reads the database meanwhile it stays until the next time, or until the database is opened again.
    """
    try:
        with closing(engine.raw_connection()) as connection:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except (sqlite3.Error, SQLAlchemyError):
        _logger.exception("the log of the database cannot be emptied; what was deleted may still be read in it")


def _engine(url: str, **options: Any) -> Engine:
    engine = create_engine(url, **options)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    # Left to itself the driver begins a transaction before DML but not before DDL: creation could be left half done.
    connection.isolation_level = None
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _create(connection: Connection, plan: Plan) -> None:
    Base.metadata.create_all(connection)
    connection.execute(
        insert(MetaRow).values(
            id=1,
            schema_version=SCHEMA_VERSION,
            federation_id=secrets.token_hex(16),
            plan_json=plan.to_json(),
            version=1,
        )
    )
