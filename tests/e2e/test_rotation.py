"""A consortium with an authority of its own changes the cohort's secret while its federation runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def pki(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pfed_cli.main", "pki", *arguments]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def enrol(home: Path, name: str, *options: str) -> None:
    pki(home, "request", name, "--name", name, *options)
    role = options[options.index("--role") + 1] if "--role" in options else "client"
    pki(home, "approve", f"{name}/identity.csr", "--authority", "authority", "--role", role, "--yes")
    pki(home, "install", f"{name}.kit.json", name, "--yes")


def test_rotation_under_way_loses_no_expert_and_shuts_a_member_out(make_federation: Callable) -> None:
    federation = make_federation(4, minimum=3, heartbeat=1, rounds=20, deadline=30, step=10)  # longer than kits take
    home = federation.home
    pki(home, "init", "authority", "--federation", "e2e")
    enrol(home, "server", "--role", "server", "--host", "127.0.0.1")
    for name in federation.names:
        enrol(home, name)
    federation.start_server("--identity", "server")
    for name in federation.names:
        federation.start_client(name, "--identity", name)
    federation.until(lambda: "round 2 closed" in federation.log("server"), "experts are in the pool")

    assert "client-4" in pki(home, "rotate", "authority", "--kits", "kits", "--without", "client-4")
    staying = federation.names[:3]
    assert sorted(path.name for path in (home / "kits").iterdir()) == [f"{name}.kit.json" for name in staying]
    for name in staying:
        pki(home, "install", f"kits/{name}.kit.json", name, "--yes")
    federation.finish()

    pool = dict(federation.query("SELECT member, epoch FROM pool"))
    assert pool == {"client-1": 2, "client-2": 2, "client-3": 2, "client-4": 1}
    # Sketches are compared with those of their own epoch: who has the new secret borrows from the two others that have
    # it, and client-4, alone with the old one, from nobody.
    for name, borrowed in (*((name, 2) for name in staying), ("client-4", 0)):
        line = (home / "state/clients" / name / "metrics.jsonl").read_text().splitlines()[-1]
        assert f'"n_experts": {borrowed}' in line
