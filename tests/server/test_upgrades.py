"""A state of every schema that servers in the field may have is brought to the newest one, whole, or stays as it is."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from pfed_server import migrations
from pfed_server.database import DATABASE_FILE
from pfed_server.schema import Base
from pfed_server.sql_store import SqlStore
from pfed_server.store import Closing, LedgerRecord, Traffic
from pfedsecure.errors import StateError
from pfedsecure.plan import Plan

STATES = Path(__file__).parent / "states"
SCHEMAS = sorted(path.stem.removeprefix("schema-") for path in STATES.glob("schema-*.sql"))


def old_state(folder: Path, schema: str = migrations.BASELINE) -> Plan:
    """A state of an old schema in `folder`; its plan."""
    with closing(sqlite3.connect(folder / DATABASE_FILE)) as connection:
        connection.executescript((STATES / f"schema-{schema}.sql").read_text())
        return Plan.from_json(connection.execute("SELECT plan_json FROM meta").fetchone()[0])


def shape(database: Path) -> dict[str, object]:
    """Tables, columns, keys, indices and checks of a database, however their definitions are laid out."""
    with closing(sqlite3.connect(database)) as connection:
        tables = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
        return {
            name: (
                connection.execute(f"PRAGMA table_info({name})").fetchall(),
                sorted(row[2:] for row in connection.execute(f"PRAGMA foreign_key_list({name})")),
                sorted(row[1:] for row in connection.execute(f"PRAGMA index_list({name})")),
                sorted(re.sub(r"\s+", " ", check) for check in re.findall(r"CHECK \((.*)\)", sql)),
            )
            for name, sql in tables.items()
        }


def test_the_schemas_are_those_of_the_files_in_their_order() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())
    assert [script.revision for script in reversed(scripts)] == list(migrations.SCHEMAS)


def test_a_server_that_starts_again_does_not_wait_for_what_upgrades(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(old_state(tmp_path).to_json())
    program = """
import sys
from pathlib import Path
from pfed_server import app, coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.plan import Plan
SqlStore.open(Path(sys.argv[1]), Plan.from_json(Path(sys.argv[2]).read_text())).close()
print("alembic" in sys.modules)
"""
    command = [sys.executable, "-c", program, str(tmp_path), str(plan)]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    assert said == ["True", "False"], "the first start upgrades"


def test_there_is_a_state_of_every_schema_but_the_newest() -> None:
    assert {*SCHEMAS, migrations.newest()} == migrations.known()
    assert migrations.BASELINE in SCHEMAS


@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_old_state_goes_on_where_it_was(tmp_path: Path, schema: str) -> None:
    plan = old_state(tmp_path, schema)
    old = (tmp_path / DATABASE_FILE).read_bytes()
    with closing(SqlStore.open(tmp_path, plan)) as store:
        state = store.load()
        assert sorted(state.members) == ["anna", "bert", "cleo"]
        assert not state.members["cleo"].taking_part
        assert (state.last_round, state.rounds_completed) == (2, 1)
        assert state.open_round is not None
        assert {name: part.step for name, part in state.open_round.parts.items()} == {"anna": 1, "bert": 0}
        assert store.message(2, 1, "anna") == b"message of round 2"
        assert store.global_prompt(2) == b"global prompt"
        assert store.experts(["id-anna", "id-bert"]) == {"id-anna": b"expert of anna", "id-bert": b"expert of bert"}
        assert store.setups() == {1: b"setup"}
        assert store.advance_ledger("anna", b"h" * 32, b"") == LedgerRecord(1, b"h" * 32)
        assert store.history().rounds[0].traffic == Traffic(340, 20)
        store.close_round(2, 230.0, Closing(b"next"), {})
        assert store.load().rounds_completed == 2
    (copy,) = tmp_path.glob(f"{DATABASE_FILE}.*")
    assert copy.name == f"{DATABASE_FILE}.schema-{schema}"
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as connection, closing(sqlite3.connect(":memory:")) as other:
        other.deserialize(old)
        assert list(connection.iterdump()) == list(other.iterdump())


@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_upgraded_database_is_like_a_new_one(tmp_path: Path, schema: str) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    plan = old_state(tmp_path / "old", schema)
    for name in ("old", "new"):
        SqlStore.open(tmp_path / name, plan).close()
    assert shape(tmp_path / "old" / DATABASE_FILE) == shape(tmp_path / "new" / DATABASE_FILE)
    engine = create_engine(f"sqlite:///{tmp_path / 'old' / DATABASE_FILE}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_it_is_upgraded_once(tmp_path: Path) -> None:
    plan = old_state(tmp_path)
    SqlStore.open(tmp_path, plan).close()
    (copy,) = tmp_path.glob(f"{DATABASE_FILE}.*")
    copy.unlink()
    SqlStore.open(tmp_path, plan).close()
    assert not list(tmp_path.glob(f"{DATABASE_FILE}.*"))


def test_a_state_of_another_plan_stays_as_it_is(tmp_path: Path) -> None:
    plan = old_state(tmp_path)
    before = (tmp_path / DATABASE_FILE).read_bytes()
    with pytest.raises(StateError, match="belongs to a federation with another plan"):
        SqlStore.open(tmp_path, plan.model_copy(update={"seed": 2}))
    assert (tmp_path / DATABASE_FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [DATABASE_FILE, "lock"]


@pytest.mark.parametrize("version", [3, 99])
def test_a_schema_that_nobody_knows_is_refused(tmp_path: Path, version: int) -> None:
    plan = old_state(tmp_path)
    with closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE meta SET schema_version = ?", [version])
    before = (tmp_path / DATABASE_FILE).read_bytes()
    with pytest.raises(StateError, match=f"has schema {version}, this pfed-server knows 4 to {migrations.newest()};"):
        SqlStore.open(tmp_path, plan)
    assert (tmp_path / DATABASE_FILE).read_bytes() == before


def test_the_same_plan_in_fewer_words_is_the_same(tmp_path: Path) -> None:
    """A version that adds a setting with a default does not shut out the federations of the version before."""
    plan = old_state(tmp_path)
    fewer = json.loads(plan.to_json())
    del fewer["matching"]
    with closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE meta SET plan_json = ?", [json.dumps(fewer)])
    SqlStore.open(tmp_path, plan).close()
    with closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as connection:
        assert connection.execute("SELECT plan_json FROM meta").fetchone()[0] == plan.to_json()


def test_without_room_for_a_copy_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = old_state(tmp_path)
    (tmp_path / f"{DATABASE_FILE}.schema-4").mkdir()
    (tmp_path / f"{DATABASE_FILE}.schema-4" / "in the way").touch()
    before = (tmp_path / DATABASE_FILE).read_bytes()
    with pytest.raises(StateError, match="the database cannot be copied before its upgrade"):
        SqlStore.open(tmp_path, plan)
    assert (tmp_path / DATABASE_FILE).read_bytes() == before


KILLED_EVERYWHERE = """
import os, shutil, signal, sqlite3, sys
from contextlib import closing
from pathlib import Path
from sqlalchemy import Engine, event
from pfed_server import migrations
from pfed_server.sql_store import SqlStore
from pfedsecure.plan import Plan

source, plan = Path(sys.argv[1]), Plan.from_json(sys.argv[2])

def schema(database):
    with closing(sqlite3.connect(database)) as connection:
        tables = {name for name, in connection.execute("SELECT name FROM sqlite_master")}
        columns = {row[1] for row in connection.execute("PRAGMA table_info(meta)")}
        marks = connection.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else ()
        return next(iter(marks), (None,))[0], "schema_version" in columns

def run(number, moment):
    folder = source.parent / f"{moment}-{number}"
    shutil.copytree(source, folder)
    child = os.fork()
    if not child:
        seen = 0
        @event.listens_for(Engine, moment)
        def count(*_):
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
        SqlStore.open(folder, plan).close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = schema(folder / "federation.sqlite")
    assert found in ((None, True), (migrations.newest(), False)), found
    with closing(SqlStore.open(folder, plan)) as store:
        assert store.global_prompt(2) == b"global prompt"
    assert schema(folder / "federation.sqlite") == (migrations.newest(), False)
    return os.WIFSIGNALED(status), found[1]

for moment in ("before_cursor_execute", "commit"):
    number, olds, news = 0, 0, 0
    killed = True
    while killed:
        number += 1
        killed, old = run(number, moment)
        olds, news = olds + (killed and old), news + (killed and not old)
    print(moment, olds, news)
"""


@pytest.mark.slow
def test_killed_at_any_statement_it_has_the_old_schema_or_the_new(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    plan = old_state(source)
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(source), plan.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines()}
    assert counts["before_cursor_execute"][0] > 5  # inside the upgrade, not only before it
    assert counts["before_cursor_execute"][1] > 0
    assert counts["commit"][0] > 0
