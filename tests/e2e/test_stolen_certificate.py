"""The drill of docs/pki.md with real processes, and a renewal, while the federation runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedsecure.errors import IdentityError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def pki(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pfed_cli.main", "pki", *arguments]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def enrol(home: Path, name: str, *options: str) -> None:
    pki(home, "request", name, "--name", name, *options)
    approve(home, f"{name}/identity.csr", *(options[:2] if options else ()))
    pki(home, "install", f"{name}.kit.json", name, "--yes")


def approve(home: Path, request: str, *options: str) -> None:
    pki(home, "approve", request, "--authority", "authority", "--yes", *options)


def test_a_stolen_certificate_and_a_renewal_under_way(make_federation: Callable) -> None:
    federation = make_federation(4, minimum=3, heartbeat=1, rounds=20, deadline=30, step=10)
    home = federation.home
    pki(home, "init", "authority", "--federation", "e2e")
    enrol(home, "server", "--role", "server", "--host", "127.0.0.1")
    for name in federation.names:
        enrol(home, name)
    pki(home, "revoke", "--authority", "authority")
    federation.start_server("--identity", "server", "--crl", "revoked.crl")
    for name in federation.names:
        federation.start_client(name, "--identity", name)
    federation.until(lambda: "round 2 closed" in federation.log("server"), "experts are in the pool")

    pki(home, "renew", "client-1")
    approve(home, "client-1/renewal.csr")
    pki(home, "install", "client-1.kit.json", "client-1", "--yes")
    federation.until(lambda: "certificate renewed" in federation.log("client-1"), "client-1 has its new certificate")

    pki(home, "revoke", "client-4", "--authority", "authority", "--kits", "kits", "--crl", "newer.crl")
    (home / "newer.crl").replace(home / "revoked.crl")
    assert federation.processes["client-4"].wait(timeout=60) == IdentityError.exit_code
    (line,) = [line for line in federation.log("client-4").splitlines() if "error" in line]
    assert line.startswith("pfed-client: error: the certificate of client client-4 was revoked: ask the federation's")
    federation.until(lambda: "client-4 is a member no longer" in federation.log("server"), "client-4 is out")
    assert federation.query("SELECT member FROM pool WHERE member = 'client-4'") == []
    del federation.processes["client-4"]
    for name in federation.names[:3]:
        pki(home, "install", f"kits/{name}.kit.json", name, "--yes")
    federation.finish()

    assert dict(federation.query("SELECT member, epoch FROM pool")) == {f"client-{n}": 2 for n in (1, 2, 3)}
    assert "Traceback" not in "".join(federation.log(name) for name in ("server", *federation.names))
