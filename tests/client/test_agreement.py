"""What a client holds its server to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pfed_client.agreement import agree
from pfed_client.state import ClientState
from pfedsecure.errors import PlanError, PlanMismatch, StateError
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed


class PlanApi:
    """The one call that agreeing needs."""

    def __init__(self, plan: Plan, federation_id: str = "f" * 32, **changes: str) -> None:
        self._reply = fed.GetPlanReply(plan_json=plan.to_json(), plan_digest=plan.digest(), federation_id=federation_id)
        self._reply.MergeFrom(fed.GetPlanReply(**changes))

    async def get_plan(self) -> fed.GetPlanReply:
        return self._reply


@pytest.fixture
def state(tmp_path: Path) -> Iterator[ClientState]:
    with ClientState(tmp_path / "state") as opened:
        opened.claim("a")
        yield opened


async def test_the_first_plan_is_believed_unless_another_was_expected(
    state: ClientState, make_plan: Callable[..., Plan]
) -> None:
    api: Any = PlanApi(make_plan())
    assert (await agree(api, state)).plan == make_plan()
    assert (await agree(api, state, make_plan())).federation_id == "f" * 32
    other = make_plan(seed=2)
    with pytest.raises(PlanMismatch, match=f"{make_plan().digest()[:12]}.*--plan.*{other.digest()[:12]}"):
        await agree(api, state, other)


async def test_pins(state: ClientState, make_plan: Callable[..., Plan]) -> None:
    state.pin(make_plan(), "f" * 32)
    await agree(PlanApi(make_plan()), state)  # type: ignore[arg-type]
    with pytest.raises(PlanMismatch, match=r"is not the one that .* agreed to .*; ask its operator why before you"):
        await agree(PlanApi(make_plan(rounds__count=99)), state)  # type: ignore[arg-type]
    with pytest.raises(
        StateError, match=r"belongs to federation ffffffffffff, the server runs eeeeeeeeeeee .*lost.* ask its operator"
    ):
        await agree(PlanApi(make_plan(), "e" * 32), state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan_digest": "0" * 64}, "digest .*announced 000000000000; use the same version"),
        ({"plan_json": "{"}, "plan that was received is invalid"),
        ({"plan_json": '{"class_names": ["a", "b"], "speed": 9}'}, "speed is not a known setting"),
    ],
)
async def test_plans_that_cannot_be_trusted(
    state: ClientState, make_plan: Callable[..., Plan], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        await agree(PlanApi(make_plan(), **changes), state)  # type: ignore[arg-type]


async def test_agreeing_changes_nothing(state: ClientState, make_plan: Callable[..., Plan]) -> None:
    before = (state.folder / "client.json").read_bytes()
    await agree(PlanApi(make_plan()), state)  # type: ignore[arg-type]
    assert (state.folder / "client.json").read_bytes() == before
