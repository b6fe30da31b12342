"""The server over real gRPC: payloads, errors, patience, and what ends patience at once."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from pfed_client import grpc_api
from pfed_client.grpc_api import GrpcApi
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.aggregation.interface import Contribution, RoundIdentity
from pfedsecure.aggregation.plain import PlainClientAggregation
from pfedsecure.console import Address
from pfedsecure.errors import (
    IdentityError,
    InsecureTransport,
    MessageRejected,
    NotAMember,
    PfedError,
    PlanMismatch,
    ServerUnreachable,
    TooManyCalls,
)
from pfedsecure.matching.plain import PlainClientMatching
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.plan import Plan
from pfedsecure.wire.payloads import CHUNK_BYTES, MAX_PAYLOAD_BYTES, Payload, join_one, split
from pfedsecure.wire.status import abort
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.expert_pb2 import PlainExpert
from pfedsecure.wire.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk, PayloadHeader, PlainMatchAnswer, Publication
from pfedsecure.wire.v1.round_pb2_grpc import RoundServicer, add_RoundServicer_to_server

ANY_PORT = Address("127.0.0.1", 0)
WIDE = (64, 2000)
"""A context of 512 kB: every payload takes several chunks."""


@asynccontextmanager
async def served(
    plan: Plan, shape: tuple[int, int], identity: Any, address: Address = ANY_PORT
) -> AsyncIterator[Address]:
    store = SqlStore.in_memory(plan)
    async with serving(Coordinator(plan, store, context_shape=shape), address, identity) as bound:
        yield bound
    store.close()


@asynccontextmanager
async def played(address: Address = ANY_PORT, **methods: Callable[..., Any]) -> AsyncIterator[Address]:
    """A plain-text server that answers with the given methods of either service."""

    class Federation(FederationServicer): ...

    class Round(RoundServicer): ...

    for name, method in methods.items():
        setattr(Federation if hasattr(FederationServicer, name) else Round, name, staticmethod(method))
    server = grpc.aio.server()
    add_FederationServicer_to_server(Federation(), server)
    add_RoundServicer_to_server(Round(), server)
    port = server.add_insecure_port(str(address))
    await server.start()
    yield Address(address.host, port)
    await server.stop(None)


def free_address() -> Address:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", probe.getsockname()[1])


async def timed(call: Awaitable[Any]) -> tuple[PfedError, float]:
    """The error of a call and the seconds it took."""
    started = time.monotonic()
    with pytest.raises(PfedError) as caught:
        await call
    return caught.value, time.monotonic() - started


async def test_a_round_of_large_payloads(members: Any, make_plan: Callable[..., Plan]) -> None:
    """Two clients through a round over mutual TLS; in the next each fetches what the other published."""
    plan = make_plan(prompt__context_length=WIDE[0], backbone__text_width=WIDE[1])
    contexts = {
        name: np.random.default_rng(seed).normal(scale=0.1, size=WIDE).astype(np.float32)
        for seed, name in enumerate("ab")
    }
    matching = PlainClientMatching()
    async with (
        served(plan, WIDE, members.server) as address,
        GrpcApi(address, members.identity("a"), retry_seconds=0) as a,
        GrpcApi(address, members.identity("b"), retry_seconds=0) as b,
    ):
        apis = {"a": a, "b": b}
        assert Plan.from_json((await a.get_plan()).plan_json) == plan
        for name, api in apis.items():
            reply = await api.join(fed.JoinRequest(plan_digest=plan.digest(), instance_id=name))
            assert reply.name == name
        assert (await until_round(a, "a", 1)).selected
        assert await a.get_global_prompt(1) == b""
        for name, api in apis.items():
            assert (await api.heartbeat(fed.HeartbeatRequest(instance_id=name))).round_open
            expert = PlainExpert(context=to_tensor(contexts[name])).SerializeToString()
            publication = Publication(expert=expert, sketch=matching.sketch(contexts[name], 1)).SerializeToString()
            assert len(publication) > 3 * CHUNK_BYTES
            await api.publish_expert(1, publication)
            await api.submit_step(1, 1, plain_message(contexts[name]))
        await until_round(a, "a", 2)
        mean = to_tensor(((contexts["a"].astype(float) + contexts["b"]) / 2).astype(np.float32))
        assert await a.get_global_prompt(0) == await b.get_global_prompt(2) == mean.SerializeToString()
        query = rnd.MatchRequest(round=2, query=matching.query(contexts["a"], 1, 2), experts=1)
        (candidate,) = PlainMatchAnswer.FromString(await a.match(query)).candidates
        experts = await a.get_experts(2, [candidate.expert_id])
        assert PlainExpert.FromString(experts[candidate.expert_id]).context == to_tensor(contexts["b"])
        assert await a.get_experts(2, []) == {}
        await b.leave(fed.LeaveRequest(instance_id="b"))
        with pytest.raises(NotAMember):
            await b.heartbeat(fed.HeartbeatRequest(instance_id="b"))


def plain_message(context: np.ndarray) -> bytes:
    """What a client with one image sends when aggregation is plain."""
    identity = RoundIdentity("0f" * 16, 1, "ab" * 32)
    return PlainClientAggregation().begin(identity, Contribution(context, 1), lambda saved: None).message


async def until_round(api: GrpcApi, instance_id: str, number: int) -> fed.FederationView:
    version = 0
    while True:
        view = await api.await_view(fed.AwaitRequest(instance_id=instance_id, seen_version=version, wait_seconds=5))
        if view.round == number and view.phase == fed.FEDERATION_PHASE_ROUND_OPEN:
            return view
        version = view.version


async def test_errors_of_the_server_arrive_as_they_were_raised(members: Any, make_plan: Callable[..., Plan]) -> None:
    """At once, although the client has a minute's patience with a server that does not answer."""
    plan = make_plan()
    async with (
        served(plan, (2, 3), members.server) as address,
        GrpcApi(address, members.identity("a"), retry_seconds=60) as api,
    ):
        with pytest.raises(PlanMismatch, match="this server has digest"):
            await api.join(fed.JoinRequest(plan_digest="0" * 64, instance_id="a"))
        with pytest.raises(NotAMember, match="a does not take part"):
            await api.get_global_prompt(0)
        await api.join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="a"))
        with pytest.raises(MessageRejected, match="round 1 has not been opened"):
            await api.submit_step(1, 1, b"x")
        with pytest.raises(MessageRejected, match="round 1 has not been opened"):
            await api.get_step_request(1, 2)
        with pytest.raises(MessageRejected, match="expert 'e' is not another member's"):
            await api.report_expert(rnd.ReportExpertRequest(round=1, expert_id="e"))
        with pytest.raises(MessageRejected, match="over the limit"):
            await api.publish_expert(1, bytes(2**20))
        with pytest.raises(MessageRejected, match="over the size limit"):
            await api.match(rnd.MatchRequest(round=1, query=bytes(2**21), experts=1))


async def test_a_server_that_is_not_there(members: Any) -> None:
    address = free_address()
    pauses: list[tuple[PfedError, float]] = []
    async with GrpcApi(
        address, members.identity("a"), retry_seconds=2, on_retry=lambda *pause: pauses.append(pause)
    ) as api:
        error, seconds = await timed(api.get_plan())
    assert type(error) is ServerUnreachable
    assert str(error).startswith(f"tried for 2 s: nothing listens at {address}: start pfed-server")
    assert seconds < 2.5
    assert pauses
    assert all(isinstance(reason, ServerUnreachable) and 0 <= pause <= 10 for reason, pause in pauses)
    async with GrpcApi(address, members.identity("a"), retry_seconds=0) as api:
        error, seconds = await timed(api.get_plan())
    assert str(error).startswith("nothing listens")
    assert seconds < 1


async def test_a_server_that_comes_back(members: Any, make_plan: Callable[..., Plan]) -> None:
    address, plan = free_address(), make_plan()
    async with GrpcApi(address, members.identity("a"), retry_seconds=30) as api:
        call = asyncio.create_task(api.get_plan())
        await asyncio.sleep(0.5)
        assert not call.done()
        async with served(plan, (2, 3), members.server, address):
            first = await asyncio.wait_for(call, 20)
        second = asyncio.create_task(api.get_plan())
        await asyncio.sleep(0.5)
        async with served(plan, (2, 3), members.server, address):
            again = await asyncio.wait_for(second, 20)
    assert first.plan_digest == again.plan_digest == plan.digest()
    assert first.federation_id != again.federation_id  # two servers, one client


async def test_a_lost_answer_is_asked_for_again_with_the_same_content() -> None:
    seen: list[bytes] = []

    async def submit(chunks: AsyncIterator[PayloadChunk], context: Any) -> rnd.Receipt:
        content = b"".join([chunk.SerializeToString() async for chunk in chunks])
        seen.append(content)
        if len(seen) < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
        return rnd.Receipt(sha256=b"r" * 32)

    async with (
        played(SubmitStep=submit) as address,
        GrpcApi(address, None, claimed_name="a", retry_seconds=30) as api,
    ):
        assert (await api.submit_step(1, 1, bytes(3 * CHUNK_BYTES))).sha256 == b"r" * 32
    assert len(seen) == 3
    assert len(set(seen)) == 1


async def test_messages_and_requests_of_a_step() -> None:
    """In chunks, with round and step beside them, and again after a lost answer."""
    message, request = bytes(range(256)) * 3000, bytes(reversed(range(256))) * 3000
    assert min(len(message), len(request)) > 2 * CHUNK_BYTES
    received: list[Payload] = []
    asked: list[rnd.StepRequest] = []

    async def submit(chunks: AsyncIterator[PayloadChunk], context: Any) -> rnd.Receipt:
        received.append(await join_one(chunks))
        if len(received) < 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
        return rnd.Receipt(sha256=b"r" * 32)

    async def answer(step: rnd.StepRequest, context: Any) -> AsyncIterator[PayloadChunk]:
        asked.append(step)
        chunks = list(split(Payload(step.round, request, step=step.step)))
        for chunk in chunks[:2] if len(asked) < 2 else chunks:
            yield chunk
        if len(asked) < 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")

    async with (
        played(SubmitStep=submit, GetStepRequest=answer) as address,
        GrpcApi(address, None, claimed_name="a", retry_seconds=30) as api,
    ):
        assert await api.get_step_request(7, 3) == request
        assert (await api.submit_step(7, 3, message)).sha256 == b"r" * 32
    assert asked == [rnd.StepRequest(round=7, step=3)] * 2
    assert received == [Payload(7, message, step=3)] * 2


@pytest.mark.parametrize(("number", "step"), [(7, 4), (6, 3), (7, 0)])
async def test_a_request_of_another_step(number: int, step: int) -> None:
    method = streaming(*split(Payload(number, b"x", step=step)))
    async with (
        played(GetStepRequest=method) as address,
        GrpcApi(address, None, claimed_name="a", retry_seconds=60) as api,
    ):
        with pytest.raises(MessageRejected, match=f"the server sent step {step} of round {number} unasked"):
            await api.get_step_request(7, 3)


async def test_reports_of_experts() -> None:
    reports: list[rnd.ReportExpertRequest] = []

    async def report(request: rnd.ReportExpertRequest, context: Any) -> rnd.ReportExpertReply:
        reports.append(request)
        if len(reports) < 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
        return rnd.ReportExpertReply()

    bad = rnd.ReportExpertRequest(round=7, expert_id="e" * 32)
    async with played(ReportExpert=report) as address, GrpcApi(address, None, retry_seconds=30) as api:
        assert await api.report_expert(bad) == rnd.ReportExpertReply()
    assert reports == [bad, bad]


async def test_a_fault_of_the_servers_storage_that_passes_ends_no_client(
    members: Any, make_plan: Callable[..., Plan]
) -> None:
    class Locked(SqlStore):
        faults = 2

        def save_member(self, member: Any) -> Any:
            if self.faults:
                self.faults -= 1
                raise OperationalError("COMMIT", {}, sqlite3.OperationalError("database is locked"))
            return super().save_member(member)

    plan, reasons = make_plan(), []
    store = Locked.in_memory(plan)
    async with (
        serving(Coordinator(plan, store, context_shape=(2, 3)), ANY_PORT, members.server) as address,
        GrpcApi(
            address, members.identity("a"), retry_seconds=30, on_retry=lambda reason, _: reasons.append(str(reason))
        ) as api,
    ):
        assert (await api.join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="a"))).name == "a"
    store.close()
    assert reasons == ["the server cannot use its storage at the moment; its log says why"] * 2


async def test_where_one_server_does_not_answer_the_next_is_asked_and_stayed_with(
    members: Any, make_plan: Callable[..., Plan]
) -> None:
    plan, reasons = make_plan(), []

    def told(reason: PfedError, _pause: float) -> None:
        reasons.append(str(reason))

    async with (
        served(plan, (2, 3), members.server) as address,
        GrpcApi(free_address(), members.identity("a"), others=[address], retry_seconds=30, on_retry=told) as api,
    ):
        joining = api.join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="a"))
        reply, _ = await asyncio.gather(joining, api.get_plan())  # both turn from the first, and neither back to it
        assert reply.name == "a"
        assert len(reasons) == 2
        assert all(reason.startswith("nothing listens at") for reason in reasons)
        await api.heartbeat(fed.HeartbeatRequest(instance_id="a"))
        assert len(reasons) == 2


async def test_a_server_that_cannot_use_its_storage_is_turned_from_too(
    members: Any, make_plan: Callable[..., Plan]
) -> None:
    class Full(SqlStore):
        def save_member(self, member: Any) -> Any:
            raise OSError("no space left on device")

    plan, reasons = make_plan(), []
    store = Full.in_memory(plan)
    async with (
        serving(Coordinator(plan, store, context_shape=(2, 3)), ANY_PORT, members.server) as full,
        served(plan, (2, 3), members.server) as address,
        GrpcApi(
            full,
            members.identity("a"),
            others=[address],
            retry_seconds=30,
            on_retry=lambda reason, _: reasons.append(str(reason)),
        ) as api,
    ):
        assert (await api.join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="a"))).name == "a"
    store.close()
    assert reasons == ["the server cannot use its storage at the moment; its log says why"]


async def test_one_refusal_may_be_a_server_going_down_two_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([InsecureTransport("1"), ServerUnreachable("2"), IdentityError("3"), IdentityError("4")])
    monkeypatch.setattr(grpc_api, "explain_connection_failure", lambda *_: next(verdicts))
    reasons: list[str] = []
    async with GrpcApi(
        free_address(), None, retry_seconds=60, on_retry=lambda reason, _: reasons.append(str(reason))
    ) as api:
        error, _ = await timed(api.get_plan())
    assert type(error) is IdentityError
    assert str(error) == "4"
    assert reasons == ["1", "2", "3"]


async def test_refused_identities_and_transports_end_at_once(
    members: Any, tmp_path: Path, make_plan: Callable[..., Plan]
) -> None:
    ensure_development_pki(tmp_path / "other")
    stranger = enrol(tmp_path / "other", "a", "client", tmp_path / "stranger")
    async with served(make_plan(), (2, 3), members.server) as secure, served(make_plan(), (2, 3), None) as plain:
        for address, identity, kind, message in [
            (secure, stranger, IdentityError, "is not of authority"),
            (secure, None, InsecureTransport, "speaks TLS, this client plain text: leave --insecure off"),
            (plain, members.identity("a"), InsecureTransport, "speaks plain text, this client TLS"),
        ]:
            async with GrpcApi(address, identity, claimed_name="a", retry_seconds=600) as api:
                error, seconds = await timed(api.get_plan())
            assert type(error) is kind
            assert message in str(error)
            assert seconds < 10
        async with GrpcApi(plain, None, claimed_name="a", retry_seconds=0) as api:
            reply = await api.join(fed.JoinRequest(plan_digest=make_plan().digest(), instance_id="i"))
            assert reply.name == "a"


async def test_plain_text_never_leaves_the_machine() -> None:
    with pytest.raises(InsecureTransport, match="--insecure would send plain text"):
        GrpcApi(Address("fl.example.org", 8470), None, retry_seconds=0)


def streaming(*chunks: PayloadChunk) -> Callable[..., AsyncIterator[PayloadChunk]]:
    async def stream(_request: Any, _context: Any) -> AsyncIterator[PayloadChunk]:
        for chunk in chunks:
            yield chunk

    return stream


@pytest.mark.parametrize(
    ("payloads", "message"),
    [
        ([Payload(2, b"1", "e"), Payload(2, b"2", "e")], "other experts than were asked for"),
        ([Payload(1, b"1", "e"), Payload(1, b"2", "f")], "other experts than were asked for"),
        ([Payload(2, b"1", "e"), Payload(2, b"2", "f"), Payload(2, b"3", "g")], "more than 2 payloads"),
    ],
)
async def test_streams_of_other_experts(payloads: list[Payload], message: str) -> None:
    method = streaming(*(chunk for payload in payloads for chunk in split(payload)))
    async with played(GetExperts=method) as address, GrpcApi(address, None, claimed_name="a", retry_seconds=60) as api:
        with pytest.raises(MessageRejected, match=message):
            await api.get_experts(2, ["e", "f"])


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "holds no payload"),
        (list(split(Payload(3, b"x"))), "global prompt of round 3, not 2"),
        ([PayloadChunk(header=PayloadHeader(round=2, size=MAX_PAYLOAD_BYTES + 1))], "over the limit"),
        ([PayloadChunk(header=PayloadHeader(round=2, size=1)), PayloadChunk(data=b"x")], "does not match its digest"),
    ],
)
async def test_streams_that_hold_no_prompt(chunks: list[PayloadChunk], message: str) -> None:
    async with (
        played(GetGlobalPrompt=streaming(*chunks)) as address,
        GrpcApi(address, None, claimed_name="a", retry_seconds=60) as api,
    ):
        with pytest.raises(MessageRejected, match=message):
            await api.get_global_prompt(2)


async def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call has its time; after that the server counts as not reached."""

    async def plan(_request: Any, _context: Any) -> fed.GetPlanReply:
        await asyncio.sleep(30)
        raise AssertionError("the client went on waiting")

    monkeypatch.setattr(grpc_api, "CALL_SECONDS", 0.3)
    async with played(GetPlan=plan) as address, GrpcApi(address, None, claimed_name="a", retry_seconds=0) as api:
        error, seconds = await timed(api.get_plan())
    assert type(error) is ServerUnreachable
    assert seconds < 5


def test_tls_settings_come_before_grpc() -> None:
    script = (
        "import pfed_client.grpc_api\n"
        "from pfedsecure.wire.grpc_settings import require_tls13_only\n"
        "require_tls13_only()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_a_server_that_says_to_wait_is_asked_again() -> None:
    told: list[PfedError] = []

    async def heartbeat(_request: Any, context: Any) -> fed.HeartbeatReply:
        if len(told) < 3:
            await abort(context, TooManyCalls("client a makes more than 100 calls a second: wait, then try again"))
        return fed.HeartbeatReply(round=7)

    async with played(Heartbeat=heartbeat) as address:
        async with GrpcApi(
            address, None, claimed_name="a", retry_seconds=60, on_retry=lambda reason, _pause: told.append(reason)
        ) as api:
            assert (await api.heartbeat(fed.HeartbeatRequest())).round == 7
        assert {type(reason) for reason in told} == {TooManyCalls}
        told.clear()
        async with GrpcApi(address, None, claimed_name="a", retry_seconds=0) as impatient:
            with pytest.raises(TooManyCalls, match="wait, then try again"):
                await impatient.heartbeat(fed.HeartbeatRequest())
