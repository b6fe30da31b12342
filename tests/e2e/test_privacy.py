"""Real processes with `--dp-epsilon`: a whole federation, and a client that is killed in the middle of a training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfed_client.ledger.rows import Countersigned, Reserved, Row, read_chain
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.events import Event, SampledGaussianSteps

pytestmark = pytest.mark.slow


def state(federation: Any, name: str) -> Path:
    return federation.home / "state/clients" / name


def rows(federation: Any, name: str) -> list[Row]:
    """The rows of the ledger of a client's images."""
    for path in (federation.home / "ledgers").glob("*/ledger.jsonl"):
        found = list(read_chain(path.read_bytes(), path).rows)
        if any(isinstance(row, Reserved) and row.client == name for row in found):
            return found
    return []


def events(federation: Any, name: str) -> list[Event]:
    """What a client reserved."""
    return [row.event for row in rows(federation, name) if isinstance(row, Reserved)]


def client(federation: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of `pfed-client` that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "pfed_client", *arguments],
        cwd=federation.home,
        env=os.environ | {"PFED_LEDGER": str(federation.home / "ledgers")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_private_clients_among_others(make_federation: Callable[..., Any]) -> None:
    """Two with, one without: what each releases stays within what it promised, over the whole federation."""
    federation = make_federation(3)
    federation.start_server()
    for name, more in zip(federation.names, (["--dp-epsilon", "8"], ["--dp-epsilon", "2"], []), strict=True):
        federation.start_client(name, *more)
    federation.finish()
    for name, promised in zip(federation.names[:2], (8.0, 2.0), strict=True):
        released = events(federation, name)
        made = json.loads((state(federation, name) / "privacy.json").read_text())
        assert 0.98 * promised < epsilon(released, made["delta"]) <= promised
        assert [event.round for event in released] == [0, 1, 2, 3]
        assert f"differential privacy: epsilon {promised:g}, delta 1e-05 for all 3 rounds" in federation.log(name)
        assert "NOT PROTECTED" not in federation.log(name)
    assert not (state(federation, "client-3") / "privacy.json").exists()
    assert "NOT PROTECTED: differential privacy is up to each client" in federation.log("client-3")


def test_killed_in_training_it_pays_again_and_ends_when_all_is_spent(make_federation: Callable[..., Any]) -> None:
    federation = make_federation(3, minimum=3, deadline=40)
    federation.start_server(keep=True)
    for name in federation.names:
        federation.start_client(name, "--dp-epsilon", "8")

    def training() -> list[SampledGaussianSteps]:
        return [event for event in events(federation, "client-1") if isinstance(event, SampledGaussianSteps)]

    def countersigned() -> bool:
        return any(isinstance(row, Countersigned) for row in rows(federation, "client-1"))

    federation.until(countersigned, "client-1 has paid for its first training, and the server knows")
    federation.kill("client-1")
    assert not (state(federation, "client-1") / "model.safetensors").exists()
    federation.start_client("client-1")  # without the option: it keeps its promise
    assert federation.processes["client-1"].wait(timeout=200) == 71
    assert len(training()) == 3  # as many as were planned, and the first was for nothing
    assert "the budget of epsilon 8 is spent" in federation.log("client-1")
    assert (state(federation, "client-1") / "model.safetensors").exists()


def test_a_ledger_outlives_the_state_and_older_copies_of_itself(make_federation: Callable[..., Any]) -> None:
    """Real processes: what was spent is shown, and is not forgotten with files that are deleted or put back."""
    federation = make_federation(2, aggregation="plain", experts="plain", matching="plain", rounds=2)
    federation.start_server(keep=True)
    federation.start_client("client-1", "--dp-epsilon", "8")
    federation.until(lambda: bool(rows(federation, "client-1")), "client-1 has opened its ledger")
    of_both = ["--server", federation.address, "--data", "demo:0/5", "--plan", "plan.toml", "--dp-epsilon", "8"]
    beside = client(federation, *of_both, "--name", "client-3", "--state", "another")
    assert (beside.returncode, "takes part with the same images" in beside.stderr) == (61, True), beside.stderr
    older = federation.home / "older"
    shutil.copytree(federation.home / "ledgers", older)
    federation.start_client("client-2")
    assert federation.processes["client-1"].wait(timeout=200) == 0, federation.log("client-1")
    told = json.loads(client(federation, "budget", "--state", "state/clients/client-1", "--json").stdout)
    assert 7.8 < told["spent"] <= told["epsilon"] == 8
    assert told["rounds_left"] == 0
    assert [release["event"]["round"] for release in told["releases"]] == [0, 1, 2]
    assert told["releases"][-1]["progress"] == "made"
    newest = federation.home / "newest"
    (federation.home / "ledgers").rename(newest)
    older.rename(federation.home / "ledgers")
    put_back = client(federation, *of_both, "--name", "client-1")
    assert (put_back.returncode, "an older copy" in put_back.stderr) == (73, True), put_back.stderr
    shutil.rmtree(federation.home / "ledgers")
    gone = client(federation, *of_both, "--name", "client-1")
    assert (gone.returncode, "not in the ledger of its images" in gone.stderr) == (73, True), gone.stderr
    shutil.rmtree(federation.home / "ledgers", ignore_errors=True)
    newest.rename(federation.home / "ledgers")
    anew = client(federation, *of_both, "--name", "client-3", "--state", "anew")
    assert (anew.returncode, "have spent epsilon" in anew.stderr) == (71, True), anew.stderr
