"""Moving a federation from its file into PostgreSQL: all of it or nothing, whatever breaks off in between."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import select, text

from pfed_cli.main import main
from pfed_server import moving
from pfed_server.database import DATABASE_FILE, ELSEWHERE_FILE, MOVED_FILE, StateFolder
from pfed_server.moving import move
from pfed_server.postgres import parse_location
from pfed_server.schema import Base
from pfed_server.shared_store import PostgresStore
from pfed_server.sql_store import SqlStore
from pfed_server.store import Closing, LedgerRecord, Member, State, StoredPublication, Traffic
from pfedsecure.errors import StateError, StateLocked
from pfedsecure.plan import Plan

MakePlan = Callable[..., Plan]
NAMES = ("anna", "bert", "Zoe")


@pytest.fixture
def url(cluster: Any) -> Iterator[str]:
    """Of an empty database."""
    name = cluster.database()
    yield cluster.url(name)
    cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")


def publication(name: str) -> StoredPublication:
    return StoredPublication(f"expert of {name}".encode(), b"sketch", 1, name.encode().ljust(32))


def filled(folder: Path, plan: Plan) -> State:
    """A federation with something in every table that one server on a file writes; its second round is open."""
    with closing(SqlStore.open(folder, plan)) as store:
        for name in NAMES:
            store.save_member(Member(name, "f" * 64, "1", f"id-{name}", taking_part=True, serial="ab", not_after=1e9))
        store.open_round(1, 100.125, 160.0, NAMES)
        store.record_publications(1, {name: publication(name) for name in NAMES}, {})
        store.record_messages(1, 1, dict.fromkeys(NAMES, b"x"), {"anna": Traffic(3, 4_000_000_000)}, counts=True)
        store.close_round(1, 130.5, Closing(b"prompt", {"test_accuracy": 0.1}), {})
        store.save_setup(1, "bert", b"keys", None)
        store.advance_ledger("anna", b"", b"1" * 32)
        store.record_report("anna", "id-bert")
        store.open_round(2, 200.0, 260.0, NAMES)
        store.record_query(2, "anna", b"2" * 32)
        return store.record_messages(2, 1, {"Zoe": b"\0message\xff" * 100}, {"Zoe": Traffic(900)}, counts=True)


def test_it_goes_on_where_it_was(make_plan: MakePlan, url: str, tmp_path: Path) -> None:
    plan = make_plan()
    before = filled(tmp_path, plan)
    with closing(SqlStore.open(tmp_path, plan)) as store:
        history = store.history()
        unused = [table.name for table in Base.metadata.sorted_tables if not _rows(store, table)]
        assert unused == ["presence"]
    moved = move(tmp_path, parse_location(url))
    assert moved.federation_id == before.federation_id
    assert sorted(path.name for path in tmp_path.iterdir()) == [MOVED_FILE, "lock", ELSEWHERE_FILE]
    with closing(PostgresStore.connect(parse_location(url), tmp_path, plan)) as store:
        assert store.load() == before
        assert store.history() == history
        assert store.message(2, 1, "Zoe") == b"\0message\xff" * 100
        assert store.experts(["id-bert"]) == {"id-bert": b"expert of bert"}
        assert (store.global_prompt(2), store.setups()) == (b"prompt", {1: b"keys"})
        assert store.advance_ledger("anna", b"", b"") == LedgerRecord(1, b"1" * 32)
        store.record_messages(2, 1, {"anna": b"more"}, {}, counts=True)
        store.close_round(2, 230.0, Closing(b"next"), {})
    with pytest.raises(StateError, match="its federation is in PostgreSQL"):
        SqlStore.open(tmp_path, plan)


def _rows(store: SqlStore, table: Any) -> list[Any]:
    with store._transaction() as session:
        return list(session.execute(select(table)))


def test_what_cannot_be_moved_stays_as_it_is(make_plan: MakePlan, url: str, tmp_path: Path) -> None:
    plan, location = make_plan(), parse_location(url)
    with pytest.raises(StateError, match=r"there is no federation\.sqlite; give the --state that the server has"):
        move(tmp_path / "new", location)
    before = filled(tmp_path / "one", plan)
    with closing(SqlStore.open(tmp_path / "one", plan)), pytest.raises(StateLocked):
        move(tmp_path / "one", location)
    filled(tmp_path / "other", plan)
    move(tmp_path / "other", location)
    with pytest.raises(StateError, match=r"has something else in table .* give an empty database"):
        move(tmp_path / "one", location)
    with closing(sqlite3.connect(tmp_path / "one" / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '5'")
    with pytest.raises(StateError, match="has schema 5; start the pfed-server of this version on it once"):
        move(tmp_path / "one", location)
    with closing(sqlite3.connect(tmp_path / "one" / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '6'")
    with closing(SqlStore.open(tmp_path / "one", plan)) as store:
        assert store.load() == before


@pytest.mark.parametrize("moment", ["before all is compared", "before the commit", "after the commit"])
def test_broken_off_it_can_be_run_again(
    make_plan: MakePlan, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    plan, location = make_plan(), parse_location(url)
    before = filled(tmp_path, plan)

    def die(*_: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before all is compared":
            patch.setattr(moving, "_digest", die)
        elif moment == "before the commit":
            noted = StateFolder.is_elsewhere
            patch.setattr(StateFolder, "is_elsewhere", lambda self, of: (noted(self, of), die()))
        else:
            patch.setattr(StateFolder, "has_moved", die)
        with pytest.raises(KeyboardInterrupt):
            move(tmp_path, location)
    if moment == "before all is compared":
        with closing(SqlStore.open(tmp_path, plan)) as store:
            assert store.load() == before
    else:  # it may be there, and must not go on here as well
        for start in (SqlStore.open, partial(PostgresStore.connect, location)):
            with pytest.raises(StateError, match="its move to PostgreSQL was broken off; run `pfed move` again"):
                start(tmp_path, plan)
    move(tmp_path, location)
    with closing(PostgresStore.connect(location, tmp_path, plan)) as store:
        assert store.load() == before


def test_what_has_gone_on_elsewhere_is_not_copied_once_more(
    make_plan: MakePlan, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, location = make_plan(), parse_location(url)
    filled(tmp_path / "one", plan)
    with monkeypatch.context() as patch:
        patch.setattr(StateFolder, "has_moved", lambda self: tmp_path)
        move(tmp_path / "one", location)
    with closing(PostgresStore.connect(location, tmp_path / "two", plan)) as store:
        store.touch()
    with pytest.raises(StateError, match="has this federation already, and one of the two has gone on since"):
        move(tmp_path / "one", location)


@pytest.mark.slow
def test_what_somebody_reads_is_not_put_aside_without_its_newest_rows(
    make_plan: MakePlan, url: str, tmp_path: Path
) -> None:
    plan = make_plan()
    filled(tmp_path, plan)
    with closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM members").fetchone()
        with closing(SqlStore.open(tmp_path, plan)) as store:
            before = store.save_member(Member("dora", "d" * 64, "1", "id-dora", taking_part=True))
        with pytest.raises(StateError, match="another program reads it now; stop that one, then try again"):
            move(tmp_path, parse_location(url))
    moved = move(tmp_path, parse_location(url))
    with closing(sqlite3.connect(moved.aside)) as aside:
        assert aside.execute("SELECT count(*) FROM members").fetchone() == (4,)
    with closing(PostgresStore.connect(parse_location(url), tmp_path, plan)) as store:
        assert store.load() == before


def test_a_row_that_does_not_arrive_as_it_was_is_found(
    make_plan: MakePlan, url: str, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = filled(tmp_path, make_plan())
    inner = moving.migrations.mark_newest

    def spoil(target: Any) -> None:
        inner(target)
        target.execute(text("CREATE FUNCTION less() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"))
        target.execute(text("CREATE TRIGGER less BEFORE INSERT ON pool FOR EACH ROW EXECUTE FUNCTION less()"))

    monkeypatch.setattr(moving.migrations, "mark_newest", spoil)
    with pytest.raises(StateError, match="has something else in table pool"):
        move(tmp_path, parse_location(url))
    with closing(SqlStore.open(tmp_path, make_plan())) as store:
        assert store.load() == before


def test_the_command_says_how_to_go_on(make_plan: MakePlan, url: str, tmp_path: Path) -> None:
    federation_id = filled(tmp_path, make_plan()).federation_id
    result = CliRunner().invoke(main, ["move", "--state", str(tmp_path), "--database", url])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"federation {federation_id[:12]} is in PostgreSQL database federation")
    assert f"{tmp_path / MOVED_FILE} is what it was before" in result.output
    again = CliRunner().invoke(main, ["move", "--state", str(tmp_path), "--database", url])
    assert again.exit_code == 60
