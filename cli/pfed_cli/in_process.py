"""A client's way to a server in the same process: the messages of the network, handed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from pfed_server.coordinator import Coordinator
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.peer import Peer
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd


class InProcessApi(FederationApi):
    """`FederationApi` of the client `peer`. `fetched` holds the expert ids that it asked for, by round.

    `waiting(version)` is entered while the client waits for a view other than that of `version`.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        peer: Peer,
        waiting: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._peer = peer
        self._waiting = waiting or (lambda _version: nullcontext())
        self.fetched: dict[int, tuple[str, ...]] = {}

    async def get_plan(self) -> fed.GetPlanReply:
        return await self._coordinator.get_plan(self._peer)

    async def join(self, request: fed.JoinRequest) -> fed.JoinReply:
        return await self._coordinator.join(self._peer, request)

    async def await_view(self, request: fed.AwaitRequest) -> fed.FederationView:
        with self._waiting(request.seen_version):
            return await self._coordinator.await_view(self._peer, request)

    async def heartbeat(self, request: fed.HeartbeatRequest) -> fed.HeartbeatReply:
        return await self._coordinator.heartbeat(self._peer, request)

    async def countersign(self, request: fed.CountersignRequest) -> fed.CountersignReply:
        return await self._coordinator.countersign(self._peer, request)

    async def leave(self, request: fed.LeaveRequest) -> fed.LeaveReply:
        return await self._coordinator.leave(self._peer, request)

    async def get_global_prompt(self, round_number: int) -> bytes:
        return await self._coordinator.get_global_prompt(self._peer, round_number)

    async def set_up_matching(self, epoch: int, setup: bytes) -> rnd.Receipt:
        return await self._coordinator.set_up_matching(self._peer, epoch, setup)

    async def match(self, request: rnd.MatchRequest) -> bytes:
        return await self._coordinator.match(self._peer, request)

    async def get_experts(self, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        self.fetched[round_number] = tuple(expert_ids)
        return await self._coordinator.get_experts(self._peer, round_number, expert_ids)

    async def report_expert(self, request: rnd.ReportExpertRequest) -> rnd.ReportExpertReply:
        return await self._coordinator.report_expert(self._peer, request)

    async def report_matching(self, request: rnd.ReportMatchingRequest) -> rnd.ReportMatchingReply:
        return await self._coordinator.report_matching(self._peer, request)

    async def publish_expert(self, round_number: int, publication: bytes) -> rnd.Receipt:
        return await self._coordinator.publish_expert(self._peer, round_number, publication)

    async def get_step_request(self, round_number: int, step: int) -> bytes:
        return await self._coordinator.get_step_request(self._peer, round_number, step)

    async def submit_step(self, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        return await self._coordinator.submit_step(self._peer, round_number, step, message)
