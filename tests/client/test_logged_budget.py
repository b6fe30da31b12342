"""The budget of a state directory: events of both kinds, added up, and not one too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfed_client.logged_budget import LoggedBudget
from pfed_client.release_log import ReleaseLog
from pfedsecure.errors import BudgetExhausted
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.events import Event, GaussianRelease, SampledGaussianSteps

DELTA = 1e-5


def training(number: int) -> SampledGaussianSteps:
    return SampledGaussianSteps("prompt and gate", number, 2.0, 0.25, 10)


def test_events_are_granted_as_long_as_they_stay_within(tmp_path: Path) -> None:
    log = ReleaseLog(tmp_path / "releases.jsonl")
    size = GaussianRelease("number", 0, 8.0)
    events: list[Event] = [size, training(1), training(2)]
    budget = LoggedBudget(log, epsilon(events, DELTA), DELTA)
    for event in events:
        budget.reserve(event).commit()
    assert log.read() == events
    with pytest.raises(BudgetExhausted, match=r"prompt and gate of round 3, it would come to .*`pfed-client predict`"):
        budget.reserve(training(3))
    assert log.read() == events  # nothing was paid


def test_what_was_reserved_is_spent_though_never_committed(tmp_path: Path) -> None:
    """As after a crash in the middle of a training."""
    path = tmp_path / "releases.jsonl"
    limit = epsilon([training(1), training(2)], DELTA)
    for number in (1, 2):
        LoggedBudget(ReleaseLog(path), limit, DELTA).reserve(training(number))
    with pytest.raises(BudgetExhausted):
        LoggedBudget(ReleaseLog(path), limit, DELTA).reserve(training(2))
