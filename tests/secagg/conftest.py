"""A whole round in one process, with real certificates, step by step so that a test can interfere anywhere."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity, install
from pfedsecure.pki.request import request
from pfedsecure.secagg import (
    Certificates,
    ClientRound,
    Credentials,
    Outcome,
    Parameters,
    RoundSetting,
    ServerRound,
    Step,
    Update,
    result,
)
from pfedsecure.wire.v1.secagg_pb2 import ClientRoundState

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PLAN, MODEL = "ab" * 32, "cd" * 32
UPDATE = Update(np.array([0.5, -0.5, 0.25, 0.0, 1.0], np.float32), 10)


class Consortium:
    """An authority and as many certified clients as a test asks for; `client(i)` is always the same."""

    now = NOW

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority", "hospitals", now=NOW)
        self.certificates = Certificates(self.authority.certificate)
        self._clients: dict[str, Credentials] = {}

    def enrol(self, name: str, role: str = "client", days: int = 10) -> Identity:
        folder = self.folder / f"{role}-{name}"
        csr = request(folder, name, role).read_bytes()
        certificate = self.authority.approve(csr, name=name, role=role, days=days, now=NOW)
        return install(folder, certificate, self.authority.certificate, now=NOW)

    def client(self, name: str, days: int = 10) -> Credentials:
        if name not in self._clients:
            self._clients[name] = Credentials.of(self.enrol(name, days=days))
        return self._clients[name]


@dataclass
class Round:
    """One round of `clients`, all of whom start from the same model. Each step takes who takes part in it."""

    consortium: Consortium
    setting: RoundSetting
    names: list[str]
    clients: dict[str, ClientRound] = field(default_factory=dict)
    states: dict[str, list[bytes]] = field(default_factory=dict)
    """Everything that each client saved, in order."""
    stored: dict[Step, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            self.states[name] = []
            self.clients[name] = ClientRound.begin(
                self.setting, self.consortium.client(name), self.consortium.certificates, save=self.states[name].append
            )

    @property
    def server(self) -> ServerRound:
        return ServerRound(self.setting, self.consortium.certificates, self.stored)

    def store(self, step: Step, replies: Mapping[str, bytes]) -> None:
        """Check every message as a server does when it arrives, then close the step."""
        arrived: dict[str, bytes] = {}
        for name, message in sorted(replies.items()):
            server = ServerRound(self.setting, self.consortium.certificates, {**self.stored, step: arrived})
            server.check(step, name, message, NOW)
            arrived[name] = message
        self.stored[step] = arrived

    def advertise(self) -> None:
        self.store(Step.ADVERTISE, {name: client.reply for name, client in self.clients.items()})

    def share(self, names: Iterable[str] | None = None) -> None:
        self._step(Step.SHARE, names, lambda name, request: self.clients[name].share(request, NOW))

    def mask(self, updates: Mapping[str, Update], names: Iterable[str] | None = None) -> None:
        self._step(Step.MASK, names, lambda name, request: self.clients[name].mask(request, updates[name]))

    def confirm(self, names: Iterable[str] | None = None) -> None:
        self._step(Step.CONFIRM, names, lambda name, request: self.clients[name].confirm(request))

    def unmask(self, names: Iterable[str] | None = None) -> None:
        self._step(Step.UNMASK, names, lambda name, request: self.clients[name].unmask(request))

    def run(
        self,
        updates: Mapping[str, Update],
        *,
        sharing: Iterable[str] | None = None,
        masking: Iterable[str] | None = None,
        confirming: Iterable[str] | None = None,
        unmasking: Iterable[str] | None = None,
    ) -> Outcome:
        """All five steps; the arguments say who is left in each."""
        self.advertise()
        self.share(sharing)
        self.mask(updates, masking)
        self.confirm(confirming)
        self.unmask(unmasking)
        return result(self.server)

    def before(self, step: Step) -> ClientRound:
        """c00 of a finished round as it was before `step`, SHARE to UNMASK. What it saves goes nowhere."""
        if step is Step.SHARE:
            client = copy.copy(self.clients["c00"])
            client._state = ClientRoundState.FromString(self.states["c00"][0])
            client._cohort = None
            client._save = lambda state: None
            return client
        return ClientRound.restore(
            self.states["c00"][step - 2],
            self.setting,
            self.consortium.client("c00"),
            self.consortium.certificates,
            now=NOW,
            save=lambda state: None,
        )

    @staticmethod
    def ask(client: ClientRound, step: Step, request: bytes) -> bytes:
        """A client's answer to whatever is sent to it for `step`."""
        match step:
            case Step.SHARE:
                return client.share(request, NOW)
            case Step.MASK:
                return client.mask(request, UPDATE)
            case Step.CONFIRM:
                return client.confirm(request)
            case _:
                return client.unmask(request)

    def _step(self, step: Step, names: Iterable[str] | None, answer: Callable[[str, bytes], bytes]) -> None:
        server = self.server
        chosen = server.expected(step) if names is None else sorted(names)
        self.store(step, {name: answer(name, server.request(step, name)) for name in chosen})


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="session")
def new_round(consortium: Consortium) -> Callable[..., Round]:
    """Makes a round of so many clients, c00, c01 and so on; keywords change parameters and setting."""

    def make(
        clients: int, *, number: int = 7, model: str = MODEL, names: list[str] | None = None, **parameters: object
    ) -> Round:
        chosen = Parameters(**{"values": 5, "clip": 1.0, "max_weight": 1000, "precision": 1e-3} | parameters)
        setting = RoundSetting("0f" * 16, number, PLAN, model, chosen)
        return Round(consortium, setting, names or [f"c{index:02d}" for index in range(clients)])

    return make


@pytest.fixture(scope="session")
def update_of() -> Callable[..., Update]:
    """An update whose numbers are known from its seed."""

    def make(seed: int, length: int = 5, metrics: Mapping[str, float] | None = None) -> Update:
        generator = np.random.default_rng(seed)
        values = generator.uniform(-1, 1, length).astype(np.float32)
        return Update(values, int(generator.integers(1, 1000)), metrics)

    return make


@pytest.fixture(scope="session")
def attacker() -> ModuleType:
    """attacker.py; these tests are no package that could import it."""
    spec = importlib.util.spec_from_file_location("secagg_attacker", Path(__file__).with_name("attacker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def done(new_round: Callable[..., Round]) -> Round:
    """A finished round of four, each client with everything that it saved. Not to be changed."""
    this = new_round(4)
    this.run(dict.fromkeys(this.names, UPDATE))
    return this
