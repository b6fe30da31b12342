"""`pfed doctor server --database`: what it says of a real PostgreSQL, in which it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pfed_cli.doctor.database import database
from pfed_cli.doctor.findings import run
from pfed_server.cli import DEMO_PLAN
from pfed_server.database import ELSEWHERE_FILE
from pfed_server.postgres import parse_location
from pfed_server.shared_store import PostgresStore
from pfedsecure.plan import Plan

PLAN = Plan.from_toml(DEMO_PLAN)
NO_FSYNC = "wrong fsync is off: after a power failure receipts may be worth nothing; turn it on in postgresql.conf"
"""The tests' own PostgreSQL is set up so."""


@pytest.fixture
def name(cluster: Any) -> Iterator[str]:
    found = cluster.database()
    yield found
    cluster.sql(f"DROP DATABASE {found} WITH (FORCE)")


def examined(url: str, folder: Path, plan: Path | None = None) -> list[str]:
    """What is found but for the line that says how long it took to get in, and the missing fsync."""
    found = run("database", lambda: database(parse_location(url), folder, plan))
    said = [f"{finding.level} {finding.said}" for finding in found]
    return [each for each in said if "lets this role in" not in each and each != NO_FSYNC]


def put(url: str, folder: Path) -> str:
    """A federation of the demo's plan; its id."""
    with closing(PostgresStore.connect(parse_location(url), folder, PLAN)) as store:
        return store.load().federation_id


def test_before_there_is_anything(cluster: Any, name: str, tmp_path: Path) -> None:
    first, *others = run("database", lambda: database(parse_location(cluster.url(name)), tmp_path, None))
    assert (first.level, first.said.startswith(f"PostgreSQL database {name} at ")) == ("ok", True)
    assert NO_FSYNC in {f"{finding.level} {finding.said}" for finding in others}
    (said,) = examined(cluster.url(name), tmp_path)
    assert said.endswith("is empty: pfed-server will make its tables")
    (tmp_path / ELSEWHERE_FILE).write_text("f" * 32)
    (said,) = examined(cluster.url(name), tmp_path)
    assert said.startswith("wrong ")
    assert "is empty, and the state directory belongs to federation ffffffffffff: give the database that" in said
    assert cluster.sql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name) == [(0,)]


def test_a_federation_that_is_sound_and_one_that_is_another(cluster: Any, name: str, tmp_path: Path) -> None:
    put(cluster.url(name), tmp_path / "state")
    (said,) = examined(cluster.url(name), tmp_path / "state")
    assert said.startswith("ok ")
    assert "can be read, schema " in said
    (tmp_path / "state" / ELSEWHERE_FILE).write_text("f" * 32)
    _, said = examined(cluster.url(name), tmp_path / "state")
    assert "and the state directory belongs to ffffffffffff: give the database that has it" in said
    (tmp_path / "other.toml").write_text(DEMO_PLAN.read_text().replace("seed = ", "seed = 7"))
    said = examined(cluster.url(name), tmp_path / "new", tmp_path / "other.toml")[-1]
    assert "is of a federation with the plan" in said
    assert said.endswith("give --plan that plan, or --database another one")


def test_a_newer_schema_and_a_role_that_may_not_write(cluster: Any, name: str, tmp_path: Path) -> None:
    put(cluster.url(name), tmp_path)
    cluster.sql("UPDATE alembic_version SET version_num = '99'", name)
    assert "has schema 99, this version knows 4 to" in examined(cluster.url(name), tmp_path)[0]
    cluster.sql("UPDATE alembic_version SET version_num = '6'; DELETE FROM meta", name)
    assert examined(cluster.url(name), tmp_path)[-1].endswith("has the tables and no federation: restore a copy")
    cluster.sql("REVOKE INSERT ON messages FROM pfed", name)
    (said,) = examined(cluster.url(name), tmp_path)
    assert said.startswith("wrong this role may not change what is in PostgreSQL database")


def test_somebody_elses_tables(cluster: Any, name: str, tmp_path: Path) -> None:
    cluster.sql("CREATE TABLE patients (name text)", name)
    (said,) = examined(cluster.url(name), tmp_path)
    assert said.startswith("wrong ")
    assert said.endswith("has 1 tables that are not of a pfed-server: give an empty one")


def test_a_database_that_is_not_there(cluster: Any, tmp_path: Path) -> None:
    (said,) = examined(cluster.url("nowhere"), tmp_path)
    assert said.startswith("wrong PostgreSQL database nowhere at ")
    assert said.endswith("and the role and its password in PGPASSFILE")
    assert "\n" not in said
