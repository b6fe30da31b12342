"""What is special about a state in SQLite: its files, and which of them are refused and left untouched.

`test_store_contract` has what holds for every database.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from pfed_server.database import DATABASE_FILE
from pfed_server.history_reader import HistoryReader
from pfed_server.migrations import newest
from pfed_server.sql_store import SqlStore
from pfed_server.store import Closing, Member, Traffic
from pfedsecure.errors import StateError, StateLocked
from pfedsecure.plan import Plan

MakePlan = Callable[..., Plan]


def member(name: str) -> Member:
    return Member(name, "f" * 64, "1", f"id-{name}", taking_part=True)


def filled(folder: Path, plan: Plan) -> Path:
    """A state with a round under way; its database."""
    with closing(SqlStore.open(folder, plan)) as store:
        for name in ("anna", "bert"):
            store.save_member(member(name))
        store.open_round(1, 100.0, 160.0, ["anna", "bert"])
        store.record_messages(1, 1, {"anna": b"contribution" * 1000}, {"anna": Traffic(12_000, 5)}, counts=True)
    return folder / DATABASE_FILE


def refused(folder: Path, plan: Plan) -> str:
    """The message with which a state is refused; the database and its folder are untouched by that."""
    database = folder / DATABASE_FILE
    before = database.read_bytes()
    with pytest.raises(StateError) as caught:
        SqlStore.open(folder, plan)
    assert database.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [DATABASE_FILE, "lock"]
    assert str(database) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_state_is_for_nobody_elses_eyes(make_plan: MakePlan, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    with closing(SqlStore.open(folder, make_plan())) as store:
        state = store.load()
    assert (state.last_round, state.rounds_completed, dict(state.members), state.open_round) == (0, 0, {}, None)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600, 0o600]


def test_contributions_are_wiped_from_the_file_when_their_round_closes(make_plan: MakePlan, tmp_path: Path) -> None:
    database = filled(tmp_path, make_plan())
    assert b"contribution" * 10 in database.read_bytes()
    with closing(SqlStore.open(tmp_path, make_plan())) as store:
        store.close_round(1, 130.0, Closing(b"prompt"), {})
    assert b"contribution" * 10 not in database.read_bytes()


def test_threads_take_turns_at_a_state_in_memory(make_plan: MakePlan) -> None:
    with closing(SqlStore.in_memory(make_plan())) as store, ThreadPoolExecutor(4) as threads:
        before = store.load().version
        looking = [threads.submit(lambda: (store.history(), store.pool(), store.setups())) for _ in range(40)]
        for _ in range(40):
            store.touch()
        assert [look.result()[1:] for look in looking] == [([], {})] * 40
        assert store.load().version == before + 40


@pytest.mark.parametrize("where", ["header", "middle", "cut"])
def test_a_damaged_database_is_refused(make_plan: MakePlan, tmp_path: Path, where: str) -> None:
    database = filled(tmp_path, make_plan())
    data, noise = bytearray(database.read_bytes()), random.Random(0)
    if where == "header":
        data[:100] = noise.randbytes(100)
    elif where == "middle":
        data[4096:] = noise.randbytes(len(data) - 4096)
    else:
        del data[len(data) // 2 :]
    database.write_bytes(data)
    message = refused(tmp_path, make_plan())
    assert "the saved state is corrupted" in message
    assert message.endswith("restore a copy, or give another --state to start a new federation")


def test_a_newer_schema_is_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    with closing(sqlite3.connect(filled(tmp_path, make_plan()))) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '99'")
    message = refused(tmp_path, make_plan())
    assert f"has schema 99, this pfed-server knows 4 to {newest()}; start the version of pfedsecure that" in message


def test_somebody_elses_database_is_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as connection, connection:
        connection.execute("CREATE TABLE recipes (title TEXT)")
    assert "is not the state of a pfed-server (no such table: meta)" in refused(tmp_path, make_plan())


def test_a_crash_before_anything_was_written_is_a_new_beginning(make_plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / DATABASE_FILE).touch()
    with closing(SqlStore.open(tmp_path, make_plan())) as store:
        assert store.load().version == 1


def test_a_file_cannot_be_a_state_directory(make_plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StateError, match=r"cannot be used as state directory \(.+\); give another --state"):
        SqlStore.open(file, make_plan())


def test_one_process_at_a_time(make_plan: MakePlan, tmp_path: Path) -> None:
    with closing(SqlStore.open(tmp_path, make_plan())):  # noqa: SIM117
        with pytest.raises(StateLocked, match="another pfed-server uses this state; stop it, or give another --state"):
            SqlStore.open(tmp_path, make_plan())
    SqlStore.open(tmp_path, make_plan()).close()


def test_a_refused_state_is_not_left_locked(make_plan: MakePlan, tmp_path: Path) -> None:
    filled(tmp_path, make_plan())
    with pytest.raises(StateError):
        SqlStore.open(tmp_path, make_plan(seed=2))
    SqlStore.open(tmp_path, make_plan()).close()


def with_rounds(folder: Path, plan: Plan, rounds: int, members: int) -> None:
    """A state with so many rounds that ended, one of ten of them abandoned, and one more under way."""
    with closing(SqlStore.open(folder, plan)) as store:
        store.save_member(member("m0"))
        store.open_round(1, 100.0, 160.0, ["m0"])
        store.close_round(1, 130.0, Closing(b"prompt"), {})
    with closing(sqlite3.connect(folder / DATABASE_FILE)) as connection, connection:
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO members (name, fingerprint, instance_id, expert_id, taking_part) "
            "SELECT 'm' || i, 'f', '1', 'id' || i, 1 FROM n",
            [members - 1],
        )
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO rounds (number, opened_at, step, deadline, outcome, closed_at, global_prompt, metrics) "
            "SELECT i, 100.0 * i, 1, 100.0 * i + 60, iif(i % 10, 'closed', 'abandoned'), 100.0 * i + 50, "
            "iif(i % 10, x'00', NULL), '{}' FROM n",
            [rounds],
        )
        connection.execute(
            "INSERT INTO parts (round, member, step, counted, epoch, bytes_received, bytes_sent) "
            "SELECT rounds.number, members.name, 1, rounds.outcome = 'closed' AND members.rowid % 3 > 0, 0, 7, 9 "
            "FROM rounds CROSS JOIN members WHERE rounds.number > 1"
        )
    with closing(SqlStore.open(folder, plan)) as store:
        names = [f"m{number}" for number in range(members)]
        store.open_round(rounds + 1, 1e6, 1e6 + 60, sorted(names))


def test_of_the_history_only_what_can_change_is_read_again(make_plan: MakePlan, tmp_path: Path) -> None:
    """Otherwise each refresh of the dashboard costs everybody's calls the time of the whole history."""
    plan = make_plan()
    with_rounds(tmp_path, plan, rounds=20, members=5)
    with closing(SqlStore.open(tmp_path, plan)) as store:
        before = store.history()
        with closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as connection, connection:
            connection.execute("DELETE FROM parts WHERE round <= 20")
        assert store.history() == before
        assert [record.number for record in before.rounds] == list(range(1, 22))
        assert [record.outcome for record in before.rounds[-2:]] == ["abandoned", "open"]


def test_a_history_read_as_it_happens_is_the_one_that_is_read_at_once(make_plan: MakePlan, tmp_path: Path) -> None:
    plan, names = make_plan(), ["anna", "bert", "cleo"]
    with closing(SqlStore.open(tmp_path, plan)) as store:
        for name in names:
            store.save_member(member(name))
        for number, (senders, prompt) in enumerate(((3, b"p"), (2, b"q"), (1, None), (2, b"r"), (0, None)), start=1):
            store.open_round(number, 100.0 * number, 160.0, names)
            store.history()
            for name in names[:senders]:
                store.record_messages(number, 1, {name: b"x"}, {name: Traffic(number, 5)}, counts=True)
                assert store.history().rounds[-1].traffic.received == number * (names.index(name) + 1)
            store.close_round(number, 100.0 * number + 7, Closing(prompt, {"loss": number / 8}), {"cleo": Traffic(1)})
        store.record_report("anna", "id-bert")
        as_it_happened = store.history()
    with closing(SqlStore.open(tmp_path, plan)) as store:
        assert store.history() == as_it_happened
    assert as_it_happened.last_rounds == {"anna": 4, "bert": 4, "cleo": 1}
    assert as_it_happened.reports == {"bert": 1}


@pytest.mark.slow
def test_a_refresh_of_a_long_history_takes_a_fraction_of_reading_it(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    with_rounds(tmp_path, plan, rounds=200, members=1000)
    with closing(SqlStore.open(tmp_path, plan)) as store:

        def seconds() -> float:
            began = time.perf_counter()
            assert len(store.history().rounds) == 201
            return time.perf_counter() - began

        store._history = HistoryReader()
        whole = seconds()
        again = min(seconds() for _ in range(5))
    print(f"the whole history {1000 * whole:.1f} ms, a refresh {1000 * again:.1f} ms")
    assert again < whole / 10
