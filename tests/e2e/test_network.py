"""A federation of real processes on a network that fails: cables, silence, weather, a server that moves.

All protections are on. docs/faults.md has what must hold.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROTECTED = {"aggregation": "secure", "experts": "sealed", "matching": "dp", "noise": "epsilon = 8.0"}
KEEPALIVE_SECONDS = 20 + 10
"""A ping after so long, and so long for its answer (`pfedsecure.wire.options`)."""
SLACK_SECONDS = 25
DEADLINE_SECONDS = 15
NEW_HOST = "10.77.0.101"

ECHO = """
import socket, sys
listening = socket.create_server((sys.argv[1], int(sys.argv[2])))
while True:
    connection, _ = listening.accept()
    while data := connection.recv(4096):
        connection.sendall(data)
"""
ASK = """
import socket, sys, time
host, _, port = sys.argv[1].rpartition(":")
with socket.create_connection((host, int(port)), timeout=30) as connection:
    for line in sys.stdin:
        started = time.monotonic()
        connection.sendall(line.encode())
        connection.recv(4096)
        print(time.monotonic() - started, flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_network(make_federation: Callable[..., Any], make_network: Callable[..., Any], n: int, **settings: Any) -> Any:
    federation = make_federation(n, **PROTECTED | settings)
    federation.join_network(make_network(["server", *federation.names]), [NEW_HOST])
    return federation


def counted(federation: Any, name: str, after: int = 0) -> set[int]:
    """The closed rounds whose mean has a client in it."""
    sql = (
        f"SELECT round FROM parts JOIN rounds ON round = number WHERE member = '{name}' AND counted AND round > {after}"
    )
    return {int(number) for (number,) in federation.query(f"{sql} AND outcome = 'closed'")}


def newest(federation: Any) -> int:
    rows = federation.query("SELECT max(number) FROM rounds")
    return int(rows[0][0] or 0) if rows else 0


def in_cohort(federation: Any, name: str) -> bool:
    """Of the newest round."""
    number = newest(federation)
    return federation.query(f"SELECT count(*) FROM parts WHERE round = {number} AND member = '{name}'") != [(0,)]


def nobody_broke(federation: Any) -> None:
    assert federation.query("SELECT count(*) FROM rounds WHERE outcome = 'abandoned'") == [(0,)]
    assert federation.query("SELECT count(*) FROM reports") == [(0,)], "an expert could not be opened"
    assert "Traceback" not in federation.story(), federation.story()


@pytest.mark.parametrize("kind", ["packets", "proxy"])
def test_the_network_fails_as_it_is_told(make_network: Callable[..., Any], kind: str) -> None:
    """The tool itself: without this, the tests below could be of a network on which nothing ever happens."""
    network = make_network(["server", "client-1"], kind)
    address, port = network.address("server"), free_port()
    commands = {
        "server": [sys.executable, "-c", ECHO, address, str(port)],
        "client-1": [sys.executable, "-c", ASK, network.server_for("client-1", f"{address}:{port}")],
    }
    made = {}
    for name, command in commands.items():
        made[name] = subprocess.Popen(
            [*network.command(name), *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        time.sleep(0.5)

    def asked() -> float:
        made["client-1"].stdin.write("hello\n")
        made["client-1"].stdin.flush()
        return float(made["client-1"].stdout.readline())

    try:
        assert asked() < 0.2
        assert network.connections("client-1") == 1
        network.weather(0.2, 0.05, 0.0)
        assert 0.3 <= asked() < 1.0
        network.weather(0.0, 0.0, 0.3)
        assert max(asked() for _ in range(15)) > 0.15  # something was lost, and came again
        network.weather(0.0, 0.0, 0.0)
        for how in ("both ways", "answers"):
            network.cut("client-1", how)
            started = time.monotonic()
            made["client-1"].stdin.write("hello\n")
            made["client-1"].stdin.flush()
            time.sleep(1.0)
            network.restore("client-1")
            made["client-1"].stdout.readline()
            assert time.monotonic() - started > 1.0
    finally:
        for process in made.values():
            process.kill()
            process.communicate()


def test_a_cable_is_cut_and_a_connection_goes_silent(
    make_network: Callable[..., Any], make_federation: Callable[..., Any]
) -> None:
    """For longer than a round's deadline, and than it takes both sides to notice that nobody is there any more."""
    federation = on_network(
        make_federation, make_network, 5, minimum=3, rounds=1000, deadline=DEADLINE_SECONDS, step=5, heartbeat=1
    )
    network, lost = federation.network, ("client-4", "client-5")
    federation.start(keep_server=True)
    federation.until(lambda: all(counted(federation, name) for name in federation.names), "all are in a round")

    # One after the other: more than two thirds of a cohort must stay for its round to be closed.
    before, cut_at = newest(federation), time.monotonic()
    network.cut("client-4")
    federation.until(
        lambda: counted(federation, "client-5", before + 1) - counted(federation, "client-4"),
        "a round closes without one",
    )
    federation.until(lambda: not in_cohort(federation, "client-4"), "a round begins without it")
    network.cut("client-5", "answers")
    federation.until(
        lambda: counted(federation, "client-1", before + 2) - counted(federation, "client-5"),
        "a round closes without two",
    )
    federation.until(lambda: not any(map(network.connections, lost)), "the server lets go of both connections")
    assert time.monotonic() - cut_at < KEEPALIVE_SECONDS + SLACK_SECONDS
    for name in lost:
        federation.until(lambda name=name: "trying again" in federation.log(name), f"{name} notices")
    assert time.monotonic() - cut_at > DEADLINE_SECONDS
    mended = newest(federation)
    for name in lost:
        network.restore(name)
    federation.until(lambda: all(counted(federation, name, mended) for name in lost), "both take part again")

    assert all(process.poll() is None for process in federation.processes.values()), federation.story()
    nobody_broke(federation)


def test_far_away_and_losing_packets(make_network: Callable[..., Any], make_federation: Callable[..., Any]) -> None:
    """200 ms each way, 50 more or less, and every twentieth packet lost, for all and from the first call on."""
    federation = on_network(make_federation, make_network, 3, rounds=2)
    federation.network.weather(0.2, 0.05, 0.05)
    federation.start()
    federation.finish()

    assert all(counted(federation, name) == {1, 2} for name in federation.names)
    nobody_broke(federation)


def test_the_server_moves(make_network: Callable[..., Any], make_federation: Callable[..., Any]) -> None:
    """Killed, and started on the same state at another address and port: whoever is told of it goes on."""
    federation = on_network(make_federation, make_network, 3, rounds=4)
    federation.start()
    federation.until(lambda: "round 2 opened" in federation.log("server"), "a round is open")
    federation.kill("server")
    ((before,),) = federation.query("SELECT federation_id FROM meta")
    _, _, port = federation.address.rpartition(":")
    host = federation.network.move("server")
    federation.address = f"{host}:{int(port) - 1}"
    federation.start_server()
    for name in federation.names:
        federation.until(lambda name=name: "trying again" in federation.log(name), f"{name} misses the server")
        federation.processes[name].send_signal(signal.SIGTERM)
        assert federation.processes[name].wait(timeout=60) == 0
        federation.start_client(name)
    federation.finish()

    assert federation.query("SELECT federation_id FROM meta") == [(before,)]
    for name in federation.names:
        assert counted(federation, name) == {1, 2, 3, 4}
        lines = (federation.home / "state/clients" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
    nobody_broke(federation)
