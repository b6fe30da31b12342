"""The server over gRPC with mutual TLS, called again and again while it cannot be reached.

Guaranteed: nothing is sent before the server has proved to hold a certificate of this client's authority for the host
that was dialled. Plain text exists on loopback addresses only. Every call may be repeated, so a lost answer is as
harmless as a lost request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import grpc.aio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_before_delay, wait_random_exponential
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from pfedsecure.console import Address
from pfedsecure.errors import MessageRejected, PfedError, ServerUnreachable, TooManyCalls
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.diagnose import explain_connection_failure
from pfedsecure.wire.loopback import require_loopback
from pfedsecure.wire.options import CHANNEL_OPTIONS, CLAIMED_NAME_KEY
from pfedsecure.wire.payloads import Payload, join, join_one
from pfedsecure.wire.status import error_raised_by_server, raise_from
from pfedsecure.wire.tls import channel_credentials
from pfedsecure.wire.upload import upload
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.federation_pb2_grpc import FederationStub
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk
from pfedsecure.wire.v1.round_pb2_grpc import RoundStub

T = TypeVar("T")

CALL_SECONDS = 30.0
"""A small call that takes longer has lost its server."""
TRANSFER_SECONDS = 300.0
"""The same for a payload in either direction."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
REFUSALS_BELIEVED = 2

_RECONNECT_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class GrpcApi(FederationApi):
    """`FederationApi` of the server at `address`. To be made inside a running event loop, and closed.

    `others`: further servers of the same federation. When one cannot be called or cannot answer for the moment, the
    next try is at the next of them, which is stayed with.

    With `identity` over mutual TLS; without one in plain text under `claimed_name`, which raises InsecureTransport
    unless the address is a loopback address. A server that cannot be reached is tried for `retry_seconds`, in pauses
    that grow, with jitter; then ServerUnreachable says what is wrong. A certificate or transport that one side refuses
    raises IdentityError or InsecureTransport without waiting. `on_retry` is told why and for how many seconds a pause
    is made.
    """

    def __init__(
        self,
        address: Address,
        identity: Identity | None,
        *,
        others: Sequence[Address] = (),
        claimed_name: str = "",
        retry_seconds: float,
        on_retry: Callable[[PfedError, float], None] | None = None,
    ) -> None:
        self._addresses = (address, *others)
        self._at = 0
        self._identity = identity
        self._retry_seconds = retry_seconds
        self._on_retry = on_retry
        self._metadata: tuple[tuple[str, str], ...] = ()
        if identity is None:
            for each in self._addresses:
                require_loopback(each.host)
            self._metadata = ((CLAIMED_NAME_KEY, claimed_name),)
        self._connect()

    def _connect(self) -> None:
        options = (*CHANNEL_OPTIONS, *_RECONNECT_OPTIONS)
        self._channels = [
            grpc.aio.insecure_channel(str(address), options)
            if self._identity is None
            else grpc.aio.secure_channel(str(address), channel_credentials(self._identity), options)
            for address in self._addresses
        ]  # a channel connects when it is first used
        self._stubs = [
            (FederationStub(channel), RoundStub(channel))  # type: ignore[no-untyped-call]
            for channel in self._channels
        ]

    @property
    def _federation(self) -> FederationStub:
        return self._stubs[self._at][0]

    @property
    def _round(self) -> RoundStub:
        return self._stubs[self._at][1]

    async def use(self, identity: Identity) -> None:
        """Make all further calls with `identity`, on a new connection; calls under way end. For clients over TLS."""
        assert self._identity is not None
        old, self._identity = self._channels, identity
        self._connect()
        for channel in old:
            await channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and calls under way."""
        for channel in self._channels:
            await channel.close(grace=None)

    async def get_plan(self) -> fed.GetPlanReply:
        return await self._unary(lambda: self._federation.GetPlan, fed.GetPlanRequest())

    async def join(self, request: fed.JoinRequest) -> fed.JoinReply:
        return await self._unary(lambda: self._federation.Join, request)

    async def await_view(self, request: fed.AwaitRequest) -> fed.FederationView:
        return await self._unary(lambda: self._federation.Await, request, may_wait=request.wait_seconds)

    async def heartbeat(self, request: fed.HeartbeatRequest) -> fed.HeartbeatReply:
        return await self._unary(lambda: self._federation.Heartbeat, request)

    async def countersign(self, request: fed.CountersignRequest) -> fed.CountersignReply:
        return await self._unary(lambda: self._federation.Countersign, request)

    async def leave(self, request: fed.LeaveRequest) -> fed.LeaveReply:
        return await self._unary(lambda: self._federation.Leave, request)

    async def get_global_prompt(self, round_number: int) -> bytes:
        request = rnd.GetGlobalPromptRequest(round=round_number)

        async def fetch() -> bytes:
            async with aclosing(self._stream(self._round.GetGlobalPrompt, request)) as chunks:
                payload = await join_one(chunks)
            if round_number and payload.round != round_number:
                raise MessageRejected(f"the server sent the global prompt of round {payload.round}, not {round_number}")
            return payload.data

        return await self._persistently(fetch)

    async def set_up_matching(self, epoch: int, setup: bytes) -> rnd.Receipt:
        return await self._upload(lambda: self._round.SetUpMatching, Payload(0, setup, epoch=epoch))

    async def match(self, request: rnd.MatchRequest) -> bytes:
        async def fetch() -> bytes:
            async with aclosing(self._stream(self._round.Match, request)) as chunks:
                payload = await join_one(chunks)
            if payload.round != request.round:
                raise MessageRejected(f"the server answered for round {payload.round}, not {request.round}")
            return payload.data

        return await self._persistently(fetch)

    async def get_experts(self, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        request = rnd.GetExpertsRequest(round=round_number, expert_ids=expert_ids)

        async def fetch() -> dict[str, bytes]:
            async with aclosing(self._stream(self._round.GetExperts, request)) as chunks:
                payloads = [payload async for payload in join(chunks, max_payloads=len(expert_ids))]
            found = {payload.expert_id: payload.data for payload in payloads}
            if len(found) < len(payloads) or any(payload.round != round_number for payload in payloads):
                raise MessageRejected("the server sent other experts than were asked for")
            return found

        return await self._persistently(fetch)

    async def report_expert(self, request: rnd.ReportExpertRequest) -> rnd.ReportExpertReply:
        return await self._unary(lambda: self._round.ReportExpert, request)

    async def report_matching(self, request: rnd.ReportMatchingRequest) -> rnd.ReportMatchingReply:
        return await self._unary(lambda: self._round.ReportMatching, request)

    async def publish_expert(self, round_number: int, publication: bytes) -> rnd.Receipt:
        return await self._upload(lambda: self._round.PublishExpert, Payload(round_number, publication))

    async def get_step_request(self, round_number: int, step: int) -> bytes:
        request = rnd.StepRequest(round=round_number, step=step)

        async def fetch() -> bytes:
            async with aclosing(self._stream(self._round.GetStepRequest, request)) as chunks:
                payload = await join_one(chunks)
            if (payload.round, payload.step) != (round_number, step):
                raise MessageRejected(f"the server sent step {payload.step} of round {payload.round} unasked")
            return payload.data

        return await self._persistently(fetch)

    async def submit_step(self, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        return await self._upload(lambda: self._round.SubmitStep, Payload(round_number, message, step=step))

    async def _unary(
        self, method: Callable[[], Callable[..., Awaitable[T]]], request: object, *, may_wait: float = 0
    ) -> T:
        async def call() -> T:
            return await method()(request, timeout=CALL_SECONDS + may_wait, metadata=self._metadata)

        return await self._persistently(call)

    async def _upload(
        self, method: Callable[[], Callable[..., Awaitable[rnd.Receipt]]], payload: Payload
    ) -> rnd.Receipt:
        async def call() -> rnd.Receipt:
            send = partial(method(), timeout=TRANSFER_SECONDS, metadata=self._metadata)
            return await upload(send, payload)

        return await self._persistently(call)

    async def _stream(
        self, method: Callable[..., grpc.aio.UnaryStreamCall[object, PayloadChunk]], request: object
    ) -> AsyncGenerator[PayloadChunk]:
        call = method(request, timeout=TRANSFER_SECONDS, metadata=self._metadata)
        try:
            async for chunk in call:
                yield chunk
        finally:
            call.cancel()  # nothing to do after the last chunk; otherwise the receiver refused what came

    async def _persistently(self, call: Callable[[], Awaitable[T]]) -> T:
        refusals = 0

        def worth_another_try(error: BaseException) -> bool:
            nonlocal refusals
            if not isinstance(error, _NoAnswer):
                return False
            # A server that is just going down can look like one that refuses: believed the second time in a row.
            refusals = 0 if isinstance(error.reason, (ServerUnreachable, TooManyCalls)) else refusals + 1
            return refusals < REFUSALS_BELIEVED

        stop: stop_base = stop_before_delay(self._retry_seconds)
        wait: wait_base = wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS)
        retrying = AsyncRetrying(
            stop=stop, wait=wait, retry=retry_if_exception(worth_another_try), before_sleep=self._tell, reraise=True
        )
        try:
            return await retrying(self._once, call)
        except _NoAnswer as error:
            if isinstance(error.reason, ServerUnreachable) and self._retry_seconds:
                raise ServerUnreachable(f"tried for {self._retry_seconds:g} s: {error.reason}") from None
            raise error.reason from None

    async def _once(self, call: Callable[[], Awaitable[T]]) -> T:
        at = self._at
        try:
            return await call()
        except ServerUnreachable as lost:  # all that it said to an upload
            raise _NoAnswer(lost) from None
        except grpc.aio.AioRpcError as error:
            try:
                raise_from(error)
            except TooManyCalls as told_to_wait:
                raise _NoAnswer(told_to_wait) from None
            except ServerUnreachable as unreachable:
                if error_raised_by_server(error) is not None:  # the connection is sound, there is nothing to explain
                    self._turn_from(at)
                    raise _NoAnswer(unreachable) from None
                reason = await asyncio.to_thread(explain_connection_failure, *self._addresses[at], self._identity)
                self._turn_from(at)
                raise _NoAnswer(reason) from None

    def _turn_from(self, at: int) -> None:
        """Use the next server, unless another call has turned from this one already."""
        if self._at == at:
            self._at = (at + 1) % len(self._addresses)

    def _tell(self, state: RetryCallState) -> None:
        assert state.outcome is not None  # before a pause there was an attempt
        assert state.next_action is not None
        error = state.outcome.exception()
        if self._on_retry is not None and isinstance(error, _NoAnswer):
            self._on_retry(error.reason, state.next_action.sleep)


class _NoAnswer(Exception):
    """A call that did not get through."""

    def __init__(self, reason: PfedError) -> None:
        super().__init__(str(reason))
        self.reason = reason
