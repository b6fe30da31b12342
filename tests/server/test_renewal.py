"""Who may come back under a name with another key, and what the operator is told of certificates that end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import NameTaken
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.expiry import ExpiryReminder
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.renewal import renew
from pfedsecure.pki.request import request
from pfedsecure.plan import Plan
from pfedsecure.wire.peer import Peer
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
NOW = datetime.now(UTC)


def peer(identity: Identity) -> Peer:
    return Peer.from_certificate(identity.certificate, identity.authority, datetime.now(UTC))


async def test_a_renewed_member_keeps_its_place_and_the_old_key_loses_it(
    make_plan: MakePlan, drive: Any, members: Any, tmp_path: Path
) -> None:
    own = type(members)(tmp_path)
    authority = Authority.load(tmp_path / "pki" / "authority")
    plan = make_plan()
    old = own.identity("anna")
    before = peer(old)
    async with drive(plan) as driver:
        join = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
        await driver.coordinator.join(before, join)
        member = driver.coordinator._federation.state.members["anna"]
        kit = authority.admit(renew(old.folder).read_bytes(), name="anna", role="client", days=9)
        after = peer(install_kit(old.folder, kit))
        with pytest.raises(NameTaken):  # not before it has joined
            await driver.coordinator.heartbeat(after, fed.HeartbeatRequest(instance_id="1"))
        await driver.coordinator.join(after, join)
        await driver.coordinator.heartbeat(after, fed.HeartbeatRequest(instance_id="1"))
        renewed = driver.coordinator._federation.state.members["anna"]
        assert renewed.expert_id == member.expert_id
        assert renewed.fingerprint == after.fingerprint
        for call in (
            driver.coordinator.heartbeat(before, fed.HeartbeatRequest(instance_id="1")),
            driver.coordinator.join(before, join),
        ):
            with pytest.raises(NameTaken, match="belongs to a client with another key"):
                await call


async def test_another_key_under_the_name_has_its_place_only_by_the_authoritys_word(
    make_plan: MakePlan, drive: Any, members: Any, tmp_path: Path
) -> None:
    own = type(members)(tmp_path)
    authority = Authority.load(tmp_path / "pki" / "authority")
    plan = make_plan()
    join = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")

    def certified(folder: str, *, heir: bool) -> Peer:
        csr = request(tmp_path / folder, "anna", "client").read_bytes()
        kit = authority.admit(csr, name="anna", role="client", days=9, replace=True, heir=heir)
        return peer(install_kit(tmp_path / folder, kit))

    async with drive(plan) as driver:
        await driver.coordinator.join(peer(own.identity("anna")), join)
        heir = certified("heir", heir=True)
        with pytest.raises(NameTaken, match="belongs to a client with another key"):
            await driver.coordinator.join(certified("stranger", heir=False), join)
        await driver.coordinator.join(heir, join)


def test_reminders_come_once_a_day_from_30_days_on() -> None:
    reminder, end = ExpiryReminder(), NOW + timedelta(days=100)
    told = [
        hours
        for hours in range(0, 24 * 100, 6)
        if reminder.due("client", "anna", end, NOW + timedelta(hours=hours)) is not None
    ]
    assert told == [24 * day for day in range(70, 100)]
    assert "in 0 days" in str(reminder.due("client", "bert", end, end - timedelta(hours=1)))
    assert reminder.due("client", "bert", end, end) is None


async def test_the_operator_is_told_of_its_own_certificate_and_of_callers(
    make_plan: MakePlan, members: Any, connect: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = type(members)(tmp_path)
    authority = Authority.load(tmp_path / "pki" / "authority")
    soon = tmp_path / "soon"
    csr = request(soon, "bert", "client").read_bytes()
    bert = install_kit(soon, authority.admit(csr, name="bert", role="client", days=9))
    store = SqlStore.in_memory(make_plan())
    coordinator = Coordinator(make_plan(), store, context_shape=(2, 3))
    server = own.server
    kit = authority.admit(
        (server.folder / "identity.csr").read_bytes(),
        name=server.subject.name,
        role="server",
        days=5,
        hosts=["127.0.0.1"],
    )
    install_kit(server.folder, kit)
    with caplog.at_level(logging.WARNING):
        identity = Identity.load(server.folder)
        async with (
            serving(coordinator, Address("127.0.0.1", 0), identity) as address,
            connect(address, bert) as ends_soon,
            connect(address, own.identity("anna")) as lasts,
        ):
            for stubs in (ends_soon, lasts, ends_soon):
                await stubs.federation.GetPlan(fed.GetPlanRequest())
    store.close()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "the certificate of server development-server ends on" in warnings[0]
    assert "the certificate of client bert ends on" in warnings[1]
