"""What a server's audit log says of a federation over mutual TLS: joins, refusals, rounds and their protections."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from pfed_server import audit
from pfed_server.app import serving
from pfed_server.audit import AUDIT_FILE, AuditLog
from pfed_server.audit_chain import verify
from pfed_server.coordinator import Coordinator
from pfed_server.events import Event
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.plan import Plan
from pfedsecure.wire.payloads import Payload, split
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
CONTEXT = np.arange(6, dtype=np.float32).reshape(SHAPE) / 7


@asynccontextmanager
async def audited(plan: Plan, members: Any, folder: Path) -> AsyncIterator[Address]:
    with closing(SqlStore.open(folder, plan)) as store, closing(AuditLog.open(folder)) as log:
        authority = members.server.authority
        coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=authority, tell=log.tell)
        async with serving(coordinator, Address("127.0.0.1", 0), members.server) as address:
            yield address


def entries(folder: Path) -> list[dict[str, Any]]:
    verify(folder / AUDIT_FILE)
    return [json.loads(line) for line in (folder / AUDIT_FILE).read_bytes().splitlines()]


async def join(stubs: Any, plan: Plan, instance: str = "1", digest: str = "") -> None:
    await stubs.federation.Join(fed.JoinRequest(plan_digest=digest or plan.digest(), instance_id=instance))


async def opened(stubs: Any, number: int) -> None:
    version = 0
    while True:
        request = fed.AwaitRequest(instance_id="1", seen_version=version, wait_seconds=5)
        view = await stubs.federation.Await(request)
        if view.round == number and view.selected:
            return
        version = view.version


async def test_a_round_from_start_to_stop(
    make_plan: MakePlan, members: Any, connect: Any, contribute: Any, tmp_path: Path
) -> None:
    plan = make_plan(count=1, experts=0, start_clients=3, deadline_seconds=2)
    anna, bert, cleo = (members.identity(name) for name in ("anna", "bert", "cleo"))
    async with (
        asyncio.timeout(30),
        audited(plan, members, tmp_path) as address,
        connect(address, anna) as first,
        connect(address, bert) as second,
        connect(address, cleo) as third,
    ):
        for stubs in (first, second, third):
            await join(stubs, plan)
        await join(first, plan)  # again, which changes nothing
        await opened(first, 1)
        for stubs in (first, second):
            await stubs.round.SubmitStep(split(Payload(1, contribute(CONTEXT, 77_777), step=1)))
        while not (await first.federation.Await(fed.AwaitRequest(instance_id="1"))).rounds_completed:
            await asyncio.sleep(0.05)
        await third.federation.Leave(fed.LeaveRequest(instance_id="1"))

    found = entries(tmp_path)
    assert [(entry["event"], entry.get("peer"), entry.get("round")) for entry in found] == [
        ("server-started", None, None),
        ("joined", "anna", None),
        ("joined", "bert", None),
        ("joined", "cleo", None),
        ("round-opened", None, 1),
        ("round-closed", None, 1),
        ("left", "cleo", None),
        ("server-stopped", None, None),
    ]
    started, joined, _, _, round_opened, closed, *_ = (entry.get("details") for entry in found)
    assert started["plan_digest"] == plan.digest()
    assert (started["transport"], started["aggregation"], started["members"]) == ("mtls", "plain", 0)
    assert joined == {"fingerprint": anna.subject.fingerprint}
    assert (round_opened["cohort"], round_opened["aggregation"], round_opened["dp"]) == (
        3,
        "plain",
        "each client's own",
    )
    assert 0 < closed.pop("seconds") < 30
    assert closed == {"cohort": 3, "updates": 2, "dropouts": {"1": 1}}
    assert "77777" not in (tmp_path / AUDIT_FILE).read_text()


async def test_a_secure_round_tells_its_wiring(make_plan: MakePlan, members: Any, tmp_path: Path) -> None:
    plan = make_plan(experts=0, protection={"aggregation": "secure"}, minimum_cohort=3, deadline_seconds=0.2)
    with closing(AuditLog.open(tmp_path)) as log, closing(SqlStore.in_memory(plan)) as store:
        authority = members.server.authority
        coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=authority, tell=log.tell)
        await coordinator.start()
        for name in ("anna", "bert", "cleo", "dora"):
            request = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
            await coordinator.join(members.peer(name), request)
        async with asyncio.timeout(10):
            while not any(entry["event"] == "round-abandoned" for entry in entries(tmp_path)):
                await asyncio.sleep(0.05)
        await coordinator.stop()
    details = {entry["event"]: entry["details"] for entry in entries(tmp_path)}
    # Three joined before the fourth did.
    assert {key: details["round-opened"][key] for key in ("holders", "threshold", "quorum")} in (
        {"holders": 2, "threshold": 3, "quorum": 3},
        {"holders": 3, "threshold": 3, "quorum": 3},
    )
    assert details["round-abandoned"]["dropouts"] == {"1": details["round-abandoned"]["cohort"]}


async def test_who_is_refused_stands_there_with_the_reason(
    make_plan: MakePlan, members: Any, connect: Any, tmp_path: Path
) -> None:
    plan = make_plan()
    anna, olga = members.identity("anna"), members.identity("olga", "operator")
    async with audited(plan, members, tmp_path) as address:
        async with connect(address, anna) as stubs:
            for _ in range(3):
                with pytest.raises(grpc.RpcError):
                    await stubs.operations.GetStatus(ops.GetStatusRequest())
            with pytest.raises(grpc.RpcError):
                await join(stubs, plan, digest="0" * 64)
            with pytest.raises(grpc.RpcError):
                await stubs.round.SubmitStep(split(Payload(1, b"secret content", step=1)))
            with pytest.raises(grpc.RpcError):
                await join(stubs, plan, instance="x" * 1000)
        async with connect(address, olga) as stubs:
            with pytest.raises(grpc.RpcError):
                await join(stubs, plan)
            assert (await stubs.operations.GetStatus(ops.GetStatusRequest())).federation == "test"
        async with connect(address, members.identity("anna", key=1)) as stubs, connect(address, anna) as other:
            await join(other, plan)
            with pytest.raises(grpc.RpcError):
                await join(stubs, plan)
    found = [entry for entry in entries(tmp_path) if entry["event"] == "refused"]
    told = [(entry["peer"], entry["details"]["reason"], entry["details"]["method"].split("/")[-1]) for entry in found]
    assert told == [
        ("anna", "IdentityError", "GetStatus"),
        ("anna", "PlanMismatch", "Join"),
        ("anna", "NotAMember", "SubmitStep"),
        ("anna", "MessageRejected", "Join"),
        ("olga", "IdentityError", "Join"),
        ("anna", "NameTaken", "Join"),
    ]
    assert found[0]["details"]["fingerprint"] == anna.subject.fingerprint
    assert found[0]["details"]["why"].startswith("client anna may not do this")
    assert "why" not in found[3]["details"]
    assert found[5]["details"]["fingerprint"] != anna.subject.fingerprint
    assert entries(tmp_path)[-1]["event"] == "server-stopped"
    assert entries(tmp_path)[-2] == entries(tmp_path)[-2] | {
        "event": "repeated",
        "details": {"refused IdentityError": 2},
    }


async def test_a_refusal_is_on_record_before_the_caller_hears_of_it(
    make_plan: MakePlan, members: Any, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is refused may bring the server down with the next packet: what was to be written by then is lost."""
    plan, record = make_plan(), AuditLog.record

    def slowly(log: AuditLog, event: Event) -> None:
        time.sleep(0.3)
        record(log, event)

    monkeypatch.setattr(AuditLog, "record", slowly)
    async with audited(plan, members, tmp_path) as address, connect(address, members.identity("anna")) as stubs:
        for number, call in enumerate((join(stubs, plan, digest="0" * 64), opened(stubs, 1)), start=1):
            with pytest.raises(grpc.RpcError):
                await call
            assert [entry["event"] for entry in entries(tmp_path)] == ["server-started", *["refused"] * number]


async def test_a_refusal_that_cannot_be_written_is_answered_and_written_later(
    make_plan: MakePlan, members: Any, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can fill the disk must not be able to stop the federation with it."""
    plan = make_plan()

    def full(_descriptor: int, _data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with audited(plan, members, tmp_path) as address, connect(address, members.identity("anna")) as stubs:
        with monkeypatch.context() as patch:
            patch.setattr(audit.os, "write", full)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await join(stubs, plan, digest="0" * 64)
            await join(stubs, plan)
            assert [entry["event"] for entry in entries(tmp_path)] == ["server-started"]
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert [entry["event"] for entry in entries(tmp_path)] == ["server-started", "refused", "joined", "server-stopped"]
