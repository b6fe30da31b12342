"""`pfed-client leave` against a real server over mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from click.testing import CliRunner, Result

from pfed_client.agreement import agree
from pfed_client.cli import main
from pfed_client.grpc_api import GrpcApi
from pfed_client.saved import SavedClient
from pfed_client.state import ClientState, Settings
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import IdentityError, NotAMember, StateError, StateLocked
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed


@dataclass(frozen=True)
class Joined:
    """A server with member a, whose state is in `state`."""

    address: Address
    store: SqlStore
    state: Path
    members: Any

    async def leave(self, *options: object) -> Result:
        words = ["leave", "--server", self.address, "--state", self.state, "--retry-seconds", 0, *options]
        if "--identity" not in options:
            words += ["--identity", self.members.identity("a").folder]
        return await asyncio.to_thread(CliRunner().invoke, main, [str(word) for word in words])


@pytest_asyncio.fixture
async def joined(tmp_path: Path, members: Any, make_plan: Callable[..., Plan]) -> AsyncIterator[Joined]:
    plan = make_plan(rounds__minimum_cohort=2)
    store = SqlStore.in_memory(plan)
    state_folder = tmp_path / "state"
    async with serving(
        Coordinator(plan, store, context_shape=(2, 3)), Address("127.0.0.1", 0), members.server
    ) as bound:
        with ClientState(state_folder) as state:
            state.claim("a")
            async with GrpcApi(bound, members.identity("a"), retry_seconds=0) as api:
                agreement = await agree(api, state)
                request = fed.JoinRequest(plan_digest=plan.digest(), instance_id=state.record.instance_id)
                await api.join(request)
            state.pin(plan, agreement.federation_id)
            state.remember(Settings.of("demo:0/5"), "f" * 64)
        yield Joined(bound, store, state_folder, members)
    store.close()


async def test_a_member_leaves_for_good(joined: Joined, caplog: pytest.LogCaptureFixture) -> None:
    assert joined.store.load().members["a"].taking_part
    left = await joined.leave("--yes")
    assert left.exit_code == 0, left.output
    assert "a left federation" in left.output
    assert "pfed pki rotate --without a" in left.output
    assert not joined.store.load().members["a"].taking_part
    assert "a left; it keeps the clients' secret: have the authority make a new one" in caplog.text
    assert (await joined.leave("--yes")).exit_code == 0  # once more is harmless
    with (
        ClientState(joined.state) as state,
        pytest.raises(StateError, match=r"a left its federation on 20.*give another --state"),
    ):
        state.claim("a")
    assert SavedClient.open(joined.state).name == "a"  # what needs no server still works
    async with GrpcApi(joined.address, joined.members.identity("a"), retry_seconds=0) as api:
        with pytest.raises(NotAMember):
            await api.heartbeat(fed.HeartbeatRequest(instance_id="x"))


async def test_it_asks_first(joined: Joined) -> None:
    asked = await joined.leave()
    assert "leaves federation" in asked.output
    assert joined.store.load().members["a"].taking_part


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        ("running", StateLocked, "another client uses this state directory"),
        ("other identity", IdentityError, "is the identity of b, not of a"),
        ("other federation", StateError, "the server runs"),
        ("another process", None, "another process has joined as a"),
    ],
)
async def test_what_keeps_it_from_leaving(joined: Joined, break_it: str, error: Any, message: str) -> None:
    options: list[object] = ["--yes"]
    if break_it == "other identity":
        options += ["--identity", joined.members.identity("b").folder]
    with ClientState(joined.state) as state:
        if break_it == "running":
            result = await joined.leave(*options)
        if break_it == "other federation":
            assert state.record.plan is not None
            state.pin(state.record.plan, "0" * 32)
        if break_it == "another process":
            member = joined.store.load().members["a"]
            state._save(state.record.model_copy(update={"instance_id": member.instance_id + "x"}))
    if break_it != "running":
        result = await joined.leave(*options)
    assert result.exit_code == (52 if error is None else error.exit_code)
    assert message in result.output
    assert joined.store.load().members["a"].taking_part
    with ClientState(joined.state) as state:
        assert state.record.left is None
