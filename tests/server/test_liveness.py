"""Who is online, and when that changes."""

from __future__ import annotations

from typing import Any

from pfed_server.liveness import Liveness


def test_six_heartbeats_of_silence_are_too_many(clock: Any) -> None:
    liveness = Liveness(clock, heartbeat_seconds=2)
    liveness.heard("anna")
    clock.advance(5)
    liveness.heard("bert")
    assert liveness.online() == {"anna", "bert"}
    assert (liveness.seconds_left("anna"), liveness.seconds_left("bert")) == (7, 12)
    clock.advance(7)
    assert liveness.online() == {"bert"}
    liveness.heard("anna")
    assert liveness.online() == {"anna", "bert"}
    liveness.forget("bert")
    liveness.forget("nobody")
    assert liveness.online() == {"anna"}
    assert liveness.seconds_left("nobody") == 0


def test_the_next_change_is_due_at_once_when_it_has_been_missed(clock: Any) -> None:
    liveness = Liveness(clock, heartbeat_seconds=2)
    assert liveness.seconds_until_one_is_offline([]) is None
    liveness.heard("anna")
    clock.advance(5)
    liveness.heard("bert")
    assert liveness.seconds_until_one_is_offline(["anna", "bert"]) == 7
    assert liveness.seconds_until_one_is_offline(["bert"]) == 12
    clock.advance(10)
    assert liveness.seconds_until_one_is_offline(["anna", "bert"]) == 0, "anna went offline three seconds ago"
    assert liveness.seconds_until_one_is_offline(["bert"]) == 2
