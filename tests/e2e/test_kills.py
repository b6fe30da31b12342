"""SIGKILL at every phase of a real federation: it finishes, and with what an undisturbed one comes to."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MESSAGES = "SELECT count(*) FROM messages WHERE round >= 2 AND step >= {}"
"""The messages of an open round that is not the first. Steps are short: a later one is as good as the one asked for."""


def messages(federation, step: int) -> int:
    rows = federation.query(MESSAGES.format(step))
    return rows[0][0] if rows else 0


TRAINING: dict[str, Callable] = {
    "first round, training": lambda f: "round 1 opened" in f.log("server"),
    "second round, training": lambda f: "round 2 opened" in f.log("server"),
}
STEPS: dict[str, Callable] = {
    "one has advertised its keys": lambda f: messages(f, 1) >= 1,
    "shares are being dealt": lambda f: messages(f, 2) >= 1,
    "masked inputs arrive": lambda f: messages(f, 3) >= 1,
    "survivors are being signed": lambda f: messages(f, 4) >= 1,
    "the sum is being unmasked": lambda f: messages(f, 5) >= 1,
}
PHASES: dict[str, Callable] = {
    "gathering": lambda f: " joined" in f.log("server"),
    **TRAINING,
    **STEPS,
    "between rounds": lambda f: "round 2 closed" in f.log("server"),
    "finished": lambda f: "finished" in f.log("server"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_server_goes_on_where_it_was(make_federation, undisturbed: dict[str, str], phase: str) -> None:
    federation = make_federation(3)
    federation.start()
    federation.until(lambda: PHASES[phase](federation), phase)
    federation.kill("server")
    federation.start_server()
    federation.finish()
    assert federation.outcome() == undisturbed, federation.story()


@pytest.mark.parametrize("phase", [*TRAINING, *STEPS])
def test_killed_client_goes_on_where_it_was(make_federation, undisturbed: dict[str, str], phase: str) -> None:
    federation = make_federation(3)
    federation.start()
    federation.until(lambda: PHASES[phase](federation), phase)
    federation.kill("client-2")
    federation.start_client("client-2")
    federation.finish()
    assert federation.outcome() == undisturbed, federation.story()


def test_round_goes_on_at_the_deadline_without_a_killed_client(make_federation) -> None:
    federation = make_federation(4, minimum=3, heartbeat=1, deadline=20, rounds=2, epochs=3)
    federation.start()
    federation.until(lambda: "round 1 opened" in federation.log("server"), "a round opens")
    federation.kill("client-4")
    survivors = {name: federation.processes[name] for name in ("server", "client-1", "client-2", "client-3")}
    federation.processes = survivors
    federation.finish()
    outcomes = federation.query("SELECT outcome, sum(counted) FROM rounds JOIN parts ON round = number GROUP BY 1")
    assert outcomes == [("closed", 6)]
    assert re.search(r"round 1 closed: cohort 4, updates 3", federation.log("server"))


def test_a_client_killed_under_the_protocol_costs_the_others_nothing(make_federation) -> None:
    """Of four, three are a quorum: the masks of the one that is gone are taken off with the shares that it dealt."""
    federation = make_federation(4, minimum=3, heartbeat=1, deadline=60, step=5, rounds=2)
    federation.start()
    federation.until(lambda: messages(federation, 2) >= 1, "shares are being dealt")
    federation.kill("client-4")
    del federation.processes["client-4"]
    federation.finish()
    assert federation.query("SELECT count(*) FROM rounds WHERE outcome = 'closed'") == [(2,)]


def test_too_few_updates_reveal_nothing_and_the_next_round_starts(make_federation) -> None:
    federation = make_federation(3, heartbeat=1, deadline=15, rounds=1, epochs=40)
    federation.start()
    federation.until(lambda: "round 1 opened" in federation.log("server"), "a round opens")
    federation.kill("client-2")
    federation.until(lambda: "round 1 abandoned" in federation.log("server"), "the round is abandoned")
    assert federation.query("SELECT global_prompt FROM rounds WHERE number = 1") == [(None,)]
    assert federation.query("SELECT count(*) FROM pool") == [(0,)]
    assert federation.query("SELECT count(*) FROM messages WHERE round = 1") == [(0,)]
    federation.start_client("client-2")
    federation.finish()
    assert federation.query("SELECT outcome FROM rounds ORDER BY number DESC LIMIT 1") == [("closed",)]
