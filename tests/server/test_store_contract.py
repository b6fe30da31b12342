"""What `Store` promises, of both databases: the same tests, on a file of SQLite and on a database of PostgreSQL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text, update
from sqlalchemy.exc import IntegrityError, NoResultFound

from pfed_server.postgres import parse_location
from pfed_server.schema import Base, MetaRow
from pfed_server.shared_store import PostgresStore
from pfed_server.sql_store import SqlStore
from pfed_server.store import (
    Closing,
    LedgerRecord,
    Member,
    Part,
    QueryRecord,
    State,
    StateOvertaken,
    StoredPublication,
    Traffic,
)
from pfedsecure.errors import StateError
from pfedsecure.plan import Plan

MakePlan = Callable[..., Plan]
Opened = Callable[..., AbstractContextManager[SqlStore]]


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """`with opened(plan) as store`: the same federation each time."""
    url = request.getfixturevalue("database_url") if request.param == "postgresql" else None

    @contextmanager
    def opened(plan: Plan) -> Iterator[SqlStore]:
        folder = tmp_path / "state"
        store = SqlStore.open(folder, plan) if url is None else PostgresStore.connect(parse_location(url), folder, plan)
        with closing(store):
            yield store

    return opened


def member(name: str, *, instance_id: str = "1", expert_id: str = "") -> Member:
    return Member(name, "f" * 64, instance_id, expert_id or f"id-{name}", taking_part=True)


def publication(name: str, epoch: int = 1) -> StoredPublication:
    content = f"expert of {name}, epoch {epoch}".encode()
    return StoredPublication(content, b"sketch of " + name.encode(), epoch, hashlib.sha256(content).digest())


def begun(store: SqlStore, *names: str) -> None:
    for name in names:
        store.save_member(member(name))
    store.open_round(1, 100.0, 160.0, names)


def test_a_new_state_is_empty(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store:
        state = store.load()
    assert (state.version, state.last_round, state.rounds_completed) == (1, 0, 0)
    assert (dict(state.members), dict(state.pooled), state.open_round) == ({}, {}, None)


def test_a_state_reads_back_as_it_was_written(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store:
        first = store.load().federation_id
        begun(store, "bert", "anna")
        store.record_messages(1, 1, {"anna": b"contribution" * 1000}, {"anna": Traffic(12_000, 5)}, counts=True)
    with opened(make_plan()) as store:
        state = store.load()
        assert state.federation_id == first
        assert state.members == {"anna": member("anna"), "bert": member("bert")}
        assert state.open_round is not None
        assert (state.open_round.number, state.open_round.opened_at, state.open_round.deadline) == (1, 100.0, 160.0)
        assert state.open_round.step == 1
        digest = hashlib.sha256(b"contribution" * 1000).digest()
        assert list(state.open_round.parts.items()) == [("anna", Part(1, digest)), ("bert", Part())]
        assert store.message(1, 1, "anna") == b"contribution" * 1000
        end = Closing(b"prompt", {"test_accuracy": 0.5})
        closed = store.close_round(1, 130.5, end, {"bert": Traffic(1, 2)})
        assert (closed.open_round, closed.rounds_completed, closed.version) == (None, 1, state.version + 1)
        with pytest.raises(NoResultFound):
            store.message(1, 1, "anna")
        (record,) = store.history().rounds
        assert (record.outcome, record.cohort, record.updates, record.seconds) == ("closed", 2, 1, 30.5)
        assert record.traffic == Traffic(12_001, 7)
        assert record.metrics == {"test_accuracy": 0.5}
        assert store.history().last_rounds == {"anna": 1}
        assert [store.global_prompt(number) for number in (1, 2, 9)] == [b"", b"prompt", b"prompt"]


def test_every_change_says_what_the_state_is_after_it(make_plan: MakePlan, opened: Opened) -> None:
    """Of what is not read again, too; and versions grow with what clients can see of it, changes with all of it."""
    seen: list[State] = []

    def after(state: State, *, visible: bool = True) -> None:
        assert state == store.load()
        if seen:
            assert state.version == seen[-1].version + visible
            assert state.changes == seen[-1].changes + 1
        seen.append(state)

    with opened(make_plan()) as store:
        after(store.save_member(member("anna")))
        after(store.save_member(member("bert")))
        after(store.save_member(member("anna", instance_id="2")))
        after(store.touch())
        after(store.open_round(1, 100.0, 160.0, ["anna", "bert"]))
        for name in ("anna", "bert"):
            after(store.record_publications(1, {name: publication(name)}, {name: Traffic(3, 0)}), visible=False)
            after(store.record_messages(1, 1, {name: b"keys"}, {name: Traffic(4, 0)}, counts=False), visible=False)
        after(store.open_step(1, 2, 170.0))
        after(store.record_messages(1, 2, {"bert": b"input"}, {"bert": Traffic(5, 0)}, counts=True), visible=False)
        after(store.close_round(1, 130.0, Closing(b"prompt"), {"anna": Traffic(0, 9)}))
        after(store.replace_expert(1, "anna", publication("anna", epoch=2)))
        after(store.save_setup(1, "bert", b"keys of 1", None))
        after(store.distrust_setup(1))
        after(store.save_setup(2, "anna", b"keys of 2", None))
        after(store.open_round(2, 200.0, 260.0, ["anna", "bert"]))
        after(store.record_publications(2, {"anna": publication("anna", epoch=3)}, {"anna": Traffic()}), visible=False)
        after(store.save_member(member("anna", expert_id="another")))
        after(store.expel(["bert"]))
        after(store.close_round(2, 230.0, Closing(), {}))
        assert not seen[-1].members["bert"].taking_part
        assert seen[-1].distrusted_setups == {(1, "bert")}
        assert store.setups() == {2: b"keys of 2"}
        assert [(record.outcome, record.updates) for record in store.history().rounds] == [
            ("closed", 1),
            ("abandoned", 0),
        ]


def test_experts_are_seen_when_their_round_is_closed(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store:
        begun(store, "bert", "anna", "Zoe")
        for name in ("bert", "Zoe"):
            store.record_publications(1, {name: publication(name)}, {name: Traffic()})
        assert (store.pool(), store.experts(["id-bert"]), store.load().pooled) == ([], {}, {})
        store.close_round(1, 130.0, Closing(b"prompt"), {})
        assert [entry.owner for entry in store.pool()] == ["Zoe", "bert"]  # on every database as Python sorts
        assert store.experts(["id-bert", "id-anna"]) == {"id-bert": b"expert of bert, epoch 1"}
        store.open_round(2, 200.0, 260.0, ["anna", "bert"])
        store.record_publications(2, {"anna": publication("anna")}, {"anna": Traffic()})
        store.close_round(2, 230.0, Closing(), {})
        assert "anna" not in store.load().pooled, "the round was abandoned"
        store.expel(["bert"])
        assert [entry.owner for entry in store.pool()] == ["Zoe"]


def test_a_failed_transaction_leaves_nothing(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store:
        before = store.save_member(member("anna"))
        with pytest.raises(IntegrityError):
            store.open_round(1, 0.0, 1.0, ["anna", "nobody"])
        assert store.load() == before
        store.open_round(1, 0.0, 1.0, ["anna"])
        with pytest.raises(IntegrityError):
            store.open_round(2, 0.0, 1.0, ["anna"])
        assert store.load().last_round == 1


def test_what_was_decided_on_an_older_state_is_refused(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store:
        begun(store, "anna", "bert")
        with store._transaction() as session:  # as another process would
            session.execute(update(MetaRow).values(changes=MetaRow.changes + 1))
        with pytest.raises(StateOvertaken, match="another server has changed the federation meanwhile"):
            store.record_messages(1, 1, {"anna": b"late"}, {"anna": Traffic()}, counts=True)
        with pytest.raises(StateOvertaken):
            store.close_round(1, 130.0, Closing(b"prompt"), {})
        state = store.load()
        assert state.open_round is not None
        assert state.open_round.parts["anna"] == Part()
        store.record_messages(1, 1, {"anna": b"in time"}, {"anna": Traffic()}, counts=True)
        assert store.message(1, 1, "anna") == b"in time"


def test_a_ledger_goes_on_from_its_newest_head_only(make_plan: MakePlan, opened: Opened) -> None:
    one, two = b"1" * 32, b"2" * 32
    with opened(make_plan()) as store:
        store.save_member(member("anna"))
        assert store.advance_ledger("anna", b"", b"") == LedgerRecord()
        assert store.advance_ledger("anna", b"", one) == LedgerRecord(1, one)
        assert store.advance_ledger("anna", b"", two) == LedgerRecord(1, one)
        assert store.advance_ledger("anna", one, two) == LedgerRecord(2, two)
    with opened(make_plan()) as store:
        assert store.advance_ledger("anna", one, b"3" * 32) == LedgerRecord(2, two)


def test_the_first_query_of_a_round_counts(make_plan: MakePlan, opened: Opened) -> None:
    one, two = b"1" * 32, b"2" * 32
    with opened(make_plan()) as store:
        begun(store, "anna", "bert")
        assert store.record_query(1, "anna", one) == QueryRecord(one, 1)
    with opened(make_plan()) as store:  # started again it remembers
        assert store.record_query(1, "anna", two) == QueryRecord(one, 1)
        assert store.record_query(1, "anna", one) == QueryRecord(one, 2)
        assert store.record_query(1, "bert", two) == QueryRecord(two, 1)
        store.close_round(1, 130.0, Closing(b"prompt"), {})
        store.open_round(2, 200.0, 260.0, ["anna", "bert"])
        assert store.record_query(2, "anna", two) == QueryRecord(two, 1)


def test_a_report_counts_once(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store:
        begun(store, "anna", "bert")
        assert [store.record_report("anna", "id-bert") for _ in range(2)] == [True, False]
        assert store.history().reports == {"bert": 1}


def test_another_plan_is_refused_with_both_digests(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store:
        before = store.load()
    with (
        pytest.raises(StateError, match="belongs to a federation with another plan") as caught,
        opened(make_plan(seed=2)),
    ):
        pass
    assert make_plan().digest()[:12] in str(caught.value)
    assert make_plan(seed=2).digest()[:12] in str(caught.value)
    with opened(make_plan()) as store:
        assert store.load() == before


def test_a_newer_schema_is_refused(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store, store._transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '99'"))
    with pytest.raises(StateError, match=r"has schema 99, this pfed-server knows 4 to \d+;"), opened(make_plan()):
        pass


def test_the_tables_are_those_that_the_program_works_with(make_plan: MakePlan, opened: Opened) -> None:
    with opened(make_plan()) as store, store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_change_before_the_newest_applies_to_a_database_in_use(make_plan: MakePlan, opened: Opened) -> None:
    """`test_upgrades` does it to states from the field, which are all SQLite's: on PostgreSQL there were none yet."""
    undone = (
        "DROP TABLE queries",
        "DROP TABLE presence",
        "ALTER TABLE meta DROP COLUMN changes",
        "ALTER TABLE parts DROP COLUMN changed",
        "UPDATE alembic_version SET version_num = '5'",
    )
    with opened(make_plan()) as store:
        begun(store, "anna", "bert")
        store.record_messages(1, 1, {"anna": b"message"}, {"anna": Traffic()}, counts=True)
        with store._transaction() as session:
            for statement in undone:
                session.execute(text(statement))
    with opened(make_plan()) as store:
        state = store.load()
        assert (state.changes, state.open_round is not None) == (0, True)
        assert store.message(1, 1, "anna") == b"message"
        store.record_messages(1, 1, {"bert": b"message"}, {"bert": Traffic()}, counts=True)
        with store._engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
