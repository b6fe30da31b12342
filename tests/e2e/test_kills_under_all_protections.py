"""SIGKILL at each phase of a round with noised sketches, of the server, of a client, and of both at once.

`test_kills.py` has every phase of the aggregation by itself, and compares what comes of it to the last bit. Here noise
comes from the operating system, so no two federations are the same: every round must count everybody, no sketch of a
client that lives may be noised twice, and every expert must open.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

VICTIM = "client-2"

Reached = Callable[[], bool]


def answered(method: str) -> Callable[[Any, int], Reached]:
    """A call has been answered that had not been before, in a round or a later one."""

    def phase(federation: Any, number: int) -> Reached:
        before = calls(federation, method)
        return lambda: newest(federation) >= number and calls(federation, method) > before

    return phase


def known(sql: str) -> Callable[[Any, int], Reached]:
    """The server's database has something of the victim, of a round or a later one."""

    def phase(federation: Any, number: int) -> Reached:
        query = f"{sql} AND member = '{VICTIM}' AND round >= {number}"
        return lambda: federation.query(query) not in ([], [(0,)])

    return phase


PHASES: dict[str, Callable[[Any, int], Reached]] = {
    "matching": answered("Match"),
    "fetching experts": answered("GetExperts"),
    "its expert is published": known("SELECT count(*) FROM parts WHERE publication_digest NOT NULL"),
    "its keys are there": known("SELECT count(*) FROM messages WHERE step >= 1"),
    "its shares are dealt": known("SELECT count(*) FROM messages WHERE step >= 2"),
    "its masked input is there": known("SELECT count(*) FROM messages WHERE step >= 3"),
    "it signed who survived": known("SELECT count(*) FROM messages WHERE step >= 4"),
    "its shares unmask the sum": known("SELECT count(*) FROM messages WHERE step >= 5"),
}
"""Of a round, in their order. `test_kills.py` has the last five one by one, and training."""


def newest(federation: Any) -> int:
    rows = federation.query("SELECT max(number) FROM rounds")
    return int(rows[0][0] or 0) if rows else 0


def closed(federation: Any, number: int) -> bool:
    return federation.query(f"SELECT outcome FROM rounds WHERE number = {number}") == [("closed",)]


def calls(federation: Any, method: str) -> int:
    """So many calls of a method has this server answered since it was started, which it may be just now."""
    while True:
        try:
            with urllib.request.urlopen(f"http://{federation.metrics}/metrics", timeout=10) as page:
                text = page.read().decode()
        except OSError:
            assert federation.processes["server"].poll() is None, federation.log("server")
            time.sleep(0.05)
        else:
            found = re.findall(rf'^pfed_rpc_calls_total{{code="OK",method="{method}"}} (\S+)', text, re.MULTILINE)
            return sum(int(float(value)) for value in found)


def restart(federation: Any, victims: tuple[str, ...]) -> None:
    for name in victims:
        federation.kill(name)
    for name in victims:
        if name == "server":
            federation.start_server("--metrics", federation.metrics)
        else:
            federation.start_client(name)


def test_every_phase(make_federation: Callable[..., Any]) -> None:
    alone = list(PHASES)[:3]
    plan = [*((phase, ("server",)) for phase in alone), *((phase, (VICTIM,)) for phase in alone)]
    plan += [(phase, ("server", VICTIM)) for phase in list(PHASES)[3:]]
    rounds = 2 * len(plan) + 4  # a kill can come so late that it takes the next round too
    federation = make_federation(3, matching="dp", noise="epsilon = 8.0", rounds=rounds, heartbeat=10)
    federation.metrics = federation.free_address()
    federation.start_server("--metrics", federation.metrics)
    for name in federation.names:
        federation.start_client(name)
    federation.until(lambda: f"{VICTIM} joined" in federation.log("server"), "it joined")
    restart(federation, ("server",))
    restart(federation, (VICTIM,))

    killed, last = Counter({"server": 1, VICTIM: 1}), 1
    for phase, victims in plan:
        federation.until(lambda last=last: closed(federation, last), "the round before closes")
        reached = PHASES[phase](federation, last + 1)
        federation.until(reached, phase)
        last = newest(federation)
        restart(federation, victims)
        killed.update(victims)
    federation.finish()

    assert killed == {"server": 1 + 3 + 5, VICTIM: 1 + 3 + 5}
    assert federation.query("SELECT outcome, count(*) FROM rounds GROUP BY 1") == [("closed", rounds)]
    assert federation.query("SELECT sum(counted) FROM parts") == [(3 * rounds,)]
    assert federation.query("SELECT member, round FROM pool ORDER BY 1") == [
        (name, rounds) for name in federation.names
    ]
    assert federation.query("SELECT count(*) FROM reports") == [(0,)], "an expert could not be opened"
    assert "Traceback" not in federation.story(), federation.story()
    for name in federation.names:
        lines = (federation.home / "state/clients" / name / "releases.jsonl").read_text().splitlines()
        noised = Counter(json.loads(line)["round"] for line in lines)
        assert set(noised) == set(range(1, rounds + 1))
        # One whose noise a crash cut short counts as made, so that nothing is forgotten; nobody else draws twice.
        assert sum(noised.values()) - len(noised) <= (killed[VICTIM] if name == VICTIM else 0)
