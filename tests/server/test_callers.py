"""What a caller may cost the server before it is believed, and what becomes of one that expires during a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from pfed_server import service
from pfed_server.coordinator import Coordinator
from pfed_server.interceptor import CallInterceptor
from pfed_server.service import UPLOADS_AT_ONCE, add_services
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import IdentityError, MessageRejected, NotAMember, PfedError, TooManyCalls
from pfedsecure.plan import Plan
from pfedsecure.wire.options import SERVER_OPTIONS
from pfedsecure.wire.payloads import Payload, split
from pfedsecure.wire.peer import Peer, ServicerContext
from pfedsecure.wire.status import raise_from
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.tls import server_credentials
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk, PlainContribution

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
CONTENT = PlainContribution(weighted_context=to_tensor(np.ones(SHAPE, np.float32)), weight=1).SerializeToString()
UPLOADS = ["SubmitStep", "PublishExpert"]


class Scene:
    """A server in an open round whose cohort is anna and bert, and the date that it judges certificates by."""

    def __init__(self, address: Address, coordinator: Coordinator) -> None:
        self.address = address
        self.coordinator = coordinator
        self.later = timedelta()


@asynccontextmanager
async def opened_round(plan: Plan, members: Any) -> AsyncIterator[Scene]:
    store = SqlStore.in_memory(plan)
    coordinator = Coordinator(plan, store, context_shape=SHAPE)

    def identify(context: ServicerContext) -> Peer:
        return Peer.from_call(context, members.server.authority, datetime.now(UTC) + scene.later)

    server = grpc.aio.server(interceptors=(CallInterceptor(identify),), options=SERVER_OPTIONS)
    add_services(server, coordinator, identify, "mtls")
    add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(members.server))
    scene = Scene(Address("127.0.0.1", port), coordinator)
    await coordinator.start()
    await server.start()
    for name in ("anna", "bert"):
        request = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
        await coordinator.join(members.peer(name), request)
    async with asyncio.timeout(10):
        while not (await coordinator.await_view(members.peer("anna"), fed.AwaitRequest(instance_id="1"))).selected:
            await asyncio.sleep(0.01)
    try:
        yield scene
    finally:
        coordinator.end_waits()
        await server.stop(None)
        await coordinator.stop()
        store.close()


class Upload:
    """A payload that is sent as far as its header, and the rest when `go_on` is set."""

    def __init__(self, round_number: int = 1) -> None:
        self._chunks = split(Payload(round_number, CONTENT, step=1))
        self.go_on = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[PayloadChunk]:
        yield next(self._chunks)
        await self.go_on.wait()
        for chunk in self._chunks:
            yield chunk


async def outcome(call: Any) -> Any:
    """The answer to a call within seconds, or the error that a client of ours would raise."""
    try:
        return await asyncio.wait_for(call, 10)
    except grpc.aio.AioRpcError as error:
        raise_from(error)


@pytest.mark.parametrize("method", UPLOADS)
@pytest.mark.parametrize(
    ("name", "role", "number", "kind", "message"),
    [
        ("olga", "operator", 1, IdentityError, "takes a certificate for a client"),
        ("carl", "client", 1, NotAMember, "carl does not take part"),
        ("anna", "client", 2, MessageRejected, "round 2 has not been opened"),
        ("dora", "client", 1, MessageRejected, "dora was not chosen for round 1"),
    ],
)
async def test_who_is_not_expected_is_refused_at_the_header(
    make_plan: MakePlan,
    members: Any,
    connect: Any,
    method: str,
    name: str,
    role: str,
    number: int,
    kind: Any,
    message: str,
) -> None:
    """Before any of its data was sent."""
    plan = make_plan()
    async with opened_round(plan, members) as scene, connect(scene.address, members.identity(name, role)) as caller:
        if name == "dora":  # a member that came after the round was opened
            request = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
            await scene.coordinator.join(members.peer("dora"), request)
        with pytest.raises(kind, match=message):
            await outcome(getattr(caller.round, method)(aiter(Upload(number))))


async def test_empty_chunks_without_end_are_refused(make_plan: MakePlan, members: Any, connect: Any) -> None:
    async def endless() -> AsyncIterator[PayloadChunk]:
        yield next(split(Payload(1, CONTENT, step=1)))
        while True:
            yield PayloadChunk(data=b"")

    async with opened_round(make_plan(), members) as scene, connect(scene.address, members.identity("anna")) as anna:
        # The refusal can get lost on its way to a caller that goes on writing, see pfedsecure.wire.upload.
        with pytest.raises(PfedError, match=r"a chunk of a payload is empty|the server failed while it answered"):
            await outcome(anna.round.SubmitStep(endless()))
        await outcome(anna.round.SubmitStep(split(Payload(1, CONTENT, step=1))))


@pytest.mark.parametrize("method", UPLOADS)
async def test_an_upload_that_takes_too_long_is_given_up(
    make_plan: MakePlan, members: Any, connect: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(service, "UPLOAD_SECONDS", 0.2)
    async with opened_round(make_plan(), members) as scene, connect(scene.address, members.identity("anna")) as anna:
        with pytest.raises(MessageRejected, match=r"did not arrive within 0\.2 s; check the connection"):
            await outcome(getattr(anna.round, method)(aiter(Upload())))
        await outcome(anna.round.SubmitStep(split(Payload(1, CONTENT, step=1))))


async def test_uploads_of_one_caller_at_once_are_few(make_plan: MakePlan, members: Any, connect: Any) -> None:
    async with (
        opened_round(make_plan(), members) as scene,
        connect(scene.address, members.identity("anna")) as anna,
        connect(scene.address, members.identity("anna")) as anna_again,
        connect(scene.address, members.identity("bert")) as bert,
    ):
        uploads = [Upload() for _ in range(UPLOADS_AT_ONCE)]
        calls = [anna.round.SubmitStep(aiter(upload)) for upload in uploads]
        await asyncio.sleep(0.2)
        for method in UPLOADS:  # together, and over every connection
            with pytest.raises(TooManyCalls, match=f"anna has {UPLOADS_AT_ONCE} uploads under way; wait for one"):
                await outcome(getattr(anna_again.round, method)(aiter(Upload())))
        await outcome(bert.round.SubmitStep(split(Payload(1, CONTENT, step=1))))
        calls[0].cancel()
        await asyncio.sleep(0.2)
        await outcome(anna_again.round.SubmitStep(split(Payload(1, CONTENT, step=1))))
        uploads[1].go_on.set()
        await outcome(calls[1])


@pytest.mark.parametrize("method", UPLOADS)
async def test_an_upload_of_a_caller_that_expired_meanwhile_is_refused(
    make_plan: MakePlan, members: Any, connect: Any, method: str
) -> None:
    async with opened_round(make_plan(), members) as scene, connect(scene.address, members.identity("anna")) as anna:
        upload = Upload()
        call = getattr(anna.round, method)(aiter(upload))
        await asyncio.sleep(0.2)
        assert not call.done()
        scene.later = timedelta(days=10_000)
        upload.go_on.set()
        with pytest.raises(IdentityError, match="expired"):
            await outcome(call)
        view = await scene.coordinator.await_view(members.peer("anna"), fed.AwaitRequest(instance_id="1"))
        assert not view.step_received
        assert not view.expert_received


async def test_a_caller_that_expired_while_it_waited_gets_no_view(
    make_plan: MakePlan, members: Any, connect: Any
) -> None:
    async with opened_round(make_plan(), members) as scene, connect(scene.address, members.identity("anna")) as anna:
        seen = (await outcome(anna.federation.Await(fed.AwaitRequest(instance_id="1")))).version
        call = anna.federation.Await(fed.AwaitRequest(instance_id="1", seen_version=seen, wait_seconds=5))
        await asyncio.sleep(0.2)
        assert not call.done()
        scene.later = timedelta(days=10_000)
        scene.coordinator.end_waits()
        with pytest.raises(IdentityError, match="expired"):
            await outcome(call)


@pytest.mark.parametrize("role", ["client", "operator"])
async def test_health_is_for_every_role_as_long_as_its_certificate_is_good(
    make_plan: MakePlan, members: Any, connect: Any, role: str
) -> None:
    async with (
        opened_round(make_plan(), members) as scene,
        connect(scene.address, members.identity(f"some-{role}", role)) as caller,
    ):
        with pytest.raises(PfedError, match="does not know this call"):
            await outcome(caller.health.List(health_pb2.HealthListRequest()))
        watch = caller.health.Watch(health_pb2.HealthCheckRequest(service="none"))
        assert (await outcome(watch.read())).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
        scene.later = timedelta(days=10_000)
        for method, request in [
            (caller.health.Check, health_pb2.HealthCheckRequest()),
            (caller.health.List, health_pb2.HealthListRequest()),
        ]:
            with pytest.raises(IdentityError, match="expired"):
                await outcome(method(request))
        with pytest.raises(IdentityError, match="expired"):
            await outcome(anext(aiter(caller.health.Watch(health_pb2.HealthCheckRequest()))))
