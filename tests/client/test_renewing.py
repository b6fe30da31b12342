"""A client whose certificate is renewed while it runs, against a real server over mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pfed_client.agreement import agree
from pfed_client.grpc_api import GrpcApi
from pfed_client.renewing import Renewing
from pfed_client.session import Session
from pfed_client.state import ClientState
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import NameTaken
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.renewal import renew
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

ANY_PORT = Address("127.0.0.1", 0)
SHAPE = (2, 3)


def renewed(identity: Identity, pki: Path, *, days: int = 20, now: datetime | None = None) -> Identity:
    """Through request, approval and installation; the certificate is for `days`."""
    csr = renew(identity.folder).read_bytes()
    kit = Authority.load(pki / "authority").admit(csr, name=identity.subject.name, role="client", days=days, now=now)
    return install_kit(identity.folder, kit)


class Client:
    """One client of a federation, as `pfed-client` would run it."""

    def __init__(self, name: str, folder: Path, members: Any, trainer: Any) -> None:
        self.name, self.folder, self.trainer = name, folder, trainer
        self.identity: Identity = members.identity(name)
        self.told: list[str] = []
        self.sessions = 0

    async def run(self, address: Address) -> None:
        with ClientState(self.folder / f"state-{self.name}") as state:
            state.claim(self.name)
            async with GrpcApi(address, self.identity, retry_seconds=10) as api:
                agreement = await agree(api, state)
                renewing = Renewing(api, self.identity, self.told.append)

                def make(identity: Identity | None) -> Session:
                    self.sessions += 1
                    return Session(
                        api,
                        agreement,
                        state,
                        self.trainer,
                        backbone_digest="b" * 64,
                        identity=identity,
                        between_rounds=renewing.between_rounds,
                    )

                await renewing.run(make(self.identity), make)


@pytest.mark.slow
@pytest.mark.parametrize("protected", [False, True])
async def test_a_certificate_renewed_while_the_client_runs(
    protected: bool,
    tmp_path: Path,
    members: Any,
    make_plan: Callable[..., Plan],
    make_protected_plan: Callable[..., Plan],
    make_trainer: Any,
) -> None:
    """Under secure aggregation too, where the round in which it happens goes on with the old key."""
    own = type(members)(tmp_path / "pki")
    plan = (make_protected_plan if protected else make_plan)(rounds__count=4, rounds__minimum_cohort=3)
    installed: list[Identity] = []

    def install_in_round_2(number: int, step: int) -> None:
        if (number, step) == (2, 2):
            installed.append(renewed(own.identity("a"), own.pki))

    clients = [Client(name, tmp_path, own, make_trainer(name)) for name in "abc"]
    clients[0].trainer.before_step = install_in_round_2
    store = SqlStore.in_memory(plan)
    coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=own.server.authority)
    async with serving(coordinator, ANY_PORT, own.server) as address:
        runs = [asyncio.create_task(client.run(address)) for client in clients]
        await asyncio.wait_for(asyncio.gather(*runs), 60)
        member = store.load().members["a"]
        async with GrpcApi(address, clients[0].identity, retry_seconds=0) as stolen:  # the key before
            with pytest.raises(NameTaken, match="belongs to a client with another key"):
                await stolen.heartbeat(fed.HeartbeatRequest(instance_id=member.instance_id))
    (new,) = installed
    assert member.fingerprint == new.subject.fingerprint != clients[0].identity.subject.fingerprint
    assert member.serial == f"{new.subject.serial:x}"
    assert [client.sessions for client in clients] == [2, 1, 1]
    assert [client.trainer.trained for client in clients] == [[1, 2, 3, 4]] * 3  # nobody missed a round
    history = store.history()
    assert [(record.outcome, record.updates) for record in history.rounds] == [("closed", 3)] * 4
    assert any(line.startswith("certificate renewed, valid until ") for line in clients[0].told)
    store.close()


async def test_a_certificate_that_ends_soon_is_told_and_another_key_is_not_taken_for_a_renewal(
    tmp_path: Path, members: Any, make_plan: Callable[..., Plan], make_trainer: Any
) -> None:
    own = type(members)(tmp_path / "pki")
    plan = make_plan(rounds__count=1, rounds__minimum_cohort=1)
    client = Client("a", tmp_path, own, make_trainer("a"))
    client.identity = renewed(client.identity, own.pki, days=10)
    store = SqlStore.in_memory(plan)
    async with serving(Coordinator(plan, store, context_shape=SHAPE), ANY_PORT, own.server) as address:
        await asyncio.wait_for(client.run(address), 30)
    until = f"{datetime.now(UTC) + timedelta(days=10):%Y-%m-%d}"
    assert len(client.told) == 1
    assert client.told[0].startswith(f"the certificate of client a ends on {until}")
    assert "renew it with `pfed pki renew`" in client.told[0]
    assert client.sessions == 1
    store.close()
