"""A federation of real processes in a folder of its own, with ways to watch it and to kill parts of it."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest
from safetensors.numpy import load_file

from pfed_cli.pki import pki

PLAN = """
name = "e2e"
seed = 3
class_names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

[prompt]
context_length = 4

[mixture]
experts = 2
gate_width = 32

[training]
local_epochs = {epochs}
prompt_lr = 0.02

[rounds]
count = {rounds}
start_clients = {clients}
minimum_cohort = {minimum}
deadline_seconds = {deadline}
heartbeat_seconds = {heartbeat}
step_seconds = {step}

[protection]
aggregation = "{aggregation}"
experts = "{experts}"
matching = "{matching}"
metrics = {metrics}

[matching]
{noise}
"""
PATIENCE_SECONDS = 240


class Network(Protocol):
    """What stands between the processes of a federation: `packets.Packets`, or `proxy.Proxy` without root."""

    kind: str

    def address(self, name: str) -> str: ...

    def server_for(self, client: str, address: str) -> str: ...

    def command(self, name: str) -> list[str]: ...

    def cut(self, name: str, how: str = "both ways") -> None: ...

    def restore(self, name: str) -> None: ...

    def weather(self, delay: float, jitter: float, loss: float) -> None: ...

    def move(self, name: str) -> str: ...

    def connections(self, name: str) -> int: ...

    def close(self) -> None: ...


class Federation:
    """Processes that share the folder `home`: one server, and clients called client-1, client-2, ..."""

    @staticmethod
    def free_address() -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{probe.getsockname()[1]}"

    def __init__(self, home: Path, clients: int, **settings: object) -> None:
        self.home = home
        self.names = [f"client-{number}" for number in range(1, clients + 1)]
        defaults: dict[str, object] = {"epochs": 1, "rounds": 3, "minimum": clients, "deadline": 200}
        # Six of them, and a client is taken for gone: one that was killed must be back before that, on a busy machine.
        defaults |= {"step": 60, "heartbeat": 5, "metrics": "false"}
        defaults |= {"aggregation": "secure", "experts": "sealed", "matching": "he", "noise": ""}
        (home / "plan.toml").write_text(PLAN.format(clients=clients, **defaults | settings))
        self.address = self.free_address()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.network: Network | None = None
        self._identities = False

    def join_network(self, network: Network, hosts: Sequence[str] = ()) -> None:
        """Have all processes on the machines of a network, with certificates of an authority of their own.

        The server's is for its address there, and for `hosts`.
        """
        self.network = network
        host, _, port = self.address.rpartition(":")
        host = network.address("server")
        self.address = f"{host}:{port}"
        self.certify(host, *hosts)

    def certify(self, *hosts: str) -> None:
        """Certificates for all, as certs/README.md has it; the server's is for `hosts`."""

        def run(*arguments: str | Path) -> None:
            pki.main([str(argument) for argument in arguments], prog_name="pfed pki", standalone_mode=False)

        authority, kit = self.home / "authority", self.home / "kit.json"
        run("init", authority, "--federation", "e2e")
        for name in ("server", *self.names):
            identity, server = self.home / "identities" / name, name == "server"
            role = ["--role", "server"] if server else []
            run("request", identity, "--name", name, *role, *(f"--host={host}" for host in hosts if server))
            run("approve", identity / "identity.csr", "--authority", authority, "--kit", kit, "--yes", *role)
            run("install", kit, identity, "--yes")
        self._identities = True

    def start_server(self, *more: str, keep: bool = False) -> None:
        """`keep`: it stays when the federation is finished."""
        options = ["--tls", "--plan", "plan.toml", "--listen", self.address, *self._identity("server"), *more]
        self._start("server", ["pfed_server", *options, *([] if keep else ["--exit-when-finished"])])
        self.until(lambda: "listening" in self.log("server"), "the server listens")

    def start_client(self, name: str, *more: str) -> None:
        number = int(name.removeprefix("client-")) - 1
        server = self.address if self.network is None else self.network.server_for(name, self.address)
        options = ["--server", server, "--name", name, "--data", f"demo:{number}/5", "--threads", "1"]
        self._start(name, ["pfed_client", *options, "--plan", "plan.toml", *self._identity(name), *more])

    def start(self, *, keep_server: bool = False) -> None:
        self.start_server(keep=keep_server)
        for name in self.names:
            self.start_client(name)

    def kill(self, name: str) -> None:
        """SIGKILL: no chance to tidy up."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait(timeout=20)

    def finish(self) -> None:
        """Wait for all processes to end by themselves, without an error."""
        for name, process in self.processes.items():
            assert process.wait(timeout=PATIENCE_SECONDS) == 0, f"{name}: {self.log(name)}"

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain until {what}: {self.story()}"
            time.sleep(0.02)

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Look into the server's database, which may be written to at the moment."""
        file = self.home / "state" / "server" / "federation.sqlite"
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as connection:
                return connection.execute(sql).fetchall()
        except sqlite3.OperationalError:
            return []  # not made yet

    def outcome(self) -> dict[str, str]:
        """What a federation comes to: digests of the final global prompt and of every client's final model.

        Of a model the numbers count; its file also names the plan, in which deadlines may differ.
        """
        models = {name: _numbers(self.home / "state/clients" / name / "model.safetensors") for name in self.names}
        newest = "SELECT global_prompt FROM rounds WHERE outcome = 'closed' ORDER BY number DESC LIMIT 1"
        ((prompt,),) = self.query(newest)
        assert isinstance(prompt, bytes)
        return {what: sha256(content).hexdigest() for what, content in (models | {"global prompt": prompt}).items()}

    def story(self) -> str:
        """Everything that was logged, for whoever wonders why a federation came to something else."""
        return "\n".join(f"== {path.stem}\n{path.read_text()}" for path in sorted(self.home.glob("*.log")))

    def _identity(self, name: str) -> list[str]:
        return ["--identity", str(self.home / "identities" / name)] if self._identities else []

    def _start(self, name: str, module: list[str]) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*([] if self.network is None else self.network.command(name)), sys.executable, "-m", *module],
                cwd=self.home,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PFED_LEDGER": str(self.home / "ledgers")},
            )


def _numbers(file: Path) -> bytes:
    tensors = load_file(file)
    assert tensors
    return b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))


class Replicated(Federation):
    """Servers called server-1 and server-2 on one database; clients know both, and turn to one of them first."""

    def __init__(self, home: Path, clients: int, database: str) -> None:
        # Nobody is taken for gone who is stopped until a server is back, on a busy machine.
        super().__init__(home, clients, heartbeat=15, step=200)
        self.database = database
        self.addresses = {name: self.free_address() for name in ("server-1", "server-2")}

    def start_replica(self, name: str) -> None:
        before = self.log(name).count("listening") if (self.home / f"{name}.log").exists() else 0
        options = ["--tls", "--plan", "plan.toml", "--listen", self.addresses[name], "--state", f"state/{name}"]
        self._start(name, ["pfed_server", *options, "--database", self.database, "--exit-when-finished"])
        self.until(lambda: self.log(name).count("listening") > before, f"{name} listens")

    def start_client(self, name: str, *more: str) -> None:
        servers = sorted(self.addresses.values(), reverse=bool(self.names.index(name) % 2))
        super().start_client(name, "--server", ",".join(servers), *more)

    def query(self, sql: str) -> list[tuple[object, ...]]:
        import psycopg

        with psycopg.connect(self.database) as connection:
            return connection.execute(sql).fetchall()


@pytest.fixture
def replicated(tmp_path: Path, database_url: str) -> Iterator[Replicated]:
    federation = Replicated(tmp_path, 3, database_url)
    yield federation
    for process in federation.processes.values():
        process.kill()
        process.wait(timeout=20)


@pytest.fixture
def make_federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(clients: int, **settings: object) -> Federation:
        made.append(Federation(tmp_path_factory.mktemp("federation"), clients, **settings))
        return made[-1]

    yield make
    for federation in made:
        for process in federation.processes.values():
            process.kill()
            process.wait(timeout=20)


def module(name: str) -> ModuleType:
    """A file beside this one."""
    spec = importlib.util.spec_from_file_location(f"e2e_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses and annotations look there
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def make_network() -> Iterator[Callable[..., Network]]:
    """Namespaces where this machine allows it, else the proxy; `kind` asks for one of the two."""
    made: list[Network] = []

    def make(names: Sequence[str], kind: str | None = None) -> Network:
        packets = module("packets")
        if kind == "packets" and not packets.available():
            pytest.skip("namespaces and TUN devices take root and Linux")
        wanted = kind or ("packets" if packets.available() else "proxy")
        made.append(packets.Packets(names) if wanted == "packets" else module("proxy").Proxy(names))
        return made[-1]

    yield make
    for network in made:
        network.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a federation of three clients comes to when nothing happens to it."""
    federation = Federation(tmp_path_factory.mktemp("undisturbed"), 3)
    federation.start()
    federation.finish()
    return federation.outcome()
