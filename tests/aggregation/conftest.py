"""Clients certified by a real authority, and rounds of secure aggregation played without a transport."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pfedsecure.aggregation.factory import client_aggregation, server_aggregation
from pfedsecure.aggregation.interface import (
    Aggregate,
    ClientAggregationRound,
    Contribution,
    RoundIdentity,
    ServerAggregationRound,
)
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity, install
from pfedsecure.pki.request import KEY_FILE, request
from pfedsecure.plan import Plan

SHAPE = (2, 3)
NOW = datetime(2030, 1, 1, tzinfo=UTC)
ROUND = RoundIdentity("0f" * 16, 7, "ab" * 32)


class Hospitals:
    """An authority and as many certified clients as a test asks for; the same name is always the same client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.authority = Authority.create(folder / "authority", "hospitals", now=NOW)
        self._clients: dict[str, Identity] = {}

    def client(self, name: str) -> Identity:
        if name not in self._clients:
            folder = self._folder / name
            csr = request(folder, name, "client").read_bytes()
            self._clients[name] = self._installed(csr, name, folder)
        return self._clients[name]

    def clone(self, name: str, of: str) -> Identity:
        """A second name for the key of a client."""
        key, folder = self.client(of).folder / KEY_FILE, self._folder / name
        folder.mkdir(mode=0o700)
        shutil.copy(key, folder / KEY_FILE)
        return self._installed((key.parent / "identity.csr").read_bytes(), name, folder)

    def _installed(self, csr: bytes, name: str, folder: Path) -> Identity:
        certificate = self.authority.approve(csr, name=name, role="client", days=30, now=NOW)
        return install(folder, certificate, self.authority.certificate, now=NOW)


@dataclass
class SecureRound:
    """One round of the clients that `contributions` names. A test can stop between steps and change what is stored."""

    hospitals: Hospitals
    plan: Plan
    contributions: Mapping[str, Contribution]
    identity: RoundIdentity = ROUND
    clients: dict[str, ClientAggregationRound] = field(default_factory=dict)
    saved: dict[str, list[bytes]] = field(default_factory=dict)
    """What each client was told to keep, in order."""
    stored: dict[int, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.aggregation = server_aggregation(self.plan, SHAPE, self.hospitals.authority.certificate)
        for name, contribution in self.contributions.items():
            self.saved[name] = []
            side = client_aggregation(self.plan, SHAPE, self.hospitals.client(name))
            self.clients[name] = side.begin(self.identity, contribution, self.saved[name].append)

    @property
    def server(self) -> ServerAggregationRound:
        """Made anew, as after a restart."""
        return self.aggregation.round(self.identity, self.stored)

    def step(self, step: int, *, without: Collection[str] = ()) -> None:
        """One step of everybody who had a part in the last one, but for `without`."""
        before = self.stored[step - 1] if step > 1 else self.contributions
        self.stored[step] = {}
        for name in sorted(set(before) - set(without)):
            client = self.clients[name]
            if step > 1:
                client.answer(self.server.request(step, name), NOW)
            self.accept(step, name, client.message)
        assert self.server.ready(step)

    def accept(self, step: int, name: str, message: bytes) -> None:
        """What a server does with a message that arrives."""
        self.server.check(step, name, message, NOW)
        self.stored[step][name] = message

    def run(self, *, without: Mapping[int, Collection[str]] | None = None) -> Aggregate:
        """All five steps; `without` says who is silent from which step on."""
        for step in range(1, 6):
            self.step(step, without=(without or {}).get(step, ()))
        return self.server.result()


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    return Hospitals(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture(scope="session")
def secure_plan() -> Callable[..., Plan]:
    """A plan with clip 1 and precision 1e-3; further arguments go into its [secure_aggregation]."""

    def make(
        *, seed: int = 1, metrics: bool = False, minimum_cohort: int = 3, max_norm: float = 100.0, **secure: Any
    ) -> Plan:
        return Plan.model_validate(
            {
                "seed": seed,
                "class_names": ["cat", "dog"],
                "prompt": {"max_norm": max_norm},
                "protection": {"metrics": metrics},
                "rounds": {"minimum_cohort": minimum_cohort},
                "secure_aggregation": {"clip": 1.0, "precision": 1e-3, **secure},
            }
        )

    return make


@pytest.fixture(scope="session")
def secure_round(hospitals: Hospitals) -> Callable[..., SecureRound]:
    """`secure_round(plan, contributions)`: a round that is about to begin."""
    return lambda plan, contributions, **changes: SecureRound(hospitals, plan, contributions, **changes)
