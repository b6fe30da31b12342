"""What `pfed-client budget` shows, against sums of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pfed_client.ledger.account import Account
from pfed_client.ledger.report import budget_json, budget_lines, budget_report
from pfed_client.promise import Promise
from pfedsecure.privacy.accountant import epsilon

PROMISE = Promise(
    epsilon=8, delta=1e-5, size=40, size_noise_multiplier=6, noise_multiplier=2, sample_rate=0.25, steps=10, rounds=9
)


def test_spent_and_left(open_account: Callable[..., Account], allow: Any) -> None:
    own, beside = open_account(), open_account(range(4, 7), federation="g", client="b")
    events = [PROMISE.size_event, PROMISE.event(1), PROMISE.event(2), PROMISE.event(5)]
    made = own.reserve(events[0], allow)
    own.commit(made)
    trained = own.reserve(events[1], allow)
    own.countersigned(trained, 1, b"", b"")
    beside.reserve(events[3], allow)
    own.reserve(events[2], allow)
    report = budget_report("a", PROMISE, own.read())
    assert report.spent == epsilon(events, 1e-5)
    assert report.left == 8 - report.spent
    assert [release.progress for release in report.releases] == ["made", "countersigned", "reserved", "reserved"]
    assert [release.client for release in report.releases] == ["a", "a", "b", "a"]  # in the order of time
    so_far = [release.epsilon_so_far for release in report.releases]
    assert so_far == sorted(so_far)
    assert so_far[0] == epsilon(events[:1], 1e-5)
    assert so_far[-1] == report.spent
    assert [(kind.what, kind.count) for kind in report.kinds] == [
        ("number of training images", 1),
        ("prompt and gate", 3),
    ]
    assert report.kinds[1].epsilon == epsilon(events[1:], 1e-5)
    more = [PROMISE.event(1)] * report.rounds_left
    assert epsilon([*events, *more], 1e-5) <= 8 or not more
    assert report.rounds_left == 9 or epsilon([*events, *more, PROMISE.event(1)], 1e-5) > 8


def test_for_people_and_for_programs(open_account: Callable[..., Account], allow: Any) -> None:
    account = open_account()
    account.reserve(PROMISE.size_event, allow)
    account.reserve(PROMISE.event(1), allow)
    report = budget_report("a", PROMISE, account.read())
    told = json.loads(json.dumps(budget_json(report)))
    assert told["spent"] + told["left"] == pytest.approx(told["epsilon"])
    assert told["releases"][1]["event"] == {
        "what": "prompt and gate",
        "round": 1,
        "noise_multiplier": 2.0,
        "sample_rate": 0.25,
        "steps": 10,
    }
    lines = list(budget_lines(report))
    assert lines[0] == "a: epsilon 8, delta 1e-05 for all that is released of its images"
    assert lines[1].startswith(
        f"spent {report.spent:.3f}, left {report.left:.3f}: enough for training in {report.rounds_left} more"
    )
    assert len(lines) == 2 + 2 + 2
    assert "prompt and gate, round 1  reserved  epsilon so far" in lines[-1]
