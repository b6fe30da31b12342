from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
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
        kit = authority.admit(csr, name=name, role=role, days=days, hosts=hosts, now=now)
        return install_kit(folder, kit, now=now)

    return enrol
