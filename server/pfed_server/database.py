"""A state directory, and the SQLite database in it: whose it is, whether it is sound, and how SQLite is to treat it."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
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
MOVED_FILE = f"{DATABASE_FILE}.moved"
"""The database as it was when its federation was moved to PostgreSQL."""
ELSEWHERE_FILE = "postgresql"
"""In a state directory whose federation is in PostgreSQL: that federation's id."""

_logger = logging.getLogger(__name__)

_PRAGMAS = ("foreign_keys=ON", "synchronous=FULL", "secure_delete=ON")
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


class StateFolder:
    """A state directory that this process alone uses until `release`. Others on the machine may not look into it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = folder / DATABASE_FILE
        self._elsewhere = folder / ELSEWHERE_FILE
        self._lock = FileLock(folder / LOCK_FILE, timeout=0, mode=0o600, thread_local=False)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise StateLocked(
                f"{folder}: another pfed-server uses this state; stop it, or give another --state"
            ) from None
        except OSError as error:
            raise self._unusable(error) from None

    def release(self) -> None:
        self._lock.release()

    def known_elsewhere(self) -> str | None:
        """The id of the federation in PostgreSQL that this directory has been used for; None for a new directory.

        Raises StateError for one that has a federation in SQLite.
        """
        self._require_whole()
        if self._database.exists() and self._database.stat().st_size:
            raise StateError(
                f"{self._folder}: holds a federation in SQLite, which --database would leave behind; move it there "
                "with `pfed move`, or give another --state"
            )
        try:
            return (self._elsewhere.read_text().strip() if self._elsewhere.exists() else "") or None
        except OSError as error:
            raise self._unusable(error) from None

    def is_elsewhere(self, federation_id: str) -> None:
        """Note that this directory is used for a federation in PostgreSQL. Raises StateError."""
        try:
            self._elsewhere.write_text(f"{federation_id}\n")
            _sync(self._elsewhere)
        except OSError as error:
            raise self._unusable(error) from None

    def _require_whole(self) -> None:
        """Raise StateError in the middle of a move."""
        if self._elsewhere.exists() and self._database.exists() and self._database.stat().st_size:
            raise StateError(
                f"{self._folder}: its move to PostgreSQL was broken off; run `pfed move` again, with the same options"
            )

    def open_to_move(self) -> Engine:
        """The database that is here, of the newest schema. Raises StateError for none, or one that cannot be used."""
        if not self._database.exists():
            raise StateError(f"{self._folder}: there is no {DATABASE_FILE}; give the --state that the server has")
        engine = self._opened(self._require_newest)
        if self._pragma("wal_checkpoint(TRUNCATE)") != "0":  # what is put aside in the end is the file alone
            engine.dispose()
            raise StateError(f"{self._database}: another program reads it now; stop that one, then try again")
        return engine

    def has_moved(self) -> Path:
        """The federation is in PostgreSQL; where its database was put aside. Raises StateError.

        Where this does not happen after `is_elsewhere` no server starts here before it was moved once more.
        """
        aside = self._database.with_name(MOVED_FILE)
        try:
            self._database.replace(aside)
            _sync(self._folder)
        except OSError as error:
            raise StateError(
                f"{self._database}: was moved to PostgreSQL and cannot be put aside ({error.strerror}); mend that, and "
                "run `pfed move` again"
            ) from None
        return aside

    def open_database(self, plan: Plan) -> Engine:
        """The database for `plan`, made when there is none yet, brought to the newest schema when it has an older one.

        Raises StateError; the database is as it was then. A copy of an older one stays beside it.
        """
        self._require_whole()
        if self._elsewhere.exists():
            raise StateError(
                f"{self._folder}: its federation is in PostgreSQL; give --database, or another --state for a new "
                "federation"
            )
        try:
            if not self._database.exists():
                self._database.touch(mode=0o600)  # SQLite gives its other files the same mode
        except OSError as error:
            raise self._unusable(error) from None
        return self._opened(partial(self._prepare, plan))

    def _opened(self, work: Callable[[Engine], None]) -> Engine:
        """The sound database that is here, after `work` on it. Raises StateError."""
        engine = _engine(f"sqlite:///{self._database}")
        try:
            if (damage := self._pragma("quick_check(1)")) != "ok":
                raise self._corrupted(damage)
            work(engine)
        except BaseException as error:
            engine.dispose()
            if isinstance(error, (sqlite3.Error, SQLAlchemyError)):
                raise self.explained(error) from None
            raise
        return engine

    def _prepare(self, plan: Plan, engine: Engine) -> None:
        with engine.begin() as connection:
            found = migrations.current(connection)
            if found is None:
                create(connection, plan)
            else:
                check(connection, plan, found, str(self._database), "another --state")
        if found not in (None, migrations.newest()):
            self._upgrade(engine, found)
        with engine.begin() as connection:
            write_plan(connection, plan)
        self._pragma("journal_mode=WAL")

    def _require_newest(self, engine: Engine) -> None:
        with engine.begin() as connection:
            found = migrations.current(connection)
        if found != migrations.newest():
            raise StateError(
                f"{self._database}: has schema {one_line(str(found))}; start the pfed-server of this version on it "
                "once, which brings it to the newest"
            )

    def _pragma(self, pragma: str) -> str:
        with closing(sqlite3.connect(self._database)) as connection:
            return str(connection.execute(f"PRAGMA {pragma}").fetchone()[0])

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

    def _unusable(self, error: OSError) -> StateError:
        return StateError(f"{self._folder}: cannot be used as state directory ({error.strerror}); give another --state")

    def explained(self, error: sqlite3.Error | SQLAlchemyError) -> StateError:
        """What an error of the database that is here means."""
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
        create(connection, plan)
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


def create(connection: Connection, plan: Plan) -> None:
    """Make the tables of the newest schema, and a federation of `plan` that begins."""
    Base.metadata.create_all(connection)
    connection.execute(
        insert(MetaRow).values(id=1, federation_id=secrets.token_hex(16), plan_json=plan.to_json(), version=1)
    )
    migrations.mark_newest(connection)


def check(connection: Connection, plan: Plan, schema: str, database: str, instead: str) -> None:
    """Raise StateError unless a database of `schema` is one of a federation of `plan`. `instead`: what else to give."""
    if schema not in migrations.known():
        raise StateError(
            f"{database}: has schema {one_line(schema)}, this pfed-server knows {migrations.BASELINE} to "
            f"{migrations.newest()}; start the version of pfedsecure that wrote it, or give {instead}"
        )
    plan_json = connection.execute(select(MetaRow.plan_json)).scalar_one()
    if not _same_plan(plan_json, plan):
        digest = hashlib.sha256(plan_json.encode()).hexdigest()
        raise StateError(
            f"{database}: belongs to a federation with another plan (digest {digest[:12]}, now "
            f"{plan.digest()[:12]}); start it with that plan, or give {instead}"
        )


def write_plan(connection: Connection, plan: Plan) -> None:
    """A version that adds to what plans can say writes the same plan in more words."""
    said = MetaRow.plan_json != plan.to_json()
    connection.execute(update(MetaRow).where(said).values(plan_json=plan.to_json()))


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
