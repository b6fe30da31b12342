"""The demo's federation proper: one `pfed-server --tls` and several `pfed-client`, as processes.

The server is stopped when all clients have ended, not by its own `--exit-when-finished`: an interrupted demo that is
gone on with may have finished already, and its server would not wait for clients that take long to start.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console

from pfed_cli.demo.interruption import Interruption
from pfed_cli.demo.layout import DemoClient, Layout
from pfed_cli.demo.processes import Children
from pfed_cli.demo.watching import Snapshot, display
from pfed_cli.operations import fetch_status, operator_identity
from pfed_client.metrics import MetricsLog, RoundRecord
from pfedsecure.console import Address
from pfedsecure.errors import ServerUnreachable
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import operations_pb2 as ops

SERVER = "server"

_LOOK_SECONDS = 0.5
_START_SECONDS = 60.0
_RETRY_SECONDS = 30


@dataclass(frozen=True)
class FederationResult:
    """What the processes left: final accuracy by client in [0, 1], their rounds, and the server's last status."""

    accuracies: Mapping[str, float]
    records: Mapping[str, Sequence[RoundRecord]]
    rounds_completed: int
    status: ops.GetStatusReply


def run_federation(layout: Layout, plan: Plan, clients: Sequence[DemoClient], console: Console) -> FederationResult:
    """Run the federation to its end.

    Raises ProcessFailed when a process ends with an error; the others are stopped then, as after Ctrl-C or SIGTERM,
    which end this as `Interruption` says.
    """
    address = Address("127.0.0.1", _free_port())
    python = [sys.executable, "-m"]
    with Interruption() as interruption, Children(layout.folder) as children:
        server = ["pfed_server", "--tls", "--listen", str(address), "--plan", str(layout.plan_file)]
        children.start(SERVER, [*python, *server, "--state", "server"], layout.log(SERVER))
        _wait_for(address, children, interruption)
        for client in clients:
            interruption.check()
            options = ["pfed_client", "--server", str(address), "--name", client.name, "--data", client.data]
            options += ["--state", str(layout.client_state(client.name)), "--plan", str(layout.plan_file)]
            options += ["--threads", "1", "--retry-seconds", str(_RETRY_SECONDS)]
            children.start(client.name, [*python, *options], layout.log(client.name))
        status = _watch(layout, plan, clients, address, children, interruption, console)
    results = {
        client.name: json.loads((layout.client_state(client.name) / "result.json").read_bytes()) for client in clients
    }
    return FederationResult(
        accuracies={name: result["test_accuracy"] for name, result in results.items()},
        records={client.name: _records(layout, client) for client in clients},
        rounds_completed=min(result["rounds_completed"] for result in results.values()),
        status=status,
    )


def _watch(
    layout: Layout,
    plan: Plan,
    clients: Sequence[DemoClient],
    address: Address,
    children: Children,
    interruption: Interruption,
    console: Console,
) -> ops.GetStatusReply:
    """Show what happens until all clients have ended; the server's status then."""
    operator = operator_identity(layout.development_pki)
    with display(console, clients, plan.rounds.count) as shown:
        while True:
            running = children.check()
            if SERVER not in running:
                raise ServerUnreachable(f"somebody stopped the server; its log is {layout.log(SERVER)}")
            with suppress(ServerUnreachable):  # too busy for once
                status = fetch_status(address, operator)
                shown.show(Snapshot(status, {client.name: _records(layout, client) for client in clients}))
                if running == {SERVER}:
                    return status
            interruption.wait(_LOOK_SECONDS)


def _wait_for(address: Address, children: Children, interruption: Interruption) -> None:
    """Return when somebody listens at `address`: the server, or one that `check` finds to have failed."""
    until = time.monotonic() + _START_SECONDS
    while children.check() and time.monotonic() < until:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            interruption.wait(0.1)
    raise ServerUnreachable(f"the server did not listen at {address} within {_START_SECONDS:g} s")


def _records(layout: Layout, client: DemoClient) -> list[RoundRecord]:
    return MetricsLog(layout.client_state(client.name) / "metrics.jsonl").read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
