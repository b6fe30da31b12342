"""A stolen certificate against a real server over mutual TLS, before and after it is revoked; and what lists do."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from pfed_server import revocation
from pfed_server.admission import Limits
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.revocation import Revocations
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import IdentityError, NotAMember, TooManyCalls
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import Subject, verify_caller
from pfedsecure.pki.revoking import revoke
from pfedsecure.plan import Plan
from pfedsecure.wire import peer as wire_peer
from pfedsecure.wire.payloads import Payload, split
from pfedsecure.wire.status import raise_from
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops

MakePlan = Callable[..., Plan]
ANY_PORT = Address("127.0.0.1", 0)
LONG = 25.0
"""Seconds that an open call would last by itself, far more than ending it takes."""


class Consortium:
    """An authority of its own, and the file that the server's operator keeps its lists in."""

    def __init__(self, folder: Path, members: Any) -> None:
        self.members = type(members)(folder)
        self.authority = Authority.load(folder / "pki" / "authority")
        self.file = folder / "revoked.crl"
        self.kept = folder / "kept.crl"
        self.publish()

    def revoke(self, *names: str) -> bytes:
        """The list is in its place when this returns."""
        pem = revoke(self.authority, names).list.pem
        self.publish(pem)
        return pem

    def publish(self, pem: bytes | None = None) -> None:
        partial = self.file.with_suffix(".new")
        partial.write_bytes(pem or revoke(self.authority, []).list.pem)
        partial.replace(self.file)

    def revocations(self, *, file: bool = True) -> Revocations:
        return Revocations(self.members.server.authority, self.file if file else None, self.kept)


@pytest.fixture
def consortium(tmp_path: Path, members: Any) -> Consortium:
    return Consortium(tmp_path, members)


@asynccontextmanager
async def served(
    plan: Plan,
    consortium: Consortium,
    revocations: Revocations | None,
    limits: Limits = Limits(),  # noqa: B008
) -> AsyncIterator[Address]:
    store = SqlStore.in_memory(plan)
    coordinator = Coordinator(plan, store, context_shape=(2, 3), authority=consortium.members.server.authority)
    async with serving(coordinator, ANY_PORT, consortium.members.server, revocations, limits) as address:
        yield address
    store.close()


async def outcome(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise_from(error)


def patient_plan(make_plan: MakePlan) -> Plan:
    """Waits as long as a server ever lets its members wait."""
    return make_plan(minimum_cohort=3, heartbeat_seconds=20)


async def join(stubs: Any, plan: Plan) -> None:
    await outcome(stubs.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")))


async def waiting(stubs: Any) -> asyncio.Task[Any]:
    """A call for news, under way, when there are none."""
    version = -1
    while version != (version := (await outcome(stubs.federation.Await(fed.AwaitRequest(instance_id="1")))).version):
        await asyncio.sleep(0.1)
    request = fed.AwaitRequest(instance_id="1", seen_version=version, wait_seconds=60)
    call = asyncio.create_task(outcome(stubs.federation.Await(request)))
    await asyncio.sleep(0.2)
    assert not call.done()
    return call


async def uploading(stubs: Any) -> asyncio.Task[Any]:
    """An upload that says what it will be and then stays silent."""

    async def chunks() -> AsyncIterator[Any]:
        yield next(iter(split(Payload(1, b"x" * 100, step=1))))
        await asyncio.sleep(LONG * 4)

    call = asyncio.create_task(outcome(stubs.round.SubmitStep(chunks())))
    await asyncio.sleep(0.2)
    return call


async def test_a_stolen_certificate_is_shut_out_of_calls_under_way_and_of_the_next(
    make_plan: MakePlan, consortium: Consortium, connect: Any
) -> None:
    plan = patient_plan(make_plan)
    anna, mallory = (consortium.members.identity(name) for name in ("anna", "mallory"))
    async with (
        served(plan, consortium, consortium.revocations()) as address,
        connect(address, anna) as honest,
        connect(address, mallory) as owner,
        connect(address, mallory) as thief,  # with a copy of the same key, on a connection of its own
    ):
        for stubs in (honest, owner):
            await join(stubs, plan)
        assert (await outcome(thief.federation.Heartbeat(fed.HeartbeatRequest(instance_id="1")))).round == 0
        under_way = [await waiting(thief), await waiting(owner)]
        watching = thief.health.Watch(health_pb2.HealthCheckRequest())
        assert await watching.read() != grpc.aio.EOF
        consortium.revoke("mallory")
        for stubs in (thief, owner):  # at once, on the connections that are open
            with pytest.raises(IdentityError, match="certificate of client mallory was revoked: ask"):
                await outcome(stubs.federation.Heartbeat(fed.HeartbeatRequest(instance_id="1")))
        async with asyncio.timeout(LONG):
            for call in under_way:
                with pytest.raises(IdentityError, match="was revoked"):
                    await call
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await watching.read()
        assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with connect(address, mallory) as again:
            for call in (
                again.federation.GetPlan(fed.GetPlanRequest()),
                again.health.Check(health_pb2.HealthCheckRequest()),
                again.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")),
            ):
                with pytest.raises(IdentityError, match="was revoked"):
                    await outcome(call)
        async with asyncio.timeout(LONG):  # that it is a member no longer is stored after it was refused
            while (await outcome(honest.federation.Await(fed.AwaitRequest(instance_id="1")))).clients_online != 1:
                await asyncio.sleep(0.05)


async def test_an_upload_under_way_is_ended(make_plan: MakePlan, consortium: Consortium, connect: Any) -> None:
    plan = make_plan(minimum_cohort=2, heartbeat_seconds=20)
    async with (
        served(plan, consortium, consortium.revocations()) as address,
        connect(address, consortium.members.identity("anna")) as anna,
        connect(address, consortium.members.identity("mallory")) as thief,
    ):
        for stubs in (anna, thief):
            await join(stubs, plan)
        while (await outcome(anna.federation.Await(fed.AwaitRequest(instance_id="1")))).round == 0:
            await asyncio.sleep(0.05)
        call = await uploading(thief)
        assert not call.done()
        consortium.revoke("mallory")
        async with asyncio.timeout(LONG):
            with pytest.raises(IdentityError, match="was revoked"):
                await call


async def test_without_the_list_the_stolen_certificate_goes_on(
    make_plan: MakePlan, consortium: Consortium, connect: Any
) -> None:
    """The same attack on a server that is not given the list: it succeeds."""
    plan = patient_plan(make_plan)
    async with (
        served(plan, consortium, None) as address,
        connect(address, consortium.members.identity("mallory")) as thief,
    ):
        await join(thief, plan)
        call = await waiting(thief)
        consortium.revoke("mallory")
        assert (await outcome(thief.federation.Heartbeat(fed.HeartbeatRequest(instance_id="1")))).round == 0
        await asyncio.sleep(2 * revocation.LOOK_SECONDS)
        assert not call.done()
        call.cancel()


async def test_who_is_refused_gets_no_more_out_of_the_server_than_a_member(
    make_plan: MakePlan, consortium: Consortium, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls as fast as it can, on several connections. Each call that is looked at costs something."""
    verified: Counter[str] = Counter()

    def counted(*arguments: Any) -> Subject:
        subject = verify_caller(*arguments)
        verified[subject.name] += 1
        return subject

    monkeypatch.setattr(wire_peer, "verify_caller", counted)
    plan, mallory = patient_plan(make_plan), consortium.members.identity("mallory")
    async with (
        served(plan, consortium, consortium.revocations(), Limits(calls_a_second=1, burst_seconds=40)) as address,
        connect(address, consortium.members.identity("anna")) as honest,
        connect(address, mallory) as thief,
        connect(address, mallory) as thief_again,
    ):
        await join(honest, plan)
        await join(thief, plan)
        consortium.revoke("mallory")
        verified.clear()
        answers: Counter[type] = Counter()
        for _ in range(30):
            calls = (outcome(stubs.federation.GetPlan(fed.GetPlanRequest())) for stubs in (thief, thief_again))
            answers.update(map(type, await asyncio.gather(*calls, return_exceptions=True)))
        assert set(answers) == {IdentityError, TooManyCalls}
        assert verified["mallory"] == answers[IdentityError] <= 8
        for _ in range(20):
            await outcome(honest.federation.GetPlan(fed.GetPlanRequest()))


async def test_operators_are_shut_out_too(make_plan: MakePlan, consortium: Consortium, connect: Any) -> None:
    olga = consortium.members.identity("olga", "operator")
    async with (
        served(make_plan(), consortium, consortium.revocations()) as address,
        connect(address, olga) as stubs,
    ):
        assert (await outcome(stubs.operations.GetStatus(ops.GetStatusRequest()))).transport == "mtls"
        consortium.revoke("olga")
        with pytest.raises(IdentityError, match="certificate of operator olga was revoked"):
            await outcome(stubs.operations.GetStatus(ops.GetStatusRequest()))


def peer(consortium: Consortium, name: str) -> Any:
    return consortium.members.peer(name)


def is_revoked(revocations: Revocations, peer: Any) -> bool:
    try:
        revocations.check(peer)
    except IdentityError:
        return True
    return False


def test_an_older_list_does_not_bring_a_certificate_back(
    consortium: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    old, mallory = consortium.file.read_bytes(), peer(consortium, "mallory")
    revocations = consortium.revocations()
    assert not is_revoked(revocations, mallory)
    consortium.revoke("mallory")
    assert is_revoked(revocations, mallory)
    consortium.publish(old)
    assert is_revoked(revocations, mallory)
    assert "which goes on to count" in caplog.text
    assert is_revoked(consortium.revocations(), mallory)  # a server that is started again
    assert is_revoked(consortium.revocations(file=False), mallory)  # without the option


def test_a_file_that_is_gone_or_not_a_list_changes_nothing(
    consortium: Consortium, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    mallory = peer(consortium, "mallory")
    consortium.revoke("mallory")
    revocations = consortium.revocations()
    consortium.file.unlink()
    assert is_revoked(revocations, mallory)
    other = Authority.create(tmp_path / "other", "other")
    for content in (b"junk", b"", revoke(other, []).list.pem):
        consortium.publish(content or b" ")
        assert is_revoked(revocations, mallory)
        assert is_revoked(revocations, mallory)
    assert caplog.text.count("the new one cannot be used") == 4  # each once, the missing file too
    with pytest.raises(IdentityError, match="not signed by this federation's authority"):
        consortium.revocations()
    consortium.file.unlink()
    with pytest.raises(IdentityError, match="cannot read"):
        consortium.revocations()


def test_a_list_that_cannot_be_kept_counts_at_once_and_is_kept_later(
    consortium: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    mallory = peer(consortium, "mallory")
    consortium.revoke("mallory")
    consortium.kept = consortium.kept.parent / "not there yet" / "kept.crl"  # as good as a full disk
    revocations = consortium.revocations()
    assert is_revoked(revocations, mallory)
    for _ in range(3):
        revocations.keep()
    assert caplog.text.count("counts, but not after a restart without it") == 1
    consortium.kept.parent.mkdir()
    revocations.keep()
    assert is_revoked(consortium.revocations(file=False), mallory)


def test_two_lists_of_one_number_are_not_exchanged(consortium: Consortium, caplog: pytest.LogCaptureFixture) -> None:
    anna, now = peer(consortium, "anna"), datetime.now(UTC)
    consortium.revoke("anna")
    revocations = consortium.revocations()
    number = revoke(consortium.authority, []).list.number - 1
    forged = consortium.authority.sign_list(number, {}, (now, now + timedelta(days=1)))
    consortium.publish(forged.pem)
    assert is_revoked(revocations, anna)
    assert "another list of the same number" in caplog.text


def test_an_overdue_list_is_told_once_a_day_and_counts(
    consortium: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    mallory, now = peer(consortium, "mallory"), datetime.now(UTC)
    consortium.revoke("mallory")
    revocations = consortium.revocations()
    with caplog.at_level(logging.WARNING):
        for days in (0, 29):
            revocations.warn_if_overdue(now + timedelta(days=days))
        assert caplog.text == ""
        for hours in (0, 1, 23, 25):
            revocations.warn_if_overdue(now + timedelta(days=31, hours=hours))
    assert caplog.text.count("a newer revocation list was due") == 2
    assert is_revoked(revocations, mallory)


def prompt(number: float) -> np.ndarray:
    return np.full((2, 3), number, dtype=np.float32)


async def test_a_revoked_member_is_out_of_round_and_pool_and_the_round_goes_on(
    make_plan: MakePlan, drive: Any, members: Any
) -> None:
    names = ("anna", "bert", "cleo")
    async with drive(make_plan(minimum_cohort=2, start_clients=3, experts=2)) as driver:
        await driver.join(*names)
        await driver.until_round("anna", 1)
        for number, name in enumerate(names):
            await driver.work(name, 1, prompt(number))
        await driver.until_round("anna", 2)
        lent = await driver.nearest("anna", 2, prompt(0), 2)
        assert len(lent) == 2
        await driver.publish("cleo", 2, prompt(9))  # staged, to be lent from the next round on
        await driver.coordinator.expel({members.identity("cleo").subject.serial})
        with pytest.raises(NotAMember):
            await driver.view("cleo")
        with pytest.raises(NotAMember):
            await driver.submit("cleo", 2, prompt(9))
        bert = driver.coordinator._federation.state.members["bert"].expert_id
        assert list(await driver.coordinator.get_experts(members.peer("anna"), 2, lent)) == [bert]
        for number, name in enumerate(names[:2]):
            await driver.work(name, 2, prompt(number))  # nobody waits for cleo
        await driver.until_round("anna", 3)
        assert await driver.nearest("anna", 3, prompt(0), 2) == [bert]


async def test_a_round_with_too_few_left_is_abandoned(make_plan: MakePlan, drive: Any, members: Any) -> None:
    async with drive(make_plan(minimum_cohort=2)) as driver:
        await driver.join("anna", "bert")
        await driver.until_round("anna", 1)
        await driver.coordinator.expel({members.identity("bert").subject.serial})
        await driver.work("anna", 1, prompt(1))
        view = await driver.until("anna", lambda view: view.phase == fed.FEDERATION_PHASE_GATHERING)
        assert (view.round, view.rounds_completed) == (1, 0)


async def test_what_was_revoked_while_the_server_was_down_is_seen_to_at_its_start(
    make_plan: MakePlan, consortium: Consortium, connect: Any
) -> None:
    plan = make_plan(minimum_cohort=3)
    store = SqlStore.in_memory(plan)
    for number, revocations in enumerate((consortium.revocations(), None)):
        if number:
            consortium.revoke("mallory")
            revocations = consortium.revocations()
        coordinator = Coordinator(plan, store, context_shape=(2, 3))
        async with serving(coordinator, ANY_PORT, consortium.members.server, revocations) as address:
            if not number:
                async with connect(address, consortium.members.identity("mallory")) as stubs:
                    await join(stubs, plan)
            assert store.load().members["mallory"].taking_part == (not number)
    store.close()


def test_a_list_that_cannot_be_read_yet_counts_as_soon_as_it_can(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process out of descriptors, say, which strangers' connections can bring about: nothing of the file changes."""
    mallory = peer(consortium, "mallory")
    revocations = consortium.revocations()
    consortium.revoke("mallory")
    with monkeypatch.context() as patch:
        patch.setattr(revocation, "read_list", too_many_open_files)
        assert not is_revoked(revocations, mallory)
    revocations._watched._try_again = 0.0
    assert is_revoked(revocations, mallory)


def too_many_open_files(path: Path) -> bytes:
    raise IdentityError(f"cannot read {path}: Too many open files")
