"""What is checked of a federation in PostgreSQL, which is read and not changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfed_cli.doctor.findings import Finding
from pfed_cli.doctor.server import of_plan, of_schema
from pfed_server.database import ELSEWHERE_FILE
from pfed_server.postgres import Location, exposed
from pfed_server.schema import Base
from pfedsecure.console import one_line
from pfedsecure.errors import ServerUnreachable

if TYPE_CHECKING:
    import psycopg

_NEEDED = ("SELECT", "INSERT", "UPDATE", "DELETE")


def database(location: Location | None, folder: Path, plan_file: Path | None) -> Iterator[Finding]:
    """Of what `--database` names. `folder`: the state directory. Raises ServerUnreachable, PlanError."""
    known = _known(folder)
    if location is None:
        if known is not None:
            said = f"{folder} belongs to a federation in PostgreSQL: give --database to have it looked at"
            yield Finding("database", "warning", said)
        return
    import psycopg

    before = time.monotonic()
    try:
        with closing(location.connect()) as session:
            took = 1000 * (time.monotonic() - before)
            session.read_only = True
            yield Finding("database", "ok", f"{location} lets this role in, in {took:.0f} ms")
            yield from _session(session)
            yield from _content(session, location, known, plan_file)
    except psycopg.Error as error:
        raise ServerUnreachable(
            f"{location} cannot be read ({one_line(str(error))}): check that it runs and listens there, and the role "
            "and its password in PGPASSFILE"
        ) from None


def _known(folder: Path) -> str | None:
    """The federation that a state directory has been used for."""
    file = folder / ELSEWHERE_FILE
    return (file.read_text().strip() if file.exists() else "") or None


def _session(session: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Whether what is written there is kept, and who else can read it on the way."""
    if (risk := exposed(session)) is not None:
        host, mode = risk
        said = f"NOT PROTECTED: whoever is on the way to {host} can read and change what goes there (sslmode={mode})"
        yield Finding("database", "warning", f"{said}; give sslmode=verify-full and sslrootcert in --database")
    if _one(session, "SELECT pg_is_in_recovery()"):
        yield Finding("database", "wrong", "it is a standby, which takes no changes: give the primary in --database")
    if _one(session, "SHOW fsync") == "off":
        said = "fsync is off: after a power failure receipts may be worth nothing; turn it on in postgresql.conf"
        yield Finding("database", "wrong", said)


def _content(
    session: psycopg.Connection[Any], location: Location, known: str | None, plan_file: Path | None
) -> Iterator[Finding]:
    tables = [*sorted(Base.metadata.tables), "alembic_version"]
    there = [table for table in tables if _one(session, "SELECT to_regclass(%s) IS NOT NULL", table)]
    others = _one(session, "SELECT count(*) FROM pg_tables WHERE schemaname = ANY (current_schemas(false))")
    if not {"meta", "alembic_version"} <= set(there):
        if others:
            said = f"{location} has {others} tables that are not of a pfed-server: give an empty one"
            yield Finding("database", "wrong", said)
        elif known is not None:
            said = f"{location} is empty, and the state directory belongs to federation {known[:12]}"
            yield Finding("database", "wrong", f"{said}: give the database that has it, or another --state")
        elif not _one(session, "SELECT has_schema_privilege('public', 'CREATE')"):
            yield Finding("database", "wrong", f"this role may make no tables in {location}: make it the owner")
        else:
            yield Finding("database", "ok", f"{location} is empty: pfed-server will make its tables")
        return
    may = (_one(session, "SELECT has_table_privilege(%s, %s)", table, what) for table in there for what in _NEEDED)
    if not all(may):
        yield Finding("database", "wrong", f"this role may not change what is in {location}: make it the owner")
        return
    yield of_schema(f"{location}", str(_one(session, "SELECT version_num FROM alembic_version")), "database")
    federation_id = _one(session, "SELECT federation_id FROM meta")
    if federation_id is None:
        yield Finding("database", "wrong", f"{location} has the tables and no federation: restore a copy")
        return
    if known not in (None, federation_id):
        said = f"{location} has federation {federation_id[:12]}, and the state directory belongs to {str(known)[:12]}"
        yield Finding("database", "wrong", f"{said}: give the database that has it, or another --state")
    yield from of_plan(f"{location}", _one(session, "SELECT plan_json FROM meta"), plan_file, "--database another one")


def _one(session: psycopg.Connection[Any], question: str, *values: str) -> Any:
    row = session.execute(question.encode(), values or None).fetchone()
    return None if row is None else row[0]
