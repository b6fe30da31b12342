"""A whole federation in one process: the server's coordinator and the clients' sessions, the code of the real thing.

What is left out is the network and time. Messages are handed over instead of sent, callers are known by certificates of
an authority made for the occasion, the clock stands still, so that no deadline passes and nobody falls silent, and
unless other workers are given one thread trains one client after the other. The same plan, data and backbone therefore
give the same result on a machine, and the same as separate processes give that use as many threads each.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean

from pfed_cli.in_process import InProcessApi
from pfed_cli.simulate.workers import SideBySide, Workers
from pfed_client.agreement import agree
from pfed_client.frozen_prompts import FrozenPrompts
from pfed_client.ledger.account import Account
from pfed_client.local_model import LocalModel
from pfed_client.metrics import RoundRecord
from pfed_client.observer import Observer, SilentObserver
from pfed_client.privacy import Privacy, privacy
from pfed_client.session import Session
from pfed_client.state import ClientState, Settings, model_owner
from pfed_client.trainer import Trainer
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.errors import PlanError
from pfedsecure.pki.countersignature import countersign
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.plan import Plan
from pfedsecure.wire.peer import Peer

_KEPT_BYTES = 2**30
"""Of text features."""
_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - what is put there is made by tempfile, for this user alone


@dataclass(frozen=True)
class SimulatedClient:
    """One client: its certificate's name and the features of its own images."""

    name: str
    train: FeatureSet
    test: FeatureSet


@dataclass(frozen=True)
class ClientResult:
    """What a federation came to for one client. `accuracy` of the final model on the own test images, in [0, 1]."""

    accuracy: float
    rounds: tuple[RoundRecord, ...]
    model: LocalModel
    borrowed: Mapping[int, tuple[str, ...]]
    """By round: the owners of the experts that it used, nearest first."""
    privacy: str | None = None
    """What it promised, in words, where it did."""


@dataclass(frozen=True)
class SimulationResult:
    """All clients by name, in the order in which they were given; `seconds` of wall-clock time."""

    clients: Mapping[str, ClientResult]
    seconds: float

    @property
    def accuracies(self) -> dict[str, float]:
        """Final accuracy by client."""
        return {name: client.accuracy for name, client in self.clients.items()}

    @property
    def mean_accuracy(self) -> float:
        """Unweighted mean over the clients."""
        return fmean(self.accuracies.values())


Prepare = Callable[[SimulatedClient, ClientState], tuple[Trainer, Privacy | None]]
"""What a client trains with, and what it promised where it did: made once, before it joins, in its own state, which is
pinned to the federation, if there is one."""


def with_privacy(plan: Plan, backbone: Backbone, epsilon: float, delta: float | None = None) -> Prepare:
    """Clients started with `--dp-epsilon`, and `--dp-delta` unless that is None.

    Each solves for its own noise, and pays for every round out of a budget in its state, as `pfed-client` does. Raises
    BudgetTooSmall when it is called.
    """
    from pfed_client.private_trainer import PrivateTrainer  # Opacus takes seconds to load

    def prepare(client: SimulatedClient, state: ClientState) -> tuple[Trainer, Privacy | None]:
        settings = Settings.of(client.name, dp_epsilon=epsilon, dp_delta=delta)
        images = [sha256(client.name.encode()).digest()]  # features are all that there is of them
        account = Account(
            state.folder / "ledgers", images, federation=state.record.federation_id or "", client=client.name
        )
        made = privacy(state, settings, plan, len(client.train), account)
        assert made is not None  # an epsilon was asked for
        trainer = PrivateTrainer(plan, backbone, client.train, client.test, name=client.name, promise=made.promise)
        return trainer, made

    return prepare


def without_privacy(plan: Plan, backbone: Backbone, clients: int = 0) -> Prepare:
    """Clients that promise nothing. What is known of frozen prompts is kept of as many as `clients` lend each other."""
    frozen = FrozenPrompts(plan, backbone, kept_prompts(plan, clients))

    def prepare(client: SimulatedClient, state: ClientState) -> tuple[Trainer, Privacy | None]:
        return Trainer(plan, backbone, client.train, client.test, name=client.name, frozen=frozen), None

    return prepare


def kept_prompts(plan: Plan, clients: int) -> int:
    """Those of the round before and of this one, but no more than fit into a part of the memory."""
    width = 4 * 1024 * len(plan.class_names)  # bytes, of the widest CLIP
    return max(plan.n_experts + 1, min(2 * clients, _KEPT_BYTES // width))


class StandingClock:
    """A clock that stands still. Waiting ends with the event only."""

    def now(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        await event.wait()


def simulate(
    plan: Plan,
    clients: Sequence[SimulatedClient],
    backbone: Backbone,
    prepare: Prepare | None = None,
    *,
    workers: Workers | None = None,
    observer: Observer | None = None,
) -> SimulationResult:
    """Run the federation of `plan` among `clients` from the first round to the last.

    `prepare` says what they train with; by default without differential privacy. `workers`: where they train; by
    default in one thread. `observer` is told of all clients alike.

    Raises PlanError unless the plan waits for all of them before the first round: who takes part in it would be left
    to chance. Otherwise as a real server or client would.
    """
    if plan.rounds.clients_to_start != len(clients):
        raise PlanError(
            f"a simulation of {len(clients)} clients needs rounds.start_clients = {len(clients)}, "
            f"not {plan.rounds.clients_to_start}"
        )
    started = time.monotonic()
    with _scratch_folder() as folder:
        federation = _Federation(
            plan,
            backbone,
            folder,
            prepare or without_privacy(plan, backbone, len(clients)),
            workers or SideBySide(),
            observer or SilentObserver(),
        )
        results = asyncio.run(federation.run(clients))
    return SimulationResult(results, time.monotonic() - started)


def train_alone(
    plan: Plan, clients: Sequence[SimulatedClient], backbone: Backbone, prepare: Prepare | None = None
) -> dict[str, float]:
    """Final accuracy by client when each trains for itself: as many steps as in the federation of `plan`.

    Every round starts from the client's own newest prompt. With method `promptfl` a prompt is trained, with K = 0 a
    gate too; with experts, which nobody lends, it makes no sense. `prepare` as in `simulate`.
    """
    prepare = prepare or without_privacy(plan, backbone)
    accuracies = {}
    with _scratch_folder() as folder:
        for client in clients:
            with ClientState(folder / client.name) as state:
                state.claim(client.name)
                trainer, promised = prepare(client, state)
                model = trainer.new_model()
                for round_number in range(1, plan.rounds.count + 1):
                    paid = None if promised is None else promised.budget.reserve(promised.promise.event(round_number))
                    model, _ = trainer.train_round(model, model.context, model.experts, round_number)
                    if paid is not None:
                        paid.commit()
            accuracies[client.name] = trainer.evaluate(model)
    return accuracies


@dataclass(frozen=True)
class _Outcome:
    """What a client knows in the end: `fetched` holds pseudonyms."""

    accuracy: float
    rounds: tuple[RoundRecord, ...]
    model: LocalModel
    fetched: Mapping[int, tuple[str, ...]]
    privacy: str | None

    def result(self, owner: Mapping[str, str]) -> ClientResult:
        """With the names behind the pseudonyms, as `owner` has them."""
        borrowed = {number: tuple(owner[expert_id] for expert_id in ids) for number, ids in self.fetched.items()}
        return ClientResult(self.accuracy, self.rounds, self.model, borrowed, self.privacy)


class _Federation:
    """One simulation under way."""

    def __init__(
        self, plan: Plan, backbone: Backbone, folder: Path, prepare: Prepare, workers: Workers, observer: Observer
    ) -> None:
        self._plan = plan
        self._prepare = prepare
        self._workers = workers
        self._observer = observer
        self._backbone = backbone
        self._folder = folder
        self._store = SqlStore.in_memory(plan)
        self._matching_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encrypted matching")
        server = ensure_development_pki(folder / "pki")
        self._coordinator = Coordinator(
            plan,
            self._store,
            context_shape=(plan.prompt.context_length, backbone.tower.width),
            authority=server.authority,
            sign=partial(countersign, server),
            clock=StandingClock(),
            executor=self._matching_thread,
        )

    async def run(self, clients: Sequence[SimulatedClient]) -> dict[str, ClientResult]:
        try:
            tasks = await self._run(clients)
            owner = {member.expert_id: member.name for member in self._store.load().members.values()}
        finally:
            self._matching_thread.shutdown()
            self._store.close()
        return {client.name: task.result().result(owner) for client, task in zip(clients, tasks, strict=True)}

    async def _run(self, clients: Sequence[SimulatedClient]) -> list[asyncio.Task[_Outcome]]:
        await self._coordinator.start()
        workers = self._workers
        workers.start([client.name for client in clients], lambda: self._coordinator.version)
        try:
            with ThreadPoolExecutor(workers.threads, thread_name_prefix="training") as training, _stopping(workers):
                async with asyncio.TaskGroup() as group:
                    return [group.create_task(self._take_part(client, training)) for client in clients]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await self._coordinator.stop()

    async def _take_part(self, client: SimulatedClient, training: Executor) -> _Outcome:
        try:
            return await self._session(client, training)
        finally:
            self._workers.gone(client.name)

    async def _session(self, client: SimulatedClient, training: Executor) -> _Outcome:
        identity = enrol(self._folder / "pki", client.name, "client", self._folder / "identities" / client.name)
        peer = Peer.from_certificate(identity.certificate, identity.authority, datetime.now(UTC))
        api = InProcessApi(self._coordinator, peer, partial(self._workers.waiting, client.name))
        with ClientState(self._folder / "states" / client.name) as state:
            state.claim(client.name)
            agreement = await agree(api, state, self._plan)
            state.pin(agreement.plan, agreement.federation_id)
            trainer, promised = self._prepare(client, state)
            session = Session(
                api,
                agreement,
                state,
                self._workers.trainer(client.name, trainer),
                backbone_digest=self._backbone.digest,
                identity=identity,
                privacy=promised,
                observer=self._observer,
                executor=training,
            )
            accuracy = await session.run()
            model = state.load_model(model_owner(self._plan, self._backbone.digest))
            assert model is not None  # the session saved it
            words = None if promised is None else promised.promise.in_words()
            return _Outcome(accuracy, tuple(state.metrics.read()), model, api.fetched, words)


@contextmanager
def _stopping(workers: Workers) -> Iterator[None]:
    try:
        yield
    finally:
        workers.stop()


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder for the clients' states, in memory where there is any: sessions often wait until things are on disk."""
    memory = _MEMORY_FOLDER if os.access(_MEMORY_FOLDER, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="pfed-", dir=memory) as folder:
        yield Path(folder)
