"""A client's way to the server through a network that loses, repeats, delays and cuts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy.exc import OperationalError

from pfedsecure.errors import PfedError, ServerUnreachable
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd

from .storage import Killed

T = TypeVar("T")

NetworkFault = Literal["request lost", "answer lost", "sent twice", "comes again late", "cut short", "old one again"]
FAULTS: tuple[NetworkFault, ...] = (
    "request lost",
    "answer lost",
    "sent twice",
    "comes again late",
    "cut short",
    "old one again",
)
CALL_SECONDS = 30.0
PAUSE_SECONDS = 2.0
RETRY_SECONDS = 180.0
"""Then a client gives up, as `pfed-client` does after the seconds that it was told."""

_UPLOADS = {"submit_step": 2, "publish_expert": 1, "set_up_matching": 1}
"""Which argument is the content."""


class Server(Protocol):
    """What a network leads to."""

    async def call(self, method: str, name: str, *args: Any) -> Any:
        """What the server answers to member `name`. Raises Killed when its process dies, or is not there."""


class Network:
    """Of one client. `report` is told of every answer that no server should give."""

    def __init__(
        self, name: str, server: Callable[[], Server], chance: random.Random, report: Callable[[str], None]
    ) -> None:
        self.name = name
        self.is_cut = False
        self._server = server
        self._chance = chance
        self._report = report
        self._planned: list[tuple[int, NetworkFault]] = []
        self._sent: list[tuple[str, tuple[Any, ...]]] = []
        self._late: set[asyncio.Task[None]] = set()

    def plan(self, fault: NetworkFault, after: int) -> None:
        """Let `fault` befall a call, after `after` good ones."""
        self._planned.append((after, fault))

    def mend(self) -> None:
        """No more faults than have happened."""
        self.is_cut = False
        self._planned.clear()

    async def call(self, method: str, *args: Any) -> Any:
        """Again and again until there is an answer. Raises PfedError: the server's, or ServerUnreachable."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + RETRY_SECONDS
        while True:
            await asyncio.sleep(self._chance.uniform(0.001, 0.2))
            fault = self._due()
            if not self.is_cut:
                if fault == "request lost":
                    await asyncio.sleep(CALL_SECONDS)
                else:
                    try:
                        answer = await self._through(fault, method, args)
                        if fault != "answer lost":
                            return answer
                        await asyncio.sleep(CALL_SECONDS)
                    except PfedError:
                        if fault != "answer lost":
                            raise
                    except (Killed, OperationalError):
                        pass
            if loop.time() > give_up:
                raise ServerUnreachable("the server cannot be reached")
            await asyncio.sleep(PAUSE_SECONDS)

    def _due(self) -> NetworkFault | None:
        if not self._planned:
            return None
        (after, fault), *rest = self._planned
        if after:
            self._planned = [(after - 1, fault), *rest]
            return None
        self._planned = rest
        return fault

    async def _through(self, fault: NetworkFault | None, method: str, args: tuple[Any, ...]) -> Any:
        if fault == "cut short" and method in _UPLOADS:
            await self._cut_short(method, args)
        elif fault == "old one again" and self._sent:
            await self._unasked(*self._chance.choice(self._sent))
        elif fault == "comes again late":
            task = asyncio.create_task(self._later(method, args))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        if method in _UPLOADS:
            self._sent.append((method, args))
        if fault == "sent twice":
            return await self._twice(method, args)
        return await self._server().call(method, self.name, *args)

    async def _twice(self, method: str, args: tuple[Any, ...]) -> Any:
        calls = [self._server().call(method, self.name, *args) for _ in range(2)]
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        if method in _UPLOADS and not isinstance(first, BaseException) and second != first:
            self._report(f"{method} of {self.name}, sent twice, was answered with {first!r} and {second!r}")
        if isinstance(first, BaseException):
            raise first
        return first

    async def _cut_short(self, method: str, args: tuple[Any, ...]) -> None:
        """What arrives of a message is its beginning: nothing may be made of that."""
        place = _UPLOADS[method]
        content = args[place][: self._chance.randrange(len(args[place]))]
        changed = (*args[:place], content, *args[place + 1 :])
        try:
            await self._server().call(method, self.name, *changed)
        except (PfedError, Killed, OperationalError):
            return
        self._report(f"{method} of {self.name} was taken, cut short to {len(content)} of {len(args[place])} bytes")

    async def _later(self, method: str, args: tuple[Any, ...]) -> None:
        await asyncio.sleep(self._chance.uniform(1, 200))
        await self._unasked(method, args)

    async def _unasked(self, method: str, args: tuple[Any, ...]) -> None:
        """A call that nobody waits for the answer of: it may be refused."""
        try:
            await self._server().call(method, self.name, *args)
        except (PfedError, Killed, OperationalError):
            return


class NetworkApi(FederationApi):
    """`FederationApi` over a `Network`."""

    def __init__(self, network: Network) -> None:
        self._call = network.call

    async def get_plan(self) -> fed.GetPlanReply:
        return await self._as(fed.GetPlanReply, "get_plan")

    async def join(self, request: fed.JoinRequest) -> fed.JoinReply:
        return await self._as(fed.JoinReply, "join", request)

    async def await_view(self, request: fed.AwaitRequest) -> fed.FederationView:
        return await self._as(fed.FederationView, "await_view", request)

    async def heartbeat(self, request: fed.HeartbeatRequest) -> fed.HeartbeatReply:
        return await self._as(fed.HeartbeatReply, "heartbeat", request)

    async def countersign(self, request: fed.CountersignRequest) -> fed.CountersignReply:
        return await self._as(fed.CountersignReply, "countersign", request)

    async def leave(self, request: fed.LeaveRequest) -> fed.LeaveReply:
        return await self._as(fed.LeaveReply, "leave", request)

    async def get_global_prompt(self, round_number: int) -> bytes:
        return await self._as(bytes, "get_global_prompt", round_number)

    async def set_up_matching(self, epoch: int, setup: bytes) -> rnd.Receipt:
        return await self._as(rnd.Receipt, "set_up_matching", epoch, setup)

    async def match(self, request: rnd.MatchRequest) -> bytes:
        return await self._as(bytes, "match", request)

    async def get_experts(self, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        return await self._as(dict, "get_experts", round_number, expert_ids)

    async def report_expert(self, request: rnd.ReportExpertRequest) -> rnd.ReportExpertReply:
        return await self._as(rnd.ReportExpertReply, "report_expert", request)

    async def report_matching(self, request: rnd.ReportMatchingRequest) -> rnd.ReportMatchingReply:
        return await self._as(rnd.ReportMatchingReply, "report_matching", request)

    async def publish_expert(self, round_number: int, publication: bytes) -> rnd.Receipt:
        return await self._as(rnd.Receipt, "publish_expert", round_number, publication)

    async def get_step_request(self, round_number: int, step: int) -> bytes:
        return await self._as(bytes, "get_step_request", round_number, step)

    async def submit_step(self, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        return await self._as(rnd.Receipt, "submit_step", round_number, step, message)

    async def _as(self, _kind: type[T], method: str, *args: Any) -> T:
        answer: T = await self._call(method, *args)
        return answer
