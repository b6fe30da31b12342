"""SIGKILL at every phase of a real federation: it finishes, and with what an undisturbed one comes to."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

UPDATES_OF_OPEN_ROUND = (
    "SELECT count(update_digest) FROM parts JOIN rounds ON parts.round = rounds.number WHERE outcome = 'open' "
    "AND number >= {}"
)


def updates_of_open_round(federation, at_least: int) -> int:
    rows = federation.query(UPDATES_OF_OPEN_ROUND.format(at_least))
    return rows[0][0] if rows else 0


PHASES: dict[str, Callable] = {
    "gathering": lambda f: " joined" in f.log("server"),
    "first round, training": lambda f: "round 1 opened" in f.log("server"),
    "second round, training": lambda f: "round 2 opened" in f.log("server"),
    "one update has arrived": lambda f: updates_of_open_round(f, 2) >= 1,
    "between rounds": lambda f: "round 2 closed" in f.log("server"),
    "finished": lambda f: "finished" in f.log("server"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_server_goes_on_where_it_was(make_federation, undisturbed: dict[str, bytes], phase: str) -> None:
    federation = make_federation(2)
    federation.start()
    federation.until(lambda: PHASES[phase](federation), phase)
    federation.kill("server")
    federation.start_server()
    federation.finish()
    assert federation.outcome() == undisturbed


@pytest.mark.parametrize("phase", ["first round, training", "second round, training", "one update has arrived"])
def test_killed_client_goes_on_where_it_was(make_federation, undisturbed: dict[str, bytes], phase: str) -> None:
    federation = make_federation(2)
    federation.start()
    federation.until(lambda: PHASES[phase](federation), phase)
    federation.kill("client-2")
    federation.start_client("client-2")
    federation.finish()
    assert federation.outcome() == undisturbed


def test_round_goes_on_at_the_deadline_without_a_killed_client(make_federation) -> None:
    federation = make_federation(3, minimum=2, deadline=20, rounds=2, epochs=3)
    federation.start()
    federation.until(lambda: "round 1 opened" in federation.log("server"), "a round opens")
    federation.kill("client-3")
    survivors = {name: federation.processes[name] for name in ("server", "client-1", "client-2")}
    federation.processes = survivors
    federation.finish()
    outcomes = federation.query(
        "SELECT outcome, count(update_digest) FROM rounds JOIN parts ON round = number GROUP BY 1"
    )
    assert outcomes == [("closed", 4)]
    assert re.search(r"round 1 closed: cohort 3, updates 2", federation.log("server"))


def test_too_few_updates_reveal_nothing_and_the_next_round_starts(make_federation) -> None:
    federation = make_federation(2, deadline=15, rounds=1, epochs=40)
    federation.start()
    federation.until(lambda: "round 1 opened" in federation.log("server"), "a round opens")
    federation.kill("client-2")
    federation.until(lambda: "round 1 abandoned" in federation.log("server"), "the round is abandoned")
    assert federation.query("SELECT global_prompt FROM rounds WHERE number = 1") == [(None,)]
    assert federation.query("SELECT count(*) FROM pool") == [(0,)]
    federation.start_client("client-2")
    federation.finish()
    assert federation.query("SELECT outcome FROM rounds ORDER BY number DESC LIMIT 1") == [("closed",)]
