"""Real processes with `--dp-epsilon`: a whole federation, and a client that is killed in the middle of a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfed_client.release_log import ReleaseLog
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.events import SampledGaussianSteps

pytestmark = pytest.mark.slow


def state(federation: Any, name: str) -> Path:
    return federation.home / "state/clients" / name


def test_private_clients_among_others(make_federation: Callable[..., Any]) -> None:
    """Two with, one without: what each releases stays within what it promised, over the whole federation."""
    federation = make_federation(3)
    federation.start_server()
    for name, more in zip(federation.names, (["--dp-epsilon", "8"], ["--dp-epsilon", "2"], []), strict=True):
        federation.start_client(name, *more)
    federation.finish()
    for name, promised in zip(federation.names[:2], (8.0, 2.0), strict=True):
        events = ReleaseLog(state(federation, name) / "releases.jsonl").read()
        made = json.loads((state(federation, name) / "privacy.json").read_text())
        assert 0.98 * promised < epsilon(events, made["delta"]) <= promised
        assert [event.round for event in events] == [0, 1, 2, 3]
        assert f"differential privacy: epsilon {promised:g}, delta 1e-05 for all 3 rounds" in federation.log(name)
        assert "NOT PROTECTED" not in federation.log(name)
    assert not (state(federation, "client-3") / "privacy.json").exists()
    assert "NOT PROTECTED: differential privacy is up to each client" in federation.log("client-3")


def test_killed_in_training_it_pays_again_and_ends_when_all_is_spent(make_federation: Callable[..., Any]) -> None:
    federation = make_federation(3, minimum=3, deadline=40)
    federation.start_server(keep=True)
    for name in federation.names:
        federation.start_client(name, "--dp-epsilon", "8")
    log = ReleaseLog(state(federation, "client-1") / "releases.jsonl")

    def training() -> list[SampledGaussianSteps]:
        return [event for event in log.read() if isinstance(event, SampledGaussianSteps)]

    federation.until(lambda: len(training()) == 1, "client-1 has paid for its first training")
    federation.kill("client-1")
    assert not (state(federation, "client-1") / "model.safetensors").exists()
    federation.start_client("client-1")  # without the option: it keeps its promise
    assert federation.processes["client-1"].wait(timeout=200) == 71
    assert len(training()) == 3  # as many as were planned, and the first was for nothing
    assert "the budget of epsilon 8 is spent" in federation.log("client-1")
    assert (state(federation, "client-1") / "model.safetensors").exists()
