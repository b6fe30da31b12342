"""PostgreSQL as the place of a federation: what is refused, what is kept secret, and connections that are lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health_pb2
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from pfed_server.app import serving
from pfed_server.cli import main
from pfed_server.coordinator import Coordinator
from pfed_server.database import DATABASE_FILE, ELSEWHERE_FILE
from pfed_server.postgres import parse_location
from pfed_server.shared_store import PostgresStore
from pfed_server.sql_store import SqlStore
from pfed_server.store import StateOvertaken
from pfedsecure.console import Address
from pfedsecure.errors import ServerUnreachable, StateError
from pfedsecure.plan import Plan
from pfedsecure.wire.status import raise_from
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
SECRET = "s3cret-pass%41"
CLEAR = """
class_names = ["a", "b"]
backbone.text_width = 64
mixture.gate_width = 64
protection = {aggregation = "plain", experts = "plain", matching = "plain"}
"""


def open_store(url: str, folder: Path, plan: Plan) -> PostgresStore:
    return PostgresStore.connect(parse_location(url), folder, plan)


def pfed_server(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    (folder / "clear.toml").write_text(CLEAR)
    monkeypatch.chdir(folder)
    return CliRunner().invoke(main, ["--insecure", "--plan", "clear.toml", "--state", "state", *options])


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://pfed:{SECRET}@db.example.org/pfed",
        f"postgresql://db.example.org/pfed?user=pfed&password={SECRET}",
        f"postgresql://db.example.org/pfed?sslkey=x&sslpassword={SECRET}",
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_repeated(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    result = pfed_server(tmp_path, monkeypatch, "--database", url)
    assert result.exit_code == 2
    assert "PGPASSFILE" in result.stderr
    assert "s3cret" not in result.output


@pytest.mark.parametrize(
    "url",
    [f"mysql://pfed:{SECRET}@host/pfed", f"host=db user=pfed password={SECRET}", f"postgresql://pfed:{SECRET}%zz@h/d"],
)
def test_what_is_no_url_is_refused_and_not_repeated(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    result = pfed_server(tmp_path, monkeypatch, "--database", url)
    assert result.exit_code == 2
    assert "such as postgresql://pfed@db.example.org/pfed" in result.stderr
    assert "s3cret" not in result.output


def test_without_the_driver_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "psycopg":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from pfed_server.cli import main
main(["--tls", "--database", "postgresql://pfed@db/pfed"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: --database takes psycopg: pip install 'pfedsecure[postgres]'"
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_is_away_is_one_line_and_worth_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://pfed@127.0.0.1:{unused_tcp_port}/pfed"
    result = pfed_server(tmp_path, monkeypatch, "--database", url)
    assert result.exit_code == ServerUnreachable.exit_code
    line = result.stderr.splitlines()[-1]
    assert line.startswith("pfed-server: error: PostgreSQL database pfed at 127.0.0.1 cannot be used (")
    assert "Connection refused" in line
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "state" / ELSEWHERE_FILE).exists()


@pytest.fixture
def guarded(cluster: Any) -> Iterator[str]:
    """A database over TCP whose role has the password SECRET; its URL."""
    name = cluster.database()
    cluster.sql(f"CREATE ROLE guarded LOGIN PASSWORD '{SECRET}'")
    cluster.sql(f"ALTER DATABASE {name} OWNER TO guarded")
    yield f"postgresql://guarded@127.0.0.1:{cluster.port}/{name}"
    cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")
    cluster.sql("DROP ROLE guarded")


@pytest.mark.parametrize("by", ["PGPASSWORD", "PGPASSFILE"])
def test_a_password_comes_from_the_environment_or_a_file_and_is_nowhere_else(
    by: str,
    guarded: str,
    make_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    for name in ("PGPASSWORD", "PGPASSFILE"):
        monkeypatch.delenv(name, raising=False)
    refused = pfed_server(tmp_path, monkeypatch, "--database", guarded)
    assert refused.exit_code == ServerUnreachable.exit_code
    assert "no password supplied" in refused.stderr
    file = tmp_path / "pgpass"

    def give(password: str) -> None:
        file.write_text(f"*:*:*:*:{password}\n")
        file.chmod(0o600)
        monkeypatch.setenv(by, str(file) if by == "PGPASSFILE" else password)

    give(f"{SECRET}-not")
    refused = pfed_server(tmp_path, monkeypatch, "--database", guarded)
    assert "password authentication failed" in refused.stderr
    give(SECRET)
    with closing(open_store(guarded, tmp_path / "state", make_plan())) as store:
        assert store.load().version == 1
        assert SECRET not in repr(parse_location(guarded)) + repr(store._engine.url) + repr(store._engine)
        with pytest.raises(OperationalError) as caught, store._transaction() as session:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    kept = b"".join(path.read_bytes() for path in (tmp_path / "state").iterdir() if path.is_file())
    assert SECRET not in refused.output + caplog.text + str(caught.value) + kept.decode()


async def test_a_way_that_others_can_take_over_is_warned_of(
    guarded: str,
    cluster: Any,
    members: Any,
    make_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Real TLS of PostgreSQL, with a certificate for localhost; another name for the same host is a remote one."""
    monkeypatch.setenv("PGPASSWORD", SECRET)
    remote = guarded.replace("127.0.0.1", "db.example.org") + "?hostaddr=127.0.0.1"
    open_store(remote, tmp_path / "one", make_plan()).close()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("NOT PROTECTED: whoever is between this server and its database at db.example.org can")
    assert "(sslmode=prefer); give sslmode=verify-full" in warning
    caplog.clear()
    open_store(guarded, tmp_path / "one", make_plan()).close()
    assert not caplog.records, "loopback needs no TLS"

    data = cluster.folder / "data"
    for name, secret in (("identity.crt", "server.crt"), ("identity.key", "server.key")):
        shutil.copy(members.server.folder / name, data / secret)
        os.chown(data / secret, data.stat().st_uid, data.stat().st_gid)
        (data / secret).chmod(0o600)
    cluster.sql("ALTER SYSTEM SET ssl = on")
    cluster.sql("SELECT pg_reload_conf()")
    time.sleep(0.3)
    authority = members.server.folder / "authority.crt"
    try:
        verified = guarded.replace("127.0.0.1", "localhost") + f"?sslmode=verify-full&sslrootcert={authority}"
        open_store(f"{verified}&hostaddr=127.0.0.1", tmp_path / "one", make_plan()).close()
        assert not caplog.records
        wrong = verified.replace("localhost", "db.example.org") + "&hostaddr=127.0.0.1"
        with pytest.raises(ServerUnreachable, match=r'does not match host name "db\.example\.org"'):
            open_store(wrong, tmp_path / "two", make_plan())
    finally:
        cluster.sql("ALTER SYSTEM SET ssl = off")
        cluster.sql("SELECT pg_reload_conf()")


def test_two_servers_that_make_a_federation_at_once_make_one(
    database_url: str, make_plan: MakePlan, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as threads, ExitStack() as stack:
        folders = [tmp_path / str(number) for number in range(4)]
        stores = list(threads.map(lambda folder: open_store(database_url, folder, make_plan()), folders))
        for store in stores:
            stack.enter_context(closing(store))
        assert len({store.load().federation_id for store in stores}) == 1


def test_a_state_directory_belongs_to_one_federation(
    database_url: str, cluster: Any, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan, folder = make_plan(), tmp_path / "state"
    open_store(database_url, folder, plan).close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StateError, match="its federation is in PostgreSQL; give --database, or another --state"):
        SqlStore.open(folder, plan)
    other = cluster.database()
    with pytest.raises(StateError, match="is empty, and the state directory belongs to federation"):
        open_store(cluster.url(other), folder, plan)
    assert cluster.sql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", other) == [(0,)]
    open_store(cluster.url(other), tmp_path / "other", plan).close()
    with pytest.raises(StateError, match=r"has federation .+, and the state directory belongs to"):
        open_store(cluster.url(other), folder, plan)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    open_store(database_url, folder, plan).close()
    SqlStore.open(tmp_path / "sqlite", plan).close()
    with pytest.raises(StateError, match="holds a federation in SQLite, which --database would leave behind"):
        open_store(database_url, tmp_path / "sqlite", plan)
    assert sorted(path.name for path in (tmp_path / "sqlite").iterdir()) == [DATABASE_FILE, "lock"]


def test_somebody_elses_database_is_refused_untouched(
    database_url: str, cluster: Any, make_plan: MakePlan, tmp_path: Path
) -> None:
    name = database_url.partition("@/")[2].partition("?")[0]
    cluster.sql("CREATE TABLE recipes (title text)", name)
    with pytest.raises(StateError, match="is not the database of a pfed-server, or the role may not use it"):
        open_store(database_url, tmp_path, make_plan())
    assert cluster.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", name) == [("recipes",)]


def test_a_role_that_may_not_make_tables_is_told_in_one_line(cluster: Any, make_plan: MakePlan, tmp_path: Path) -> None:
    name = cluster.database()
    cluster.sql("CREATE ROLE guest LOGIN")
    with pytest.raises(StateError, match=r"permission denied for schema public.+ make the role its owner") as caught:
        open_store(cluster.url(name, "guest"), tmp_path, make_plan())
    assert "\n" not in str(caught.value)
    cluster.sql("DROP ROLE guest")


def sessions(cluster: Any, url: str) -> str:
    """A condition for the sessions of servers at a database."""
    name = url.partition("@/")[2].partition("?")[0]
    return f"datname = '{name}' AND application_name = 'pfed-server'"


@contextmanager
def two(url: str, folder: Path, plan: Plan) -> Iterator[tuple[PostgresStore, PostgresStore]]:
    with closing(open_store(url, folder / "one", plan)) as one, closing(open_store(url, folder / "two", plan)) as other:
        yield one, other


def test_who_loses_the_session_loses_the_lock_and_writes_no_more(
    database_url: str, cluster: Any, make_plan: MakePlan, tmp_path: Path
) -> None:
    with two(database_url, tmp_path, make_plan()) as (one, other):
        one.acquire()
        before = one.touch()
        cluster.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {sessions(cluster, database_url)}")
        assert other.acquire() == before, "the lock is free"
        with pytest.raises(OperationalError):
            one.touch()
        with pytest.raises(StateOvertaken, match="was lost, and with it the lock"):
            one.touch()
        one.release()
        after = other.touch()
        other.release()
        assert one.acquire() == after
        one.release()


def test_who_waits_too_long_for_the_lock_is_told_to_try_again(
    database_url: str, make_plan: MakePlan, tmp_path: Path
) -> None:
    patient = f"{database_url}&options=-c%20lock_timeout%3D200"
    with two(patient, tmp_path, make_plan()) as (one, other):
        one.acquire()
        with pytest.raises(OperationalError, match="lock timeout"):
            other.acquire()
        one.release()
        other.acquire()
        other.release()


def test_who_holds_the_lock_and_says_nothing_loses_it(database_url: str, make_plan: MakePlan, tmp_path: Path) -> None:
    """A server that hangs: here for 0.2 seconds, in earnest for five minutes."""
    with two(f"{database_url}&options=-c%20idle_session_timeout%3D200", tmp_path, make_plan()) as (one, other):
        one.acquire()
        began = time.monotonic()
        other.acquire()
        assert time.monotonic() - began < 10
        other.touch()
        other.release()
        with pytest.raises((OperationalError, StateOvertaken)):
            one.touch()
        one.release()


HOLDING = """
import sys, time
from pathlib import Path
from pfed_server.postgres import parse_location
from pfed_server.shared_store import PostgresStore
from pfedsecure.plan import Plan
store = PostgresStore.connect(parse_location(sys.argv[1]), Path(sys.argv[2]), Plan.from_json(sys.argv[3]))
store.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_who_is_killed_with_the_lock_holds_nobody_up(database_url: str, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    command = [sys.executable, "-c", HOLDING, database_url, str(tmp_path / "killed"), plan.to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        killer = threading.Timer(0.3, process.send_signal, [signal.SIGKILL])
        killer.start()
        began = time.monotonic()
        with closing(open_store(database_url, tmp_path / "other", plan)) as other:  # waits for the lock, too
            other.acquire()
            other.touch()
            other.release()
        assert 0.2 < time.monotonic() - began < 10


def test_a_change_counts_when_its_answer_was_lost(
    database_url: str, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed counts, also when the server did not get to know: it reads it before it goes on."""
    with two(database_url, tmp_path, make_plan()) as (one, other):
        known = one.acquire()
        other.refresh()
        monkeypatch.setattr(one, "_is_now", Mock(side_effect=OSError("lost")))
        with pytest.raises(OSError, match="lost"):
            one.touch()
        monkeypatch.undo()
        one.release()
        assert not one.is_current(known)
        assert one.acquire().version == known.version + 1
        one.touch()
        one.release()
        assert other.refresh().version == known.version + 2


def test_a_server_of_an_older_schema_does_not_go_on_beside_a_newer_one(
    database_url: str, make_plan: MakePlan, tmp_path: Path
) -> None:
    with two(database_url, tmp_path, make_plan()) as (one, other):
        state = one.load()
        assert one.is_current(state)
        with other._transaction() as session:
            session.execute(text("UPDATE alembic_version SET version_num = '99'"))
        for use in (lambda: one.is_current(state), one.acquire):
            with pytest.raises(StateOvertaken, match="another federation or schema since; start this server again"):
                use()


async def test_a_database_that_is_restarted_under_a_server_is_waited_for(
    database_url: str, cluster: Any, members: Any, connect: Any, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(start_clients=2)
    with closing(open_store(database_url, tmp_path, plan)) as store:
        coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=members.server.authority)
        async with (
            serving(coordinator, Address("127.0.0.1", 0), members.server) as address,
            connect(address, members.identity("anna")) as anna,
            connect(address, members.identity("bert")) as bert,
        ):
            await anna.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1"))
            version = (await anna.federation.Await(fed.AwaitRequest(instance_id="1"))).version
            cluster.stop()
            try:
                for call in (
                    bert.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")),
                    anna.federation.Await(fed.AwaitRequest(instance_id="1")),
                    anna.health.Check(health_pb2.HealthCheckRequest()),  # whoever balances calls takes note
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    with pytest.raises(ServerUnreachable, match="cannot use its storage at the moment"):
                        raise_from(caught.value)
            finally:
                cluster.start()
            await bert.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1"))
            view = await anna.federation.Await(fed.AwaitRequest(instance_id="1", seen_version=version, wait_seconds=10))
            assert view.version > version
            assert (await anna.health.Check(health_pb2.HealthCheckRequest())).status == 1
            while not view.selected:
                request = fed.AwaitRequest(instance_id="1", seen_version=view.version, wait_seconds=10)
                view = await anna.federation.Await(request)
            assert view.round == 1
