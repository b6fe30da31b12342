"""Two servers on one PostgreSQL, real clients over TLS: the one is killed in the middle of a round, then the other."""

from __future__ import annotations

import signal

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def messages(federation, number: int) -> int:
    """How many messages of an open round from `number` on are there."""
    ((count,),) = federation.query(f"SELECT count(*) FROM messages WHERE round >= {number}")
    return count


def test_either_server_may_be_killed_and_nothing_is_lost(replicated, undisturbed: dict[str, str]) -> None:
    """It comes to what one undisturbed server comes to, to the last bit: nobody is counted twice, or left out."""
    federation = replicated
    for name in ("server-1", "server-2"):
        federation.start_replica(name)
    for name in federation.names:
        federation.start_client(name)
    federation.until(lambda: messages(federation, 2) >= 1, "the second round is under way")
    federation.kill("server-1")
    waiting = federation.processes["client-2"]
    waiting.send_signal(signal.SIGSTOP)  # so that the round is still under way when the first server is back
    federation.start_replica("server-1")
    federation.until(lambda: messages(federation, 2) >= 1, "a round waits for the client that was stopped")
    federation.kill("server-2")
    del federation.processes["server-2"]
    waiting.send_signal(signal.SIGCONT)
    federation.finish()
    assert federation.outcome() == undisturbed, federation.story()
    rounds = federation.query(
        "SELECT number, outcome, count(*), sum(counted::int) FROM rounds JOIN parts ON round = number GROUP BY number "
        "ORDER BY number"
    )
    assert rounds == [(number, "closed", 3, 3) for number in (1, 2, 3)]
    logs = [federation.log(name) for name in ("server-1", "server-2")]
    for number in (1, 2, 3):
        for event in ("opened", "closed"):  # none of it is said by a server that is killed right then
            assert sum(log.count(f"round {number} {event}") for log in logs) <= 1
    assert not any("Traceback" in log for log in logs)
