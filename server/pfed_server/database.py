"""Opening the database of a state directory: whose it is, whether it is sound, and how SQLite is to treat it."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, insert, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from pfed_server import migrations
from pfed_server.schema import Base, MetaRow
from pfedsecure.console import one_line
from pfedsecure.errors import PlanError, StateError, StateLocked
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
        """The database for `plan`, made when there is none yet, brought to the newest schema when it has an older one.

        Raises StateError; the database is as it was then. A copy of an older one stays beside it.
        """
        engine = _engine(f"sqlite:///{self._database}")
        try:
            if (damage := self._pragma("quick_check(1)")) != "ok":
                raise self._corrupted(damage)
            with engine.begin() as connection:
                found = migrations.current(connection)
                if found is None:
                    _create(connection, plan)
                else:
                    self._check(connection, plan, found)
            if found not in (None, migrations.newest()):
                self._upgrade(engine, found)
            with engine.begin() as connection:
                # A version that adds to what plans can say writes the same plan in more words.
                said = MetaRow.plan_json != plan.to_json()
                connection.execute(update(MetaRow).where(said).values(plan_json=plan.to_json()))
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

    def _check(self, connection: Connection, plan: Plan, schema: str) -> None:
        if schema not in migrations.known():
            raise StateError(
                f"{self._database}: has schema {one_line(schema)}, this pfed-server knows {migrations.BASELINE} to "
                f"{migrations.newest()}; start the version of pfedsecure that wrote it, or give another --state"
            )
        plan_json = connection.execute(select(MetaRow.plan_json)).scalar_one()
        if not _same_plan(plan_json, plan):
            digest = hashlib.sha256(plan_json.encode()).hexdigest()
            raise StateError(
                f"{self._database}: belongs to a federation with another plan (digest {digest[:12]}, now "
                f"{plan.digest()[:12]}); start it with that plan, or give another --state"
            )

    def _upgrade(self, engine: Engine, schema: str) -> None:
        """Bring the database from `schema` to the newest one, after a copy of it is on disk."""
        copy = self._database.with_name(f"{DATABASE_FILE}.schema-{schema}")
        try:
            self._copy(copy)
        except OSError as error:
            raise StateError(
                f"{copy}: the database cannot be copied before its upgrade ({error.strerror}); make room for it, or "
                "check the permissions of the folder"
            ) from None
        with engine.begin() as connection:
            migrations.upgrade(connection)
        _logger.info("%s: brought from schema %s to %s", self._database, schema, migrations.newest())
        _logger.info("%s is a copy of it as it was; remove it when you need it no longer", copy)

    def _copy(self, target: Path) -> None:
        """A whole copy on disk, or none. Raises OSError, sqlite3.Error."""
        beside = target.with_name(f"{target.name}.part")
        beside.unlink(missing_ok=True)
        beside.touch(mode=0o600)
        with closing(sqlite3.connect(self._database)) as source, closing(sqlite3.connect(beside)) as copy:
            source.backup(copy)
        _sync(beside)
        beside.replace(target)
        _sync(target.parent)

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
        insert(MetaRow).values(id=1, federation_id=secrets.token_hex(16), plan_json=plan.to_json(), version=1)
    )
    migrations.mark_newest(connection)


def _same_plan(plan_json: str, plan: Plan) -> bool:
    """Whether what is stored says the same as `plan`; what it does not say has its default."""
    try:
        return Plan.from_json(plan_json) == plan
    except PlanError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
