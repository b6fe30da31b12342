"""Loaded before every test module: some of them import gRPC, which must find its settings. And a private PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hypothesis
import pytest

import pfedsecure.wire.grpc_settings  # noqa: F401

PROGRAMS = ("initdb", "pg_ctl", "postgres")
SETTINGS = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
unix_socket_permissions = 0777
max_connections = 60
shared_buffers = 16MB
fsync = off
full_page_writes = off
autovacuum = off
"""
WHO_MAY = """
local all all trust
host all all 127.0.0.1/32 scram-sha-256
"""
OWNER = "pfed"
"""A role without any privilege but its databases."""
MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 4 * 2**30


def pytest_configure() -> None:
    """Folders of tests lie in memory where there is room: what they wait for most is their files being on a disk."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ENOUGH_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    hypothesis.settings.register_profile("pfedsecure", deadline=None)  # a slow machine is nothing that a test is about
    hypothesis.settings.load_profile("pfedsecure")


@pytest.fixture(scope="session", autouse=True)
def no_ledger_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Private clients write down what they release outside of their state: not where the user has his own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PFED_LEDGER", str(tmp_path_factory.mktemp("ledgers")))
        yield


class Cluster:
    """A PostgreSQL of this machine's programs in a folder of its own, reached through a socket there.

    Over TCP, on loopback, it asks for a password.
    """

    def __init__(self, programs: Path, folder: Path, user: str | None) -> None:
        self._programs = programs
        self.folder = folder
        self._user = user
        self._numbers = count()
        self._run("initdb", "-D", "data", "--locale=C", "--encoding=UTF8", "-U", "postgres", "-A", "trust", "-N")
        data = folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (data / "postgresql.auto.conf").write_text(SETTINGS.format(folder=folder, port=self.port))
        (data / "pg_hba.conf").write_text(WHO_MAY)

    def start(self) -> None:
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "start")

    def stop(self) -> None:
        """At once, without a word to whoever is connected."""
        self._run("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")

    def database(self) -> str:
        """The name of a new database."""
        name = f"federation{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name} OWNER {OWNER}")
        return name

    def url(self, database: str, role: str = OWNER) -> str:
        return f"postgresql://{role}@/{database}?host={quote(str(self.folder), safe='')}&port={self.port}"

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement as superuser; its rows."""
        import psycopg

        with psycopg.connect(self.url(database, "postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=self.folder,
            user=self._user,
            group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
            extra_groups=None if self._user is None else [],
            env=os.environ | {"HOME": str(self.folder), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be the server's, too, and never end
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        log = self.folder / "log"
        assert done.returncode == 0, f"{program} ended with {done.returncode}: {log.exists() and log.read_text()}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A private PostgreSQL; skips the test where there is none to be had."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    programs = next((each for each in found if all((each / name).exists() for name in PROGRAMS)), None)
    if programs is None:
        pytest.skip(f"PostgreSQL's programs ({', '.join(PROGRAMS)}) are not on this machine")
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'pfedsecure[postgres]'")
    user = None
    if os.geteuid() == 0:  # initdb refuses root
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("the tests run as root, and there is no user postgres or nobody to run PostgreSQL as")
    folder = Path(tempfile.mkdtemp(prefix="pfed-postgres-"))  # short: a socket's path has 107 characters at most
    try:
        if user is not None:
            shutil.chown(folder, user)
            folder.chmod(0o711)
        made = Cluster(programs, folder, user)
        made.start()
        try:
            made.sql(f"CREATE ROLE {OWNER} LOGIN")
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database_url(cluster: Cluster) -> Iterator[str]:
    """That of a new database in PostgreSQL, as `pfed-server --database` takes it."""
    name = cluster.database()
    yield cluster.url(name)
    cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")
