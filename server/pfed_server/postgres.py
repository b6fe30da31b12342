"""PostgreSQL as the place of a federation: where it is, what its sessions are like, and what is in it at the start.

Guaranteed: no password is taken from a command line, and none gets into a log, an error or a status, because none is
here: the driver finds it by itself, in PGPASSFILE or PGPASSWORD. Guaranteed against servers of the same federation:
only one holds the lock, and what it writes goes through the session that the lock ends with.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
from sqlalchemy import Connection, Engine, create_engine, func, select
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pfed_server import migrations
from pfed_server.database import check, create, write_plan
from pfed_server.schema import MetaRow
from pfedsecure.console import one_line
from pfedsecure.errors import ServerUnreachable, StateError
from pfedsecure.plan import Plan
from pfedsecure.wire.loopback import is_loopback

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

LOCK_SECONDS = 20
"""A server that waits longer for another's change tells its callers to try again."""
HUNG_SECONDS = 300
"""A server that holds the lock and says nothing for so long loses its session, and with it the lock."""

_LOCK_KEY = int.from_bytes(hashlib.sha256(b"the lock of a pfedsecure federation").digest()[:8], "big", signed=True)
_SCHEMES = ("postgresql://", "postgres://")
_SECRETS = {"password", "sslpassword"}
_SESSION = {
    "lock_timeout": f"{LOCK_SECONDS}s",
    "idle_session_timeout": f"{HUNG_SECONDS}s",
    "synchronous_commit": "on",  # a change that a client has a receipt for survives a crash
}
_CONNECTION = {
    "application_name": "pfed-server",
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """Where a database is, in libpq's words; without a password. Written in a log it tells name and host."""

    parameters: Mapping[str, str]

    def __str__(self) -> str:
        name = self.parameters.get("dbname", "of the role's name")
        return f"PostgreSQL database {name} at {self.parameters.get('host', 'the default host')}"

    def connect(self) -> psycopg.Connection[Any]:
        """A new session. Raises psycopg.Error."""
        import psycopg
        from psycopg.conninfo import make_conninfo

        settings = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
        own = {"options": f"{settings} {self.parameters.get('options', '')}".strip()}
        return psycopg.connect(make_conninfo(**{**_CONNECTION, **self.parameters, **own}))


def parse_location(text: str) -> Location:
    """A URL of libpq, for `click.option(type=parse_location, metavar="URL")`.

    Raises click.UsageError without the driver and click.BadParameter, which never repeats the text: it may hold a
    password.
    """
    try:
        from psycopg import Error
        from psycopg.conninfo import conninfo_to_dict
    except ImportError:
        raise click.UsageError("--database takes psycopg: pip install 'pfedsecure[postgres]'") from None
    if not text.startswith(_SCHEMES):
        raise click.BadParameter("is not a URL such as postgresql://pfed@db.example.org/pfed?sslmode=verify-full")
    try:
        parameters = {name: str(value) for name, value in conninfo_to_dict(text).items()}
    except Error:
        raise click.BadParameter(
            "is no URL that libpq understands; write one such as postgresql://pfed@db.example.org/pfed"
        ) from None
    if _SECRETS & parameters.keys():
        raise click.BadParameter(
            "has a password in it, which everybody on this machine can read: change that password, and give the new "
            "one in the file that PGPASSFILE names, or in PGPASSWORD"
        )
    return Location(parameters)


def open_postgres(location: Location, plan: Plan, known: str | None) -> tuple[Engine, str]:
    """The database for `plan`, made when it is empty, brought to the newest schema when it has an older one; and the id
    of its federation. `known`: the federation that it must have, None for any.

    Raises ServerUnreachable when it cannot be reached, StateError when it is of something else; it is as it was then.
    """
    return set_up(location, partial(_prepared, location=location, plan=plan, known=known))


def set_up(location: Location, work: Callable[[Connection], T]) -> tuple[Engine, T]:
    """The database at `location`, and what `work` did there in one transaction while no server makes changes.

    Raises as `work` does, SQLAlchemy's errors as ServerUnreachable or StateError; nothing of it has happened then.
    """
    engine = create_engine(
        "postgresql+psycopg://",
        creator=location.connect,
        isolation_level="REPEATABLE READ",  # a state is read in several questions, all about the same moment
        pool_size=3,  # the lock's, a look at what is newest, and one to spare
        max_overflow=2,
        pool_timeout=LOCK_SECONDS,
        pool_pre_ping=True,
        hide_parameters=True,
    )
    try:
        with engine.connect() as connection:
            _look_at_the_way(connection)
            with _locked(connection), connection.begin():
                done = work(connection)
    except BaseException as error:
        engine.dispose()
        if isinstance(error, SQLAlchemyError):
            raise _explained(error, location) from None
        raise
    return engine, done


def lock(connection: Connection) -> None:
    """Wait for the lock of the federation; it ends with `unlock`, or with the session. Raises SQLAlchemyError."""
    connection.execute(select(func.pg_advisory_lock(_LOCK_KEY)))
    connection.commit()  # what is read from now on was committed after whoever had the lock before


def unlock(connection: Connection) -> None:
    """Give the lock back, or end the session that has it. Raises nothing."""
    try:
        if not connection.invalidated:
            connection.rollback()
            connection.execute(select(func.pg_advisory_unlock(_LOCK_KEY)))
            connection.commit()
    except SQLAlchemyError:
        connection.invalidate()


@contextmanager
def _locked(connection: Connection) -> Iterator[None]:
    lock(connection)
    try:
        yield
    finally:
        unlock(connection)


def _prepared(connection: Connection, location: Location, plan: Plan, known: str | None) -> str:
    found = migrations.current(connection)
    if found is None and known is not None:
        raise StateError(
            f"{location}: is empty, and the state directory belongs to federation {known[:12]}; give the database that "
            "has it, or another --state for a new federation"
        )
    if found is None:
        create(connection, plan)
    else:
        check(connection, plan, found, str(location), "another --database")
    federation_id = connection.execute(select(MetaRow.federation_id)).scalar_one()
    if known not in (None, federation_id):
        raise StateError(
            f"{location}: has federation {federation_id[:12]}, and the state directory belongs to {str(known)[:12]}; "
            "give the database that has it, or another --state"
        )
    if found not in (None, migrations.newest()):
        migrations.upgrade(connection)
        _logger.info("%s: brought from schema %s to %s", location, found, migrations.newest())
    write_plan(connection, plan)
    return str(federation_id)


def exposed(session: psycopg.Connection[Any]) -> tuple[str, str] | None:
    """Host and sslmode of a connection that others can read or take over; None for one that they cannot."""
    host, mode = session.info.host, session.info.get_parameters().get("sslmode", "prefer")
    if mode == "verify-full" or not host or host.startswith("/") or is_loopback(host):
        return None
    return host, mode


def _look_at_the_way(connection: Connection) -> None:
    risk = exposed(connection.connection.driver_connection)  # type: ignore[arg-type]
    connection.rollback()
    if risk is not None:
        _logger.warning(
            "NOT PROTECTED: whoever is between this server and its database at %s can read and change what goes there "
            "(sslmode=%s); give sslmode=verify-full and sslrootcert in --database",
            *risk,
        )


def _explained(error: SQLAlchemyError, location: Location) -> ServerUnreachable | StateError:
    cause = one_line(str(error.orig if isinstance(error, DBAPIError) else error))
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        return ServerUnreachable(
            f"{location} cannot be used ({cause}); check that it runs and listens there, and the role and its password "
            "in PGPASSFILE"
        )
    return StateError(
        f"{location}: is not the database of a pfed-server, or the role may not use it ({cause}); give another "
        "--database, or make the role its owner"
    )
