"""`pfed demo` as a user runs it: processes, mutual TLS, files on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEMO = [sys.executable, "-m", "pfed_cli.main", "demo"]
CLIENTS = [f"client-{number}" for number in range(1, 6)]


def demo(folder: Path, *options: str) -> dict[str, Any]:
    arguments = [*DEMO, "--rounds", "2", "--out", "run", *options]
    result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "round 2 of 2: mean accuracy" in result.stdout
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_bytes())
    return summary


def comparable(summary: dict[str, Any]) -> dict[str, Any]:
    """What the seed decides."""
    return {key: value for key, value in summary.items() if key not in ("seconds", "bytes")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    return demo(folder)


def test_the_summary_has_the_agreed_form(summary: dict[str, Any]) -> None:
    columns = ["zero_shot", "local", "promptfl", "gate_only", "pfedmoap"]

    assert list(summary["clients"]) == CLIENTS
    assert all(list(scores) == columns for scores in [*summary["clients"].values(), summary["mean"]])
    assert all(0 < score <= 1 for scores in summary["clients"].values() for score in scores.values())
    for column in columns:
        scores = [scores[column] for scores in summary["clients"].values()]
        assert summary["mean"][column] == pytest.approx(sum(scores) / 5)
    assert summary["rounds"] == 2
    assert summary["transport"] == "mtls"
    assert summary["protections"] == {"aggregation": "secure", "experts": "sealed", "matching": "he"}
    assert 0 < summary["seconds"] < 500


def test_the_command_simulate_comes_to_the_same(summary: dict[str, Any], folder: Path) -> None:
    """With the demo's plan and nothing else but how many clients there are."""
    arguments = [sys.executable, "-m", "pfed_cli.main", "simulate", "--plan", "run/plan.toml", "--clients", "5"]
    result = subprocess.run(
        [*arguments, "--json", "simulated.json"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    simulated = json.loads((folder / "simulated.json").read_bytes())["clients"]

    over_the_network = {name: scores["pfedmoap"] for name, scores in summary["clients"].items()}
    assert {name: client["accuracy"] for name, client in simulated.items()} == over_the_network


def test_processes_and_simulation_agree_to_the_last_bit(summary: dict[str, Any], folder: Path) -> None:
    import torch

    from pfed_cli.demo.baselines import compare
    from pfed_cli.demo.layout import Layout, demo_clients
    from pfedsecure.plan import Plan

    torch.set_num_threads(1)
    layout = Layout(folder / "run")
    plan = Plan.from_toml(layout.plan_file)
    comparison = compare(layout, plan, demo_clients(5, plan.seed))

    over_the_network = {name: scores["pfedmoap"] for name, scores in summary["clients"].items()}
    assert over_the_network == comparison.in_process.accuracies
    assert summary["same_in_process"] is True
    totals = dict.fromkeys(("bytes_up", "bytes_down"), (0, 0))
    for name, client in comparison.in_process.clients.items():
        lines = (layout.client_state(name) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [(r["test_accuracy"], r["train_loss"]) for r in records] == [
            (r.test_accuracy, r.train_loss) for r in client.rounds
        ]
        for field, (sent, expected) in totals.items():
            sent += sum(record[field] for record in records)
            totals[field] = sent, expected + sum(getattr(record, field) for record in client.rounds)
    # Signatures and certificates are a few bytes longer or shorter from one time to the next, and which client is asked
    # to set up matching is a matter of who asks first: that it is one client shows in the total.
    for sent, expected in totals.values():
        assert sent == pytest.approx(expected, rel=0.02)


def test_the_report_is_there_and_clients_kept_their_secrets(summary: dict[str, Any], folder: Path) -> None:
    report = (folder / "run" / "report.html").read_text()

    assert all(name in report for name in CLIENTS)
    assert f"{100 * summary['mean']['pfedmoap']:.1f}" in report
    for name in CLIENTS:
        key = folder / "run" / "clients" / name / "identity" / "identity.key"
        assert key.stat().st_mode & 0o777 == 0o600


def test_the_same_seed_gives_the_same_summary(summary: dict[str, Any], folder: Path) -> None:
    again = demo(folder)

    assert comparable(again) == comparable(summary)


def test_a_finished_demo_can_be_gone_on_with(summary: dict[str, Any], folder: Path) -> None:
    before = json.loads((folder / "run" / "summary.json").read_bytes())  # whichever test made that run
    again = demo(folder, "--keep")

    assert again | {"seconds": 0} == before | {"seconds": 0}


def descendants(pid: int) -> set[int]:
    children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*(descendants(child) for child in children))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nobody_behind(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # inherited as ignored from a background shell
    )
    until = time.monotonic() + 120
    while len(children := descendants(process.pid)) < 6:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 128 + number
    assert b"Traceback" not in said
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]


def test_one_failing_client_is_one_line_and_the_end(tmp_path: Path) -> None:
    state = tmp_path / "run" / "clients" / "client-3"
    state.mkdir(parents=True)
    (state / "client.json").write_text("no JSON")

    result = subprocess.run(
        [*DEMO, "--out", "run", "--keep"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 60
    (line,) = result.stderr.splitlines()
    assert "client-3 ended with status 60: pfed-client: error:" in line
    assert "damaged (not JSON)" in line
    assert str(tmp_path / "run" / "logs" / "client-3.log") in line
