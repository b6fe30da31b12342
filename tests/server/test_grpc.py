"""The coordinator behind a real gRPC server with mutual TLS: identities, errors, limits and payloads."""

from __future__ import annotations

import asyncio
import hashlib
import math
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from sqlalchemy.exc import OperationalError

from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import (
    AddressInUse,
    IdentityError,
    InsecureTransport,
    MessageRejected,
    NotAMember,
    PfedError,
    PlanMismatch,
    ServerUnreachable,
)
from pfedsecure.experts.plain import read_expert, write_expert
from pfedsecure.matching.plain import PlainClientMatching
from pfedsecure.plan import Plan
from pfedsecure.wire.options import CHANNEL_OPTIONS, CLAIMED_NAME_KEY, CLAIMED_ROLE_KEY
from pfedsecure.wire.payloads import CHUNK_BYTES, MAX_MESSAGE_BYTES, Payload, join, join_one, split
from pfedsecure.wire.status import raise_from
from pfedsecure.wire.tensors import from_tensor
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.federation_pb2_grpc import FederationStub
from pfedsecure.wire.v1.operations_pb2_grpc import OperationsStub
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk, PayloadHeader, Publication, Tensor

MakePlan = Callable[..., Plan]
ANY_PORT = Address("127.0.0.1", 0)
WIDE = (100, 2000)
"""A context of 800 kB, so that payloads take several chunks."""


@asynccontextmanager
async def served(plan: Plan, members: Any, shape: tuple[int, int] = (2, 3), store: Any = None) -> AsyncIterator[Any]:
    used = store or SqlStore.in_memory(plan)
    async with serving(Coordinator(plan, used, context_shape=shape), ANY_PORT, members.server) as address:
        yield address
    used.close()


async def outcome(call: Coroutine[Any, Any, Any] | Any) -> Any:
    """The answer to a call, or the error that a client of ours would raise."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise_from(error)


async def joined(stubs: Any, plan: Plan) -> None:
    await outcome(stubs.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")))


async def round_opened(stubs: Any, number: int) -> None:
    version = 0
    while True:
        request = fed.AwaitRequest(instance_id="1", seen_version=version, wait_seconds=5)
        view = await outcome(stubs.federation.Await(request))
        if view.round == number and view.selected:
            return
        version = view.version


async def test_two_rounds_with_payloads_of_several_chunks(
    make_plan: MakePlan, members: Any, connect: Any, contribute: Any
) -> None:
    plan = make_plan(count=2)
    contexts = dict(zip(("anna", "bert"), np.random.default_rng(0).normal(scale=0.1, size=(2, *WIDE)), strict=True))
    contexts = {name: context.astype(np.float32) for name, context in contexts.items()}

    async def work(stubs: Any, number: int, context: np.ndarray) -> None:
        update = contribute(context, 1)
        assert len(update) > 2 * CHUNK_BYTES
        receipt = await outcome(stubs.round.SubmitStep(split(Payload(number, update, step=1))))
        assert receipt.sha256 == hashlib.sha256(update).digest()
        publication = Publication(expert=write_expert(context), sketch=PlainClientMatching().sketch(context, number))
        await outcome(stubs.round.PublishExpert(split(Payload(number, publication.SerializeToString()))))

    async with (
        served(plan, members, WIDE) as address,
        connect(address, members.identity("anna")) as anna,
        connect(address, members.identity("bert")) as bert,
    ):
        for stubs in (anna, bert):
            await joined(stubs, plan)
        for number in (1, 2):
            await round_opened(anna, number)
            if number == 2:
                reply = anna.round.GetGlobalPrompt(rnd.GetGlobalPromptRequest(round=2))
                data = (await join_one(reply)).data
                prompt = from_tensor(Tensor.FromString(data), WIDE, "prompt")
                oracle = np.mean([context.astype(np.float64) for context in contexts.values()], axis=0)
                np.testing.assert_allclose(prompt, oracle, rtol=1e-6, atol=1e-9)

                query = PlainClientMatching().query(contexts["anna"], number, number + 1)
                match = anna.round.Match(rnd.MatchRequest(round=2, query=query, experts=2))
                ranked = PlainClientMatching().rank((await join_one(match)).data, 2)
                ids = [candidate.expert_id for candidate in ranked]
                fetched = anna.round.GetExperts(rnd.GetExpertsRequest(round=2, expert_ids=ids))
                (expert,) = [payload async for payload in join(fetched, max_payloads=2)]
                theirs = read_expert(expert.data, WIDE, math.inf, "expert")
                np.testing.assert_array_equal(theirs, contexts["bert"])
            for name, stubs in (("anna", anna), ("bert", bert)):
                await work(stubs, number, contexts[name])
        while (view := await outcome(bert.federation.Await(fed.AwaitRequest(instance_id="1")))).rounds_completed < 2:
            await asyncio.sleep(0.01)
        assert view.phase == fed.FEDERATION_PHASE_FINISHED


async def test_errors_arrive_as_the_classes_that_were_raised(make_plan: MakePlan, members: Any, connect: Any) -> None:
    async with served(make_plan(), members) as address, connect(address, members.identity("anna")) as anna:
        with pytest.raises(PlanMismatch, match="the client agreed to '123'"):
            await outcome(anna.federation.Join(fed.JoinRequest(plan_digest="123", instance_id="1")))
        with pytest.raises(NotAMember, match="anna does not take part"):
            await outcome(anna.federation.Heartbeat(fed.HeartbeatRequest(instance_id="1")))
        with pytest.raises(NotAMember):
            await outcome(anna.round.SubmitStep(split(Payload(1, b"x", step=1))))
        with pytest.raises(NotAMember):
            await outcome(join_one(anna.round.GetGlobalPrompt(rnd.GetGlobalPromptRequest(round=1))))
        with pytest.raises(PfedError, match="does not know this call"):
            await outcome(anna.raw.unary_unary("/pfedsecure.v1.Federation/Nonsense")(b""))


async def test_the_name_is_the_certificates_whatever_is_claimed(
    make_plan: MakePlan, members: Any, connect: Any
) -> None:
    plan = make_plan()
    async with served(plan, members) as address, connect(address, members.identity("anna")) as anna:
        request = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
        reply = await anna.federation.Join(request, metadata=((CLAIMED_NAME_KEY, "bert"),))
        assert reply.name == "anna"


async def test_status_needs_an_operator(make_plan: MakePlan, members: Any, connect: Any) -> None:
    async with (
        served(make_plan(), members) as address,
        connect(address, members.identity("anna")) as anna,
        connect(address, members.identity("olga", "operator")) as olga,
    ):
        with pytest.raises(IdentityError, match="takes a certificate for a operator"):
            await outcome(anna.operations.GetStatus(ops.GetStatusRequest()))
        assert (await outcome(olga.operations.GetStatus(ops.GetStatusRequest()))).transport == "mtls"


async def test_health_is_served_on_the_same_port(make_plan: MakePlan, members: Any, connect: Any) -> None:
    async with served(make_plan(), members) as address, connect(address, members.identity("anna")) as anna:
        reply = await anna.health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        watch = anna.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


@pytest.mark.parametrize(
    "method",
    ["Federation/Join", "Federation/Await", "Round/Match", "Round/ReportExpert", "Operations/GetStatus"],
)
async def test_a_message_that_cannot_be_decoded_is_refused(
    make_plan: MakePlan, members: Any, connect: Any, method: str
) -> None:
    async with served(make_plan(), members) as address, connect(address, members.identity("anna")) as anna:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anna.raw.unary_unary(f"/pfedsecure.v1.{method}")(b"\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(MessageRejected, match=f"a message of /pfedsecure.v1.{method} cannot be decoded"):
            raise_from(caught.value)


async def test_streams_that_cannot_be_decoded_are_refused(make_plan: MakePlan, members: Any, connect: Any) -> None:
    plan = make_plan()
    async with (
        served(plan, members) as address,
        connect(address, members.identity("anna")) as anna,
        connect(address, members.identity("bert")) as bert,
    ):
        await joined(anna, plan)
        await joined(bert, plan)
        await round_opened(anna, 1)
        upload = anna.raw.stream_unary("/pfedsecure.v1.Round/SubmitStep")
        with pytest.raises(MessageRejected, match="cannot be decoded"):
            await outcome(upload(iter([b"\xff"])))
        fetch = anna.raw.unary_stream("/pfedsecure.v1.Round/GetExperts")
        with pytest.raises(MessageRejected, match="cannot be decoded"):
            await outcome(anext(aiter(fetch(b"\xff"))))
        for chunks, message in (
            ([], "holds no payload"),
            ([PayloadChunk(data=b"x")], "does not begin with the header"),
            ([PayloadChunk(header=PayloadHeader(size=2**40))], "over the limit of"),
            (list(split(Payload(1, b"x", step=1))) * 2, "more than 1 payloads"),
        ):
            with pytest.raises(MessageRejected, match=message):
                await outcome(anna.round.SubmitStep(iter(chunks)))


async def test_an_oversized_message_is_refused_and_the_server_lives(
    make_plan: MakePlan, members: Any, connect: Any
) -> None:
    plan = make_plan()
    async with served(plan, members) as address:
        # A channel without our options: its sender has no limit.
        async with grpc.aio.secure_channel(str(address), members.channel_credentials("anna")) as channel:
            request = fed.JoinRequest(plan_digest="x" * (MAX_MESSAGE_BYTES + 1), instance_id="1")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await FederationStub(channel).Join(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(MessageRejected, match="over the size limit"):
            raise_from(caught.value)
        async with connect(address, members.identity("anna")) as anna:
            await joined(anna, plan)


async def test_an_upload_that_breaks_off_is_forgotten(
    make_plan: MakePlan, members: Any, connect: Any, contribute: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan()
    async with (
        served(plan, members) as address,
        connect(address, members.identity("anna")) as anna,
        connect(address, members.identity("bert")) as bert,
    ):
        await joined(anna, plan)
        await joined(bert, plan)
        await round_opened(anna, 1)
        content = contribute(np.ones((2, 3), np.float32), 1)

        async def half() -> AsyncIterator[PayloadChunk]:
            yield next(split(Payload(1, content, step=1)))
            await asyncio.sleep(3600)

        upload = anna.round.SubmitStep(half())
        await asyncio.sleep(0.1)
        upload.cancel()
        await outcome(anna.round.SubmitStep(split(Payload(1, content, step=1))))
        assert (await outcome(anna.federation.Await(fed.AwaitRequest(instance_id="1")))).step_received == 1
    assert "failed" not in caplog.text, "a client that hangs up is no fault of the server"


async def test_a_fault_of_the_server_is_told_without_details(
    make_plan: MakePlan, members: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Defective(SqlStore):
        def save_member(self, member: Any) -> Any:
            raise ValueError("a defect in /secret/path")

    plan = make_plan()
    async with (
        served(plan, members, store=Defective.in_memory(plan)) as address,
        connect(address, members.identity("anna")) as anna,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anna.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert not caught.value.details()
        assert "a defect in /secret/path" in caplog.text
        with pytest.raises(PfedError, match="the server failed while it answered"):
            raise_from(caught.value)


@pytest.mark.parametrize(
    "fault",
    [
        OSError("no space left on /secret/path"),
        OperationalError("COMMIT", {}, sqlite3.OperationalError("/secret/path: database is locked")),
    ],
)
async def test_a_fault_of_the_storage_may_pass(
    make_plan: MakePlan, members: Any, connect: Any, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    class Faulty(SqlStore):
        faults = 1

        def save_member(self, member: Any) -> Any:
            if self.faults:
                self.faults -= 1
                raise fault
            return super().save_member(member)

    plan = make_plan()
    async with (
        served(plan, members, store=Faulty.in_memory(plan)) as address,
        connect(address, members.identity("anna")) as anna,
    ):
        request = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anna.federation.Join(request)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "the server cannot use its storage at the moment; its log says why"
        assert "Traceback" in caplog.text
        assert str(fault) in caplog.text
        assert (await anna.federation.Join(request)).name == "anna"


async def test_stopping_answers_those_who_wait(make_plan: MakePlan, members: Any, connect: Any) -> None:
    plan = make_plan()
    store = SqlStore.in_memory(plan)
    server = serving(Coordinator(plan, store, context_shape=(2, 3)), ANY_PORT, members.server)
    address = await server.__aenter__()
    async with connect(address, members.identity("anna")) as anna:
        await joined(anna, plan)
        await asyncio.sleep(0.1)
        version = (await outcome(anna.federation.Await(fed.AwaitRequest(instance_id="1")))).version
        waiting = asyncio.ensure_future(
            outcome(anna.federation.Await(fed.AwaitRequest(instance_id="1", seen_version=version, wait_seconds=5)))
        )
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await asyncio.wait_for(server.__aexit__(None, None, None), timeout=3)
        assert (await waiting).version == version
        with pytest.raises(ServerUnreachable):
            await outcome(anna.federation.GetPlan(fed.GetPlanRequest(), timeout=5))
    store.close()


@pytest.mark.parametrize("reuse", [True, False])
async def test_a_port_in_use_is_told(make_plan: MakePlan, members: Any, reuse: bool) -> None:
    plan = make_plan()
    with socket.socket() as other:
        if reuse:  # gRPC would share such a port without a word
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = Address("127.0.0.1", other.getsockname()[1])
        store = SqlStore.in_memory(plan)
        with pytest.raises(AddressInUse, match=f"cannot listen on {address}: Address already in use; stop what"):
            async with serving(Coordinator(plan, store, context_shape=(2, 3)), address, members.server):
                pass
        store.close()


async def test_two_servers_never_share_a_port(make_plan: MakePlan, members: Any) -> None:
    plan = make_plan()
    store = SqlStore.in_memory(plan)
    async with served(plan, members) as address:
        with pytest.raises(AddressInUse):
            async with serving(Coordinator(plan, store, context_shape=(2, 3)), address, members.server):
                pass
    store.close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
async def test_an_address_that_is_not_ours_is_told(make_plan: MakePlan, members: Any, host: str) -> None:
    plan = make_plan()
    store = SqlStore.in_memory(plan)
    with pytest.raises(AddressInUse, match=f"cannot listen on {host}:0: .+; "):
        async with serving(Coordinator(plan, store, context_shape=(2, 3)), Address(host, 0), members.server):
            pass
    store.close()


async def test_plain_text_takes_claims_from_this_machine_only(make_plan: MakePlan) -> None:
    plan = make_plan()
    store = SqlStore.in_memory(plan)
    coordinator = Coordinator(plan, store, context_shape=(2, 3))
    with pytest.raises(InsecureTransport, match=r"--insecure would send plain text to or from 0\.0\.0\.0"):
        async with serving(coordinator, Address("0.0.0.0", 0), None):
            pass
    async with (
        serving(coordinator, ANY_PORT, None) as address,
        grpc.aio.insecure_channel(str(address), CHANNEL_OPTIONS) as channel,
    ):
        request = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
        stub = FederationStub(channel)
        reply = await stub.Join(request, metadata=((CLAIMED_NAME_KEY, "anna"),))
        assert reply.name == "anna"
        with pytest.raises(IdentityError, match="name '' is not allowed"):
            await outcome(stub.Join(request))
        claims = ((CLAIMED_NAME_KEY, "anna"), (CLAIMED_ROLE_KEY, "king"))
        with pytest.raises(IdentityError, match="there is no role 'king'"):
            await outcome(stub.Join(request, metadata=claims))
        claims = ((CLAIMED_NAME_KEY, "olga"), (CLAIMED_ROLE_KEY, "operator"))
        status = await OperationsStub(channel).GetStatus(ops.GetStatusRequest(), metadata=claims)
        assert status.transport == "insecure"
    store.close()
