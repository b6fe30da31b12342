"""The coordinator behind gRPC: who calls, and payloads in chunks. Everything else is the coordinator's business."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc.aio
from cryptography import x509

from pfed_server.coordinator import Coordinator
from pfedsecure.errors import IdentityError, MessageRejected, TooManyCalls
from pfedsecure.pki.names import Role, is_role
from pfedsecure.wire.options import CLAIMED_NAME_KEY, CLAIMED_ROLE_KEY
from pfedsecure.wire.payloads import Payload, join_one, split
from pfedsecure.wire.peer import Peer, ServicerContext
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server
from pfedsecure.wire.v1.operations_pb2_grpc import OperationsServicer, add_OperationsServicer_to_server
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk, PayloadHeader
from pfedsecure.wire.v1.round_pb2_grpc import RoundServicer, add_RoundServicer_to_server

Identify = Callable[[ServicerContext], Peer]
"""Who makes a call; raises IdentityError or InsecureTransport. Asked at every call, and again after every wait for the
caller or for news: a certificate may expire or be revoked meanwhile."""

UPLOAD_SECONDS = 300.0
"""An upload that takes longer is given up; as long as a client of ours takes for one."""
UPLOADS_AT_ONCE = 2
"""Per caller: one that goes on, and one that broke off and is not found out yet."""


class Check(Protocol):
    """What may be held against a caller whose certificate is good."""

    def check(self, peer: Peer) -> None:
        """Raises IdentityError."""


def by_certificate(authority: x509.Certificate, revocations: Check | None = None) -> Identify:
    """Callers over mutual TLS: the client certificate, verified under `authority` and not revoked."""

    def identify(context: ServicerContext) -> Peer:
        peer = Peer.from_call(context, authority)
        if revocations is not None:
            revocations.check(peer)
        return peer

    return identify


def by_claim(context: ServicerContext) -> Peer:
    """Callers in plain text from this machine: whoever they claim to be."""
    metadata: Any = context.invocation_metadata() or ()
    claims = dict(metadata)
    role = claims.get(CLAIMED_ROLE_KEY, "client")
    if not is_role(role):
        raise IdentityError(f"there is no role {role[:40]!r}")
    return Peer.insecure(context, claims.get(CLAIMED_NAME_KEY, ""), role)


class FederationService(FederationServicer):
    """federation.proto"""

    def __init__(self, coordinator: Coordinator, identify: Identify) -> None:
        self._coordinator = coordinator
        self._identify = identify

    async def GetPlan(self, request: fed.GetPlanRequest, context: ServicerContext) -> fed.GetPlanReply:
        return await self._coordinator.get_plan(self._identify(context))

    async def Join(self, request: fed.JoinRequest, context: ServicerContext) -> fed.JoinReply:
        return await self._coordinator.join(self._identify(context), request)

    async def Await(self, request: fed.AwaitRequest, context: ServicerContext) -> fed.FederationView:
        view = await self._coordinator.await_view(self._identify(context), request)
        self._identify(context)
        return view

    async def Heartbeat(self, request: fed.HeartbeatRequest, context: ServicerContext) -> fed.HeartbeatReply:
        return await self._coordinator.heartbeat(self._identify(context), request)

    async def Countersign(self, request: fed.CountersignRequest, context: ServicerContext) -> fed.CountersignReply:
        return await self._coordinator.countersign(self._identify(context), request)

    async def Leave(self, request: fed.LeaveRequest, context: ServicerContext) -> fed.LeaveReply:
        return await self._coordinator.leave(self._identify(context), request)


class RoundService(RoundServicer):
    """round.proto"""

    def __init__(self, coordinator: Coordinator, identify: Identify) -> None:
        self._coordinator = coordinator
        self._identify = identify
        self._uploads: Counter[tuple[Role, str]] = Counter()

    async def GetGlobalPrompt(
        self, request: rnd.GetGlobalPromptRequest, context: ServicerContext
    ) -> AsyncIterator[PayloadChunk]:
        prompt = await self._coordinator.get_global_prompt(self._identify(context), request.round)
        for chunk in split(Payload(request.round, prompt)):
            yield chunk

    async def SetUpMatching(self, chunks: AsyncIterator[PayloadChunk], context: ServicerContext) -> rnd.Receipt:
        limit = self._coordinator.max_setup_bytes
        payload = await self._receive(chunks, context, self._coordinator.expect_setup, limit)
        return await self._coordinator.set_up_matching(self._identify(context), payload.epoch, payload.data)

    async def Match(self, request: rnd.MatchRequest, context: ServicerContext) -> AsyncIterator[PayloadChunk]:
        answer = await self._coordinator.match(self._identify(context), request)
        self._identify(context)
        for chunk in split(Payload(request.round, answer)):
            yield chunk

    async def GetExperts(self, request: rnd.GetExpertsRequest, context: ServicerContext) -> AsyncIterator[PayloadChunk]:
        experts = await self._coordinator.get_experts(self._identify(context), request.round, request.expert_ids)
        for expert_id, expert in experts.items():
            for chunk in split(Payload(request.round, expert, expert_id)):
                yield chunk

    async def ReportExpert(self, request: rnd.ReportExpertRequest, context: ServicerContext) -> rnd.ReportExpertReply:
        return await self._coordinator.report_expert(self._identify(context), request)

    async def ReportMatching(
        self, request: rnd.ReportMatchingRequest, context: ServicerContext
    ) -> rnd.ReportMatchingReply:
        return await self._coordinator.report_matching(self._identify(context), request)

    async def PublishExpert(self, chunks: AsyncIterator[PayloadChunk], context: ServicerContext) -> rnd.Receipt:
        limit = self._coordinator.max_upload_bytes
        payload = await self._receive(chunks, context, self._coordinator.expect_publication, limit)
        return await self._coordinator.publish_expert(self._identify(context), payload.round, payload.data)

    async def GetStepRequest(self, request: rnd.StepRequest, context: ServicerContext) -> AsyncIterator[PayloadChunk]:
        content = await self._coordinator.get_step_request(self._identify(context), request.round, request.step)
        for chunk in split(Payload(request.round, content, step=request.step)):
            yield chunk

    async def SubmitStep(self, chunks: AsyncIterator[PayloadChunk], context: ServicerContext) -> rnd.Receipt:
        limit = self._coordinator.max_upload_bytes
        payload = await self._receive(chunks, context, self._coordinator.expect_message, limit)
        return await self._coordinator.submit_step(self._identify(context), payload.round, payload.step, payload.data)

    async def _receive(
        self,
        chunks: AsyncIterator[PayloadChunk],
        context: ServicerContext,
        expect: Callable[[Peer, int], object],
        max_bytes: int,
    ) -> Payload:
        """An upload that its caller may make, says `expect`. What it may cost is bounded in bytes, time and number.

        Raises as `expect` and `join_one`, TooManyCalls for an upload too many, MessageRejected for one that takes too
        long.
        """
        peer = self._identify(context)
        caller = peer.role, peer.name
        if self._uploads[caller] >= UPLOADS_AT_ONCE:
            raise TooManyCalls(
                f"{peer.name} has {UPLOADS_AT_ONCE} uploads under way; wait for one to end, then try again"
            )

        def expected(header: PayloadHeader) -> None:
            expect(peer, header.round)

        self._uploads[caller] += 1
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                return await join_one(chunks, max_bytes=max_bytes, on_header=expected)
        except TimeoutError:
            raise MessageRejected(
                f"the upload did not arrive within {UPLOAD_SECONDS:g} s; check the connection and try again"
            ) from None
        finally:
            self._uploads[caller] -= 1
            if not self._uploads[caller]:
                del self._uploads[caller]


class OperationsService(OperationsServicer):
    """operations.proto; `transport` is what `pfed status` shows: mtls or insecure."""

    def __init__(self, coordinator: Coordinator, identify: Identify, transport: str) -> None:
        self._coordinator = coordinator
        self._identify = identify
        self._transport = transport

    async def GetStatus(self, request: ops.GetStatusRequest, context: ServicerContext) -> ops.GetStatusReply:
        reply = await self._coordinator.get_status(self._identify(context))
        reply.transport = self._transport
        return reply


def add_services(server: grpc.aio.Server, coordinator: Coordinator, identify: Identify, transport: str) -> None:
    """Have `server` answer all calls of proto/ from `coordinator`."""
    federation = FederationService(coordinator, identify)
    add_FederationServicer_to_server(federation, server)  # type: ignore[no-untyped-call]
    rounds = RoundService(coordinator, identify)
    add_RoundServicer_to_server(rounds, server)  # type: ignore[no-untyped-call]
    operations = OperationsService(coordinator, identify, transport)
    add_OperationsServicer_to_server(operations, server)  # type: ignore[no-untyped-call]
