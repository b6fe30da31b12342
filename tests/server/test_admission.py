"""Floods, slow callers and connections that never finish, against real servers; and memory meanwhile."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import func, select

from pfed_server import app
from pfed_server.admission import LOG_AGAIN_SECONDS, AdmissionGuard, Limits
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.schema import MatchingRow, MessageRow, PartRow, PoolRow
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import MessageRejected, ServerUnreachable, TooManyCalls
from pfedsecure.pki.certificates import to_pem
from pfedsecure.plan import Plan
from pfedsecure.wire.options import MOST_CONNECTIONS, SERVER_OPTIONS
from pfedsecure.wire.status import raise_from
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
ANY_PORT = Address("127.0.0.1", 0)
MIB = 1 << 20


def resident() -> int:
    """Bytes of memory of this process, server and attackers together."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


@asynccontextmanager
async def served(
    plan: Plan,
    members: Any,
    limits: Limits = Limits(),  # noqa: B008
    connections: int = MOST_CONNECTIONS,
) -> AsyncIterator[Address]:
    store = SqlStore.in_memory(plan)
    coordinator = Coordinator(plan, store, context_shape=(2, 3))
    async with serving(coordinator, ANY_PORT, members.server, limits=limits, connections=connections) as address:
        yield address
    store.close()


async def outcome(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise_from(error)


def ask(stubs: Any) -> Any:
    return outcome(stubs.federation.GetPlan(fed.GetPlanRequest(), timeout=30))


class Ticks:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


async def admitted(guard: AdmissionGuard, peer: Any, calls: int) -> int:
    """How many of so many calls, one after the other, get in."""
    passed = 0
    for _ in range(calls):
        try:
            async with guard(peer):
                passed += 1
        except TooManyCalls:
            pass
    return passed


async def test_a_burst_and_then_so_many_a_second(ticks: Ticks, members: Any) -> None:
    anna, bert = members.peer("anna"), members.peer("bert")
    guard = AdmissionGuard(Limits(calls_a_second=10, burst_seconds=3), ticks)
    assert await admitted(guard, anna, 100) == 30
    assert await admitted(guard, bert, 5) == 5  # another's flood is nothing to it
    for seconds, more in ((0.05, 0), (0.06, 1), (2.0, 20), (1000.0, 30)):
        ticks.now += seconds
        assert await admitted(guard, anna, 100) == more


async def test_what_is_remembered_of_callers_is_forgotten(
    ticks: Ticks, members: Any, caplog: pytest.LogCaptureFixture
) -> None:
    guard = AdmissionGuard(Limits(calls_a_second=1, burst_seconds=1), ticks)
    anna, bert = members.peer("anna"), members.peer("bert")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await admitted(guard, anna, 1000)
            ticks.now += LOG_AGAIN_SECONDS / 2
    assert len(caplog.records) == 2  # not one for each call
    assert "client anna makes more than 1 calls a second" in caplog.text
    async with guard(anna):
        ticks.now += 10 * LOG_AGAIN_SECONDS
        await admitted(guard, bert, 1)
        assert guard.accounts == 2  # a call of anna's is still under way
    ticks.now += 10 * LOG_AGAIN_SECONDS
    await admitted(guard, bert, 1)
    assert guard.accounts == 1


async def test_who_asks_too_often_is_told_to_wait_and_nobody_else_is(
    make_plan: MakePlan, members: Any, connect: Any
) -> None:
    limits = Limits(calls_a_second=1, burst_seconds=20)
    async with (
        served(make_plan(), members, limits) as address,
        connect(address, members.identity("anna")) as anna,
        connect(address, members.identity("anna")) as anna_again,
        connect(address, members.identity("bert")) as bert,
    ):
        answers: list[Any] = []
        for _ in range(15):
            answers += await asyncio.gather(
                ask(anna), ask(anna_again), ask(anna), ask(anna_again), return_exceptions=True
            )
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert 20 <= len(answers) - len(refused) < 60
        assert refused
        assert {type(error) for error in refused} == {TooManyCalls}
        assert "client anna makes more than 1 calls a second: wait, then try again" in {str(e) for e in refused}
        await ask(bert)


async def test_calls_at_once_are_counted_over_all_connections(make_plan: MakePlan, members: Any, connect: Any) -> None:
    plan = make_plan(heartbeat_seconds=20)
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(served(plan, members, Limits(calls_at_once=4)))
        connections = [await stack.enter_async_context(connect(address, members.identity("anna"))) for _ in range(5)]
        await outcome(connections[0].federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")))
        version = -1
        while version != (version := (await outcome(view(connections[0]))).version):
            await asyncio.sleep(0.1)
        waiting = [asyncio.ensure_future(outcome(view(stubs, version))) for stubs in connections[:4]]
        await asyncio.sleep(0.3)
        assert not any(call.done() for call in waiting)
        with pytest.raises(TooManyCalls, match="client anna makes more than 4 calls at once"):
            await ask(connections[4])
        waiting[0].cancel()
        await asyncio.sleep(0.3)
        await ask(connections[4])
        for call in waiting:
            call.cancel()


def view(stubs: Any, seen: int = 0) -> Any:
    wait = 0 if not seen else 20
    return stubs.federation.Await(fed.AwaitRequest(instance_id="1", seen_version=seen, wait_seconds=wait))


@pytest.mark.slow
async def test_a_flood_of_calls_takes_no_memory_and_others_are_answered(
    make_plan: MakePlan, members: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        served(make_plan(), members, Limits(calls_a_second=20)) as address,
        connect(address, members.identity("anna")) as anna,
        connect(address, members.identity("bert")) as bert,
    ):
        await flooded(anna, 300)  # so that what is made once is there
        before, lines = resident(), len(caplog.records)
        for _ in range(10):
            await flooded(anna, 300)
            await ask(bert)
        assert resident() - before < 32 * MIB
        assert len(caplog.records) - lines <= 2  # of its certificate, and of its name


async def flooded(stubs: Any, calls: int) -> None:
    answers = await asyncio.gather(*(ask(stubs) for _ in range(calls)), return_exceptions=True)
    # gRPC itself turns streams away that a caller opens before it has heard how many it may.
    assert {type(answer) for answer in answers} <= {fed.GetPlanReply, TooManyCalls, ServerUnreachable}


@contextmanager
def sockets(address: Address, count: int) -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    try:
        opened.extend(socket.create_connection(address, timeout=30) for _ in range(count))
        yield opened
    finally:
        for connection in opened:
            connection.close()


def half_a_hello(connection: socket.socket) -> None:
    """The beginning of a TLS handshake, which never goes on."""
    outgoing = ssl.MemoryBIO()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    connection.sendall(outgoing.read()[:100])


def handshaken(connection: socket.socket, members: Any) -> ssl.SSLSocket:
    """A whole handshake with a good certificate, and then not a word of HTTP/2."""
    identity = members.identity("mallory")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=to_pem(identity.authority).decode())
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(identity.certificate_path, identity.key_path)
    return context.wrap_socket(connection, server_hostname="127.0.0.1")


def closed(connection: socket.socket) -> bool:
    """Whether the other side closes this connection within the timeout."""
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def with_options(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    names = {"handshake": "grpc.server_handshake_timeout_ms", "settings": "grpc.http2.settings_timeout"}
    names |= {"idle": "grpc.max_connection_idle_ms"}
    changed = dict(SERVER_OPTIONS) | {names[name]: value for name, value in values.items()}
    assert set(changed) == {name for name, _ in SERVER_OPTIONS}
    monkeypatch.setattr(app, "SERVER_OPTIONS", tuple(changed.items()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["silent", "half a hello", "handshaken"])
async def test_connections_that_never_finish_are_closed_and_take_little_memory(
    kind: str, make_plan: MakePlan, members: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 150 handshakes one after the other take a busy machine longer than silence is given here.
    with_options(monkeypatch, handshake=60_000 if kind == "handshaken" else 3000, settings=3000)
    async with served(make_plan(), members) as address, connect(address, members.identity("anna")) as anna:
        await ask(anna)
        before = resident()
        with sockets(address, 150) as opened:

            def attack() -> list[socket.socket]:
                if kind == "half a hello":
                    for connection in opened:
                        half_a_hello(connection)
                return [handshaken(connection, members) for connection in opened] if kind == "handshaken" else opened

            attacking = await asyncio.to_thread(attack)
            await ask(anna)
            async with connect(address, members.identity("bert")) as bert:
                await ask(bert)
            assert resident() - before < 48 * MIB
            assert await asyncio.to_thread(lambda: all(map(closed, attacking)))
            for connection in attacking:
                connection.close()
        await ask(anna)


async def test_connections_over_the_limit_are_closed_at_once_and_those_that_are_open_go_on(
    make_plan: MakePlan, members: Any, connect: Any
) -> None:
    async with (
        served(make_plan(), members, connections=20) as address,
        connect(address, members.identity("anna")) as anna,
    ):
        await ask(anna)
        with sockets(address, 60) as opened:
            for connection in opened:
                connection.settimeout(2)
            refused = await asyncio.to_thread(lambda: sum(map(closed, opened[-30:])))
            assert refused == 30
            await ask(anna)


async def test_a_connection_without_calls_is_closed_and_its_owner_comes_back(
    make_plan: MakePlan, members: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_options(monkeypatch, idle=1000)
    async with served(make_plan(), members) as address, connect(address, members.identity("anna")) as anna:
        await ask(anna)
        while anna.raw.get_state() is grpc.ChannelConnectivity.READY:
            await asyncio.sleep(0.1)
        await ask(anna)


async def test_what_a_member_can_have_stored_is_bounded(make_plan: MakePlan, drive: Any, members: Any) -> None:
    """It sends all that it may, again and again and always something else, in every way there is."""
    plan = make_plan(minimum_cohort=2, count=3)
    store = SqlStore.in_memory(plan)
    rng = np.random.default_rng(0)

    def stored() -> int:
        columns = (MessageRow.message, PartRow.expert, PartRow.sketch, PoolRow.expert, PoolRow.sketch)
        with store._transaction() as session:
            sums = [
                session.scalar(select(func.sum(func.length(column)))) or 0 for column in (*columns, MatchingRow.setup)
            ]
        return sum(sums)

    async with drive(plan, store) as driver:
        await driver.join("anna", "mallory")
        await driver.until_round("anna", 1)
        peer, most = members.peer("mallory"), []
        for _ in range(30):
            context = rng.normal(0, 0.02, (2, 3))
            for call in (
                driver.submit("mallory", 1, context),
                driver.publish("mallory", 1, context),
                driver.coordinator.set_up_matching(peer, int(rng.integers(100)), rng.bytes(1000)),
                driver.coordinator.submit_step(peer, 1, 1, rng.bytes(driver.coordinator.max_upload_bytes)),
                driver.coordinator.publish_expert(peer, 1, rng.bytes(driver.coordinator.max_upload_bytes)),
            ):
                with suppress(MessageRejected):
                    await call
            most.append(stored())
    assert 0 < most[0] <= 2 * driver.coordinator.max_upload_bytes
    assert most[-1] == most[0]
    store.close()
