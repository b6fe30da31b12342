"""The server's process and those of the members: started, killed, and started again on what they left on disk."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import OperationalError

from pfed_client.agreement import agree
from pfed_client.ledger.account import Account
from pfed_client.privacy import Privacy, privacy
from pfed_client.session import Session
from pfed_client.state import ClientState, Settings
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.errors import BudgetExhausted, NotAMember, PfedError, ServerUnreachable
from pfedsecure.pki.countersignature import countersign
from pfedsecure.wire.v1 import federation_pb2 as fed

from .cast import PRIVATE, SHAPE, MarkingTrainer, weight_of
from .network import Network, NetworkApi
from .storage import FaultyStore, Killed

if TYPE_CHECKING:
    from .world import World

BACKBONE = "b" * 64
EPSILON = 8.0


class ServerProcess:
    """One life of the server. Raises what `SqlStore.open` raises when it cannot begin."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.sql = SqlStore.open(world.folder / "server", world.plan)
        self.store = FaultyStore(self.sql, self._dies)
        server = world.cast.server
        self.coordinator = Coordinator(
            world.plan,
            self.store,
            context_shape=SHAPE,
            authority=server.authority,
            sign=partial(countersign, server),
            clock=world.clock,
        )
        self._calls: set[asyncio.Task[Any]] = set()
        self.alive = True

    async def start(self) -> None:
        try:
            await self.coordinator.start()
        except BaseException:
            await self.kill()
            raise

    async def call(self, method: str, name: str, *args: Any) -> Any:
        """What the coordinator answers to member `name`. Raises as `pfedsecure.wire.api`, and Killed."""
        if not self.alive:
            raise Killed
        self._world.watch.asks(method, name, args)
        task = asyncio.ensure_future(getattr(self.coordinator, method)(self._world.cast.peers[name], *args))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            answer = await task
        except (PfedError, Killed, OperationalError):
            raise
        except asyncio.CancelledError:
            if self.alive:  # it is the caller that ends
                raise
            raise Killed from None
        except Exception as error:
            self._world.report(f"{method} of {name} raised {error!r}")
            raise Killed from None
        self._world.watch.is_answered(method, name, args)
        return answer

    async def kill(self) -> None:
        """Nothing more is written, and nobody is answered."""
        if not self.alive:
            return
        self.alive = False
        self.store.dead = True
        for task in list(self._calls):
            task.cancel()
        with suppress(Killed):
            await self.coordinator.stop()
        self.sql.close()

    async def stop(self) -> None:
        """As at SIGTERM: what is under way is finished."""
        await self.coordinator.stop()
        await self.kill()

    def _dies(self) -> None:
        asyncio.get_running_loop().call_soon(self._world.server_died, self)


class MemberProcess:
    """A member of the federation, over all its lives: `state` on disk is what the next one begins with."""

    def __init__(self, world: World, name: str, network: Network) -> None:
        self._world = world
        self.name = name
        self.network = network
        self.trainer = MarkingTrainer(name)
        self.account: Account | None = None
        self.ended: PfedError | None = None
        self.finished = False
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        if not self.running:
            self.ended = None
            self._task = asyncio.get_running_loop().create_task(self._live())

    async def kill(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def leave(self) -> None:
        """Leave the federation, and end. What was sent stays."""
        if not self.running:
            return
        await self.kill()
        with ClientState(self._folder) as state, suppress(PfedError):
            state.claim(self.name)
            await NetworkApi(self.network).leave(fed.LeaveRequest(instance_id=state.record.instance_id))

    @property
    def _folder(self) -> Any:
        return self._world.folder / "clients" / self.name

    async def _live(self) -> None:
        try:
            with ClientState(self._folder) as state:
                state.claim(self.name)
                api = NetworkApi(self.network)
                agreement = await agree(api, state, self._world.plan)
                session = Session(
                    api,
                    agreement,
                    state,
                    self.trainer,
                    backbone_digest=BACKBONE,
                    identity=self._world.cast.identities[self.name],
                    privacy=self._privacy(state, agreement.federation_id),
                )
                await session.run()
                self.finished = True
        except (ServerUnreachable, BudgetExhausted, NotAMember) as error:
            self.ended = error
        except Exception as error:
            self._world.report(f"{self.name} ended with {error!r}")

    def _privacy(self, state: ClientState, federation_id: str) -> Privacy | None:
        if self.name != PRIVATE:
            return None
        state.pin(self._world.plan, federation_id)
        images = [sha256(self.name.encode()).digest()]
        folder = self._world.folder / "ledgers"
        self.account = Account(folder, images, federation=federation_id, client=self.name)
        settings = Settings.of(self.name, dp_epsilon=EPSILON)
        return privacy(state, settings, self._world.plan, weight_of(self.name), self.account)
