"""A federation to drive by hand: the real coordinator on a real store, real certificates, and a clock that waits."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1.health_pb2_grpc import HealthStub

from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfed_server.store import Store
from pfedsecure.aggregation.interface import Contribution, RoundIdentity
from pfedsecure.aggregation.plain import PlainClientAggregation
from pfedsecure.console import Address
from pfedsecure.experts.claim import Claim, make_claim
from pfedsecure.experts.plain import read_expert, write_expert
from pfedsecure.experts.sealed import Belonging, SealedExperts
from pfedsecure.matching.interface import ClientMatching
from pfedsecure.matching.lot import LotClientMatching
from pfedsecure.matching.plain import PlainClientMatching
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.names import Role
from pfedsecure.pki.request import REQUEST_FILE
from pfedsecure.plan import Plan
from pfedsecure.wire.options import CHANNEL_OPTIONS
from pfedsecure.wire.peer import Peer
from pfedsecure.wire.tensors import from_tensor
from pfedsecure.wire.tls import channel_credentials
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.federation_pb2_grpc import FederationStub
from pfedsecure.wire.v1.operations_pb2_grpc import OperationsStub
from pfedsecure.wire.v1.payload_pb2 import Publication, Tensor
from pfedsecure.wire.v1.round_pb2_grpc import RoundStub

SHAPE = (2, 3)
SECRET = bytes(range(32))
"""What the clients of these tests share in every epoch."""


def plain_contribution(context: np.ndarray, weight: int) -> bytes:
    """What a client sends when aggregation is plain."""
    aggregation = PlainClientAggregation()
    return aggregation.begin(RoundIdentity("", 1, ""), Contribution(context, weight), lambda saved: None).message


class FakeClock:
    """Time that passes only in `advance`."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def now(self) -> float:
        return 1.7e9 + self._elapsed

    def monotonic(self) -> float:
        return self._elapsed

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        rung = asyncio.Event()
        if seconds is not None:
            self._sleepers.append((self._elapsed + seconds, rung))
        waits = [asyncio.create_task(event.wait()), asyncio.create_task(rung.wait())]
        try:
            self._ring()
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def advance(self, seconds: float) -> None:
        self._elapsed += seconds
        self._ring()

    def _ring(self) -> None:
        for due, rung in self._sleepers:
            if due <= self._elapsed:
                rung.set()
        self._sleepers = [sleeper for sleeper in self._sleepers if not sleeper[1].is_set()]


class Members:
    """Certificates of one federation, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._identities: dict[tuple[str, Role, int], Identity] = {}
        self.server = ensure_development_pki(folder / "pki")

    def identity(self, name: str, role: Role = "client", *, key: int = 0) -> Identity:
        who = (name, role, key)
        if who not in self._identities:
            self._identities[who] = enrol(self._folder / "pki", name, role, self._folder / f"{name}-{role}-{key}")
        return self._identities[who]

    def clone(self, name: str, *, of: str) -> None:
        """A second name for the key of a client."""
        if (name, "client", 0) not in self._identities:
            key, folder = self.identity(of).folder, self._folder / f"{name}-client-0"
            shutil.copytree(key, folder)
            kit = Authority.load(self._folder / "pki" / "authority").admit(
                (key / REQUEST_FILE).read_bytes(), name=name, role="client", days=30
            )
            self._identities[name, "client", 0] = install_kit(folder, kit)

    def pseudonym(self, name: str) -> str:
        return Author.load(self.identity(name).folder).pseudonym

    def claim(self, name: str, federation_id: str, *, author: str = "") -> Claim:
        """What a client proves its pseudonym with; `author`: that of another's certificate and key."""
        signing = Author.load(self.identity(author or name).folder)
        return make_claim(signing, federation_id, self.identity(name).subject.fingerprint)

    def channel_credentials(self, name: str) -> grpc.ChannelCredentials:
        return channel_credentials(self.identity(name))

    def peer(self, name: str, role: Role = "client", *, key: int = 0) -> Peer:
        identity = self.identity(name, role, key=key)
        return Peer.from_certificate(identity.certificate, identity.authority, datetime.now(UTC))


class Stubs:
    """A caller's own connection to a server; `raw` is the channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.raw = channel
        self.federation = FederationStub(channel)
        self.round = RoundStub(channel)
        self.operations = OperationsStub(channel)
        self.health = HealthStub(channel)


@asynccontextmanager
async def connected(address: Address, identity: Identity) -> AsyncIterator[Stubs]:
    async with grpc.aio.secure_channel(str(address), channel_credentials(identity), CHANNEL_OPTIONS) as channel:
        yield Stubs(channel)


class Driver:
    """Clients of one coordinator, played by hand."""

    def __init__(self, coordinator: Coordinator, plan: Plan, clock: FakeClock, members: Members) -> None:
        self.coordinator = coordinator
        self.plan = plan
        self.clock = clock
        self.members = members

    async def join(self, *names: str, instance: str = "1", digest: str | None = None, key: int = 0) -> None:
        for name in names:
            claim = self.claim(name) if self.plan.sealed_experts else Claim()
            request = fed.JoinRequest(
                plan_digest=digest or self.plan.digest(),
                instance_id=instance,
                author_certificate=claim.certificate,
                author_signature=claim.signature,
            )
            await self.coordinator.join(self.members.peer(name, key=key), request)

    @property
    def federation_id(self) -> str:
        return self.coordinator._federation.state.federation_id

    def claim(self, name: str, *, author: str = "") -> Claim:
        """As `Members.claim`, for this federation."""
        return self.members.claim(name, self.federation_id, author=author)

    async def view(self, name: str, *, seen: int = 0, wait: float = 0, instance: str = "1") -> fed.FederationView:
        request = fed.AwaitRequest(instance_id=instance, seen_version=seen, wait_seconds=wait)
        return await self.coordinator.await_view(self.members.peer(name), request)

    async def until(self, name: str, condition: Callable[[fed.FederationView], bool]) -> fed.FederationView:
        """The first view that fulfils a condition; the test fails when none comes."""

        async def wait() -> fed.FederationView:
            while not condition(view := await self.view(name)):
                await asyncio.sleep(0.002)
            return view

        return await asyncio.wait_for(wait(), timeout=10)

    async def until_round(self, name: str, number: int) -> fed.FederationView:
        return await self.until(
            name, lambda view: view.round == number and view.phase == fed.FEDERATION_PHASE_ROUND_OPEN
        )

    async def settled(self, name: str) -> int:
        """The version once the coordinator has nothing left to do but wait."""
        version = -1
        while version != (version := (await self.view(name)).version):
            await asyncio.sleep(0.05)
        return version

    async def submit(self, name: str, number: int, context: np.ndarray, weight: int = 1) -> rnd.Receipt:
        content = self.contribution(context, weight)
        return await self.coordinator.submit_step(self.members.peer(name), number, 1, content)

    async def publish(self, name: str, number: int, context: np.ndarray) -> rnd.Receipt:
        return await self.coordinator.publish_expert(self.members.peer(name), number, self.publication(context))

    async def publish_sealed(
        self, name: str, number: int, context: np.ndarray, *, epoch: int = 1, expert_id: str = ""
    ) -> rnd.Receipt:
        """As `publish`, in an envelope of the cohort's secret of an epoch; `expert_id`: of another author."""
        content = self.envelope(name, number, context, epoch=epoch, expert_id=expert_id)
        return await self.coordinator.publish_expert(self.members.peer(name), number, content)

    async def work(self, name: str, number: int, context: np.ndarray, weight: int = 1) -> None:
        await self.submit(name, number, context, weight)
        await self.publish(name, number, context)

    async def global_prompt(self, name: str, number: int = 0) -> np.ndarray | None:
        data = await self.coordinator.get_global_prompt(self.members.peer(name), number)
        return from_tensor(Tensor.FromString(data), SHAPE, "prompt") if data else None

    async def nearest(self, name: str, number: int, context: np.ndarray, k: int) -> list[str]:
        matching = self._matching()
        query = matching.query(context.astype(np.float32), number, number)
        request = rnd.MatchRequest(round=number, query=query, experts=k)
        answer = await self.coordinator.match(self.members.peer(name), request)
        return [candidate.expert_id for candidate in matching.rank(answer, k)]

    def _matching(self) -> ClientMatching:
        return LotClientMatching() if self.plan.protection.matching == "random" else PlainClientMatching()

    async def experts(self, name: str, number: int, ids: list[str]) -> list[np.ndarray]:
        experts = await self.coordinator.get_experts(self.members.peer(name), number, ids)
        assert list(experts) == ids
        return [read_expert(data, SHAPE, math.inf, "expert") for data in experts.values()]

    def contribution(self, context: np.ndarray, weight: int = 1) -> bytes:
        return plain_contribution(context.astype(np.float32), weight)

    def publication(self, context: np.ndarray) -> bytes:
        context = context.astype(np.float32)
        sketch = self._matching().sketch(context, 1)
        return Publication(expert=write_expert(context), sketch=sketch).SerializeToString()

    def envelope(self, name: str, number: int, context: np.ndarray, *, epoch: int = 1, expert_id: str = "") -> bytes:
        """A publication that only the clients can open."""
        identity = self.members.identity(name)
        author = Author.load(identity.folder)
        if expert_id:
            author = replace(author, pseudonym=expert_id)
        secrets = CohortSecrets.of({epoch: SECRET})
        belonging = Belonging("id", self.plan.digest(), identity.authority)
        seen, now = Mock(), partial(datetime.now, UTC)
        experts = SealedExperts(SHAPE, 100.0, belonging, author, lambda: secrets, seen, now)
        return Publication(expert=experts.pack(context.astype(np.float32), number)).SerializeToString()


@pytest.fixture(scope="session")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="session")
def contribute() -> Callable[[np.ndarray, int], bytes]:
    """What a client sends of a context and a weight when aggregation is plain."""
    return plain_contribution


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """A plan of three rounds and two experts for contexts of shape (2, 3), all in the clear.

    `protection` adds to what [protection] says, further arguments to what [rounds] says.
    """

    def make(
        experts: int = 2,
        seed: int = 1,
        protection: Mapping[str, Any] | None = None,
        secure_aggregation: Mapping[str, Any] | None = None,
        **rounds: Any,
    ) -> Plan:
        return Plan.model_validate(
            {
                "name": "test",
                "seed": seed,
                "class_names": ["cat", "dog"],
                "backbone": {"text_width": SHAPE[1]},
                "prompt": {"context_length": SHAPE[0]},
                "mixture": {"experts": experts},
                "protection": {"aggregation": "plain", "experts": "plain", "matching": "plain", **(protection or {})},
                "secure_aggregation": secure_aggregation or {},
                "rounds": {"count": 3, "minimum_cohort": 2, "deadline_seconds": 60, "heartbeat_seconds": 2, **rounds},
            }
        )

    return make


@pytest.fixture
def drive(clock: FakeClock, members: Members) -> Callable[..., Any]:
    """`async with drive(plan[, store]) as driver`: a coordinator that runs, and its clients."""

    @asynccontextmanager
    async def running(plan: Plan, store: Store | None = None) -> AsyncIterator[Driver]:
        used = store or SqlStore.in_memory(plan)
        authority = members.server.authority
        coordinator = Coordinator(plan, used, context_shape=SHAPE, authority=authority, clock=clock)
        await coordinator.start()
        try:
            yield Driver(coordinator, plan, clock, members)
        finally:
            await coordinator.stop()
            if store is None:
                used.close()

    return running


@pytest.fixture
def connect() -> Callable[..., Any]:
    """`async with connect(address, identity) as stubs`: mutual TLS to a server."""
    return connected
