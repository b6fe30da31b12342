"""What is checked of a server: its identity, plan, state, audit log, disk and port."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from filelock import FileLock, Timeout

from pfed_cli.doctor.findings import Finding
from pfed_server import migrations
from pfed_server.audit import AUDIT_FILE
from pfed_server.audit_chain import verify
from pfed_server.cli import DEMO_PLAN
from pfed_server.database import DATABASE_FILE, ELSEWHERE_FILE, LOCK_FILE
from pfedsecure.clip.config import context_shape
from pfedsecure.plan import Plan


def is_running(state: Path) -> bool:
    """Whether a server uses a state directory now."""
    if not (state / LOCK_FILE).exists():
        return False
    lock = FileLock(state / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def plan(file: Path | None) -> Iterator[Finding]:
    """Raises PlanError."""
    agreed = Plan.from_toml(file or DEMO_PLAN)
    context_shape(agreed, None)
    yield Finding(
        "plan", "ok", f"{file or 'the embedded demo plan'}: federation {agreed.name}, digest {agreed.digest()}"
    )
    for sentence in agreed.unprotected():
        yield Finding("plan", "warning", f"NOT PROTECTED: {sentence}")


def state(folder: Path, plan_file: Path | None) -> Iterator[Finding]:
    """Of the database, which is read and not changed."""
    database = folder / DATABASE_FILE
    if (folder / ELSEWHERE_FILE).exists():
        yield Finding("state", "ok", f"{folder} belongs to a federation in PostgreSQL")
        return
    if not database.exists():
        yield Finding("state", "ok", f"{folder} holds no state yet: pfed-server will make one")
        return
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                yield Finding("state", "wrong", f"{database} is damaged ({damage}): restore a copy")
                return
            plan_json = connection.execute("SELECT plan_json FROM meta").fetchone()[0]
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            marks = "SELECT version_num FROM alembic_version"
            version = marks if "alembic_version" in tables else "SELECT schema_version FROM meta"
            schema = str(connection.execute(version).fetchone()[0])
    except (sqlite3.Error, TypeError) as error:
        yield Finding("state", "wrong", f"{database} cannot be read ({error}): is it of a pfed-server? restore a copy")
        return
    yield of_schema(f"{database}", schema, "state", "is sound")
    yield from of_plan(f"{database}", plan_json, plan_file, "--state another folder")


def of_schema(where: str, schema: str, check: str, sound: str = "can be read") -> Finding:
    """Of a database `where` there is a federation."""
    if schema not in migrations.known():
        said = f"this version knows {migrations.BASELINE} to {migrations.newest()}"
        return Finding(
            check,
            "wrong",
            f"{where} has schema {schema}, {said}: install the version of pfedsecure that wrote it",
        )
    if schema != migrations.newest():
        return Finding(check, "ok", f"{where} has schema {schema}: the next start brings it to {migrations.newest()}")
    return Finding(check, "ok", f"{where} {sound}, schema {schema}")


def of_plan(where: str, plan_json: str, plan_file: Path | None, instead: str) -> Iterator[Finding]:
    """Whether a federation that is kept `where` has the server's plan. Raises PlanError."""
    stored = Plan.from_json(plan_json)
    if stored != Plan.from_toml(plan_file or DEMO_PLAN):
        said = f"{where} is of a federation with the plan {stored.digest()[:12]}"
        yield Finding("plan", "wrong", f"{said}: give --plan that plan, or {instead}")


def audit(folder: Path) -> Iterator[Finding]:
    """Of the audit log. Raises AuditError."""
    path = folder / AUDIT_FILE
    if path.exists():
        verdict = verify(path)
        yield Finding(
            "audit", "ok", f"{path}: {verdict.lines} lines, the chain holds; head {verdict.head or 'none yet'}"
        )
