from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity, install
from pfedsecure.pki.names import Role
from pfedsecure.pki.request import request

Enrol = Callable[..., Identity]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "hospitals")


@pytest.fixture
def enrolled(tmp_path: Path) -> Enrol:
    """Takes a party through request, approval and installation, as two people would."""

    def enrol(
        authority: Authority,
        name: str,
        role: Role = "client",
        hosts: Sequence[str] = (),
        days: int = 10,
        now: datetime | None = None,
    ) -> Identity:
        folder = tmp_path / f"{authority.folder.name}-{name}"
        csr = request(folder, name, role, hosts).read_bytes()
        certificate = authority.approve(csr, name=name, role=role, days=days, hosts=hosts, now=now)
        return install(folder, certificate, authority.certificate, now=now)

    return enrol
