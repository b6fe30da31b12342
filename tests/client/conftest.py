"""A federation for the client to live in: the real coordinator, store and certificates; training without torch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfed_cli.in_process import InProcessApi
from pfed_client.agreement import agree
from pfed_client.local_model import Array, LocalModel
from pfed_client.observer import SilentObserver
from pfed_client.session import Session
from pfed_client.state import ClientState, model_owner
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.pki.countersignature import countersign
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan
from pfedsecure.wire.peer import Peer
from pfedsecure.wire.tensors import from_tensor
from pfedsecure.wire.v1.payload_pb2 import Tensor

SHAPE = (2, 3)
BACKBONE_DIGEST = "b" * 64


PLAIN = {"aggregation": "plain", "experts": "plain", "matching": "plain"}


def small_plan(**changes: Any) -> Plan:
    """Two clients, three rounds, one expert, nothing protected; `rounds__count=1` changes a field of a section."""
    rounds = {"count": 3, "minimum_cohort": 2, "heartbeat_seconds": 0.05, "deadline_seconds": 60}
    return _plan({"rounds": rounds, "protection": PLAIN}, changes)


def protected_plan(**changes: Any) -> Plan:
    """Three clients, two rounds, one expert, every protection. Whoever is silent for 30 s is gone, in this one."""
    return _plan({"rounds": {"count": 2, "heartbeat_seconds": 5, "deadline_seconds": 60}}, changes)


def _plan(sections: dict[str, dict[str, Any]], changes: dict[str, Any]) -> Plan:
    values: dict[str, Any] = {
        "class_names": ["cat", "dog"],
        "backbone": {"text_width": SHAPE[1]},
        "prompt": {"context_length": SHAPE[0]},
        "mixture": {"experts": 1},
        **{name: dict(section) for name, section in sections.items()},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return Plan.model_validate(values)


@dataclass(frozen=True)
class FixedReport:
    train_loss: float
    n_experts: int


@dataclass
class NumpyTrainer:
    """Trains by a fixed formula of name, round, start, gate and experts, in three steps. Knows what it was asked."""

    name: str
    n_train: int = 3
    trained: list[int] = field(default_factory=list)
    before_step: Callable[[int, int], None] = lambda round_number, step: None
    loss: float = 0.5
    shape: tuple[int, int] = SHAPE
    start: Array | None = None

    def initial_context(self) -> Array:
        return np.full(self.shape, 0.25, np.float32) if self.start is None else self.start

    def new_model(self) -> LocalModel:
        gate = {"W": self._noise("gate")}
        return LocalModel(self.initial_context(), gate, np.zeros((0, *self.shape), np.float32), trained_round=0)

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> tuple[LocalModel, FixedReport]:
        for step in range(1, 4):
            self.before_step(round_number, step)
            if on_step is not None:
                on_step(step, 3, self.loss)
        self.trained.append(round_number)
        gate = {"W": (0.5 * model.gate["W"] + self._noise("gate step", round_number)).astype(np.float32)}
        shift = self._noise("step", round_number) + 0.1 * gate["W"]
        context = (start + shift + 0.01 * experts.sum(axis=0) * np.float32(self.loss / 0.5)).astype(np.float32)
        return LocalModel(context, gate, experts, round_number, self.n_train), FixedReport(self.loss, len(experts))

    def lent(self, model: LocalModel) -> Array:
        return model.context

    def evaluate(self, model: LocalModel) -> float:
        return 1 / (1 + float(np.abs(model.context).sum()))

    def _noise(self, *purpose: Any) -> Array:
        seed = int.from_bytes(hashlib.sha256(repr((self.name, purpose)).encode()).digest()[:8], "big")
        return np.random.default_rng(seed).normal(0, 0.1, self.shape).astype(np.float32)


class Members:
    """Certificates of one federation, each made when it is first asked for; `pki` is the development authority."""

    def __init__(self, folder: Path) -> None:
        self.pki = folder / "dev"
        self._folder = folder
        self._identities: dict[str, Identity] = {}
        self.server = ensure_development_pki(self.pki)

    def identity(self, name: str) -> Identity:
        if name not in self._identities:
            self._identities[name] = enrol(self.pki, name, "client", self._folder / name)
        return self._identities[name]

    def peer(self, name: str) -> Peer:
        identity = self.identity(name)
        return Peer.from_certificate(identity.certificate, identity.authority, datetime.now(UTC))


class Around:
    """An api with some of its methods replaced."""

    def __init__(self, api: Any, **methods: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._api = api
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)


class Recorder(SilentObserver):
    """What an observer was told: `events` without the training steps, and the `reasons` of those that withdrew."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.reasons: list[str] = []

    def round_done(self, record: Any) -> None:
        self.events.append(("done", record.round))

    def left_out(self, round_number: int) -> None:
        self.events.append(("left out", round_number))

    def withdrew(self, round_number: int, reason: str) -> None:
        self.events.append(("withdrew", round_number))
        self.reasons.append(reason)

    def finished(self, accuracy: float) -> None:
        self.events.append(("finished", accuracy))


class Federation:
    """A coordinator in this process, and clients whose states are in `folder`/NAME."""

    def __init__(self, plan: Plan, folder: Path, members: Members) -> None:
        self.plan = plan
        self.folder = folder
        self.members = members
        self.store = SqlStore.open(folder / "server", plan)
        authority = members.server.authority
        self.matching_thread = ThreadPoolExecutor(max_workers=1)
        self.coordinator = Coordinator(
            plan,
            self.store,
            context_shape=SHAPE,
            authority=authority,
            sign=partial(countersign, members.server),
            executor=self.matching_thread,
        )

    def api(self, name: str) -> InProcessApi:
        return InProcessApi(self.coordinator, self.members.peer(name))

    async def run(
        self,
        name: str,
        *,
        api: Any = None,
        trainer: NumpyTrainer | None = None,
        observer: Any = None,
        folder: Path | None = None,
        share_metrics: bool = False,
        fetch_all: bool = False,
    ) -> float:
        """One session of client `name`, from the lock of its state directory to its release."""
        used = api or self.api(name)
        with ClientState(folder or self.folder / name) as state:
            state.claim(name)
            session = Session(
                used,
                await agree(used, state),
                state,
                trainer or NumpyTrainer(name),
                backbone_digest=BACKBONE_DIGEST,
                identity=self.members.identity(name),
                share_metrics=share_metrics,
                fetch_all=fetch_all,
                observer=observer,
            )
            return await asyncio.wait_for(session.run(), timeout=20)

    def model(self, name: str) -> LocalModel:
        """What client `name` keeps."""
        owner = model_owner(self.plan, BACKBONE_DIGEST)
        return LocalModel.load(self.folder / name / "model.safetensors", belongs_to=owner)

    def global_prompt(self) -> Array:
        """The newest."""
        return from_tensor(Tensor.FromString(self.store.global_prompt(10**6)), SHAPE, "the global prompt")


@pytest.fixture(scope="session")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory, members: Members) -> Callable[..., Any]:
    """`async with federation(plan) as it:`, a started `Federation` with states of its own."""

    @asynccontextmanager
    async def started(plan: Plan | None = None, own_members: Members | None = None) -> AsyncIterator[Federation]:
        it = Federation(plan or small_plan(), tmp_path_factory.mktemp("federation"), own_members or members)
        await it.coordinator.start()
        try:
            yield it
        finally:
            await it.coordinator.stop()
            it.matching_thread.shutdown()
            it.store.close()

    return started


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    return small_plan


@pytest.fixture(scope="session")
def make_protected_plan() -> Callable[..., Plan]:
    return protected_plan


@pytest.fixture(scope="session")
def make_trainer() -> type[NumpyTrainer]:
    return NumpyTrainer


@pytest.fixture(scope="session")
def around() -> type[Around]:
    return Around


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
