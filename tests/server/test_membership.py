"""Who takes part: joining, coming back, names that are taken, and calls that are not for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfed_server.sql_store import SqlStore
from pfedsecure.errors import IdentityError, MessageRejected, NameTaken, NotAMember, PlanMismatch
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd

MakePlan = Callable[..., Plan]


async def test_get_plan_gives_a_plan_that_reads_back(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        reply = await driver.coordinator.get_plan(driver.members.peer("anna"))
        assert Plan.from_json(reply.plan_json) == driver.plan
        assert reply.plan_digest == driver.plan.digest()
        assert len(reply.federation_id) == 32


async def test_join_is_repeatable_and_names_the_certificates_name(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        request = fed.JoinRequest(plan_digest=driver.plan.digest(), instance_id="1")
        replies = [await driver.coordinator.join(driver.members.peer("anna"), request) for _ in range(2)]
        assert replies[0] == replies[1]
        assert replies[0].name == "anna"
        assert (await driver.view("anna")).clients_online == 1


async def test_another_plan_is_refused_with_both_digests(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        other = make_plan(seed=2).digest()
        with pytest.raises(PlanMismatch) as caught:
            await driver.join("anna", digest=other)
        assert driver.plan.digest()[:12] in str(caught.value)
        assert other[:12] in str(caught.value)
        with pytest.raises(NotAMember, match="anna does not take part"):
            await driver.view("anna")


async def test_a_second_process_is_refused_while_the_first_is_alive(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna", instance="first")
        driver.clock.advance(11.9)  # six heartbeats are 12 s
        with pytest.raises(NameTaken, match=r"another process takes part as anna; .* try again in 1 s"):
            await driver.join("anna", instance="second")
        driver.clock.advance(0.2)
        await driver.join("anna", instance="second")
        with pytest.raises(NameTaken, match="another process has joined as anna"):
            await driver.view("anna", instance="first")


async def test_a_restarted_process_with_the_same_instance_joins_at_once(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna", instance="first")
        await driver.join("anna", instance="first")
        assert (await driver.view("anna", instance="first")).clients_online == 1


async def test_another_key_never_gets_the_name(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna")
        driver.clock.advance(1000)
        with pytest.raises(NameTaken, match="the name anna belongs to a client with another key"):
            await driver.join("anna", key=1)
        request = fed.AwaitRequest(instance_id="1")
        with pytest.raises(NameTaken, match="another key"):
            await driver.coordinator.await_view(driver.members.peer("anna", key=1), request)
        await driver.coordinator.leave(driver.members.peer("anna"), fed.LeaveRequest(instance_id="1"))
        for call in (driver.coordinator.leave, driver.coordinator.heartbeat):
            with pytest.raises((NameTaken, NotAMember)):
                await call(driver.members.peer("anna", key=1), fed.LeaveRequest(instance_id="1"))


async def test_leaving_twice_is_harmless_and_the_name_can_come_back(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna")
        for _ in range(2):
            await driver.coordinator.leave(driver.members.peer("anna"), fed.LeaveRequest(instance_id="1"))
        with pytest.raises(NotAMember):
            await driver.view("anna")
        await driver.join("anna", instance="2")  # no waiting: the first process said that it is gone
        assert (await driver.view("anna", instance="2")).clients_online == 1


async def test_leave_needs_a_membership_and_the_right_process(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        with pytest.raises(NotAMember):
            await driver.coordinator.leave(driver.members.peer("anna"), fed.LeaveRequest(instance_id="1"))
        await driver.join("anna")
        with pytest.raises(NameTaken):
            await driver.coordinator.leave(driver.members.peer("anna"), fed.LeaveRequest(instance_id="2"))


@pytest.mark.parametrize("instance", ["", "x" * 65])
async def test_instance_ids_have_a_length(make_plan: MakePlan, drive: Any, instance: str) -> None:
    async with drive(make_plan()) as driver:
        with pytest.raises(MessageRejected, match=f"1 to 64 characters, not {len(instance)}"):
            await driver.join("anna", instance=instance)


async def test_calls_of_members_are_for_members_only(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        calls = driver.coordinator
        outsider = driver.members.peer("anna")
        for call in (
            calls.await_view(outsider, fed.AwaitRequest(instance_id="1")),
            calls.heartbeat(outsider, fed.HeartbeatRequest(instance_id="1")),
            calls.get_global_prompt(outsider, 0),
            calls.match(outsider, rnd.MatchRequest(round=1, experts=1)),
            calls.get_experts(outsider, 1, []),
            calls.submit_step(outsider, 1, 1, b""),
            calls.get_step_request(outsider, 1, 1),
            calls.report_expert(outsider, rnd.ReportExpertRequest(round=1)),
            calls.publish_expert(outsider, 1, b""),
        ):
            with pytest.raises(NotAMember, match="anna does not take part in this federation; join it first"):
                await call


async def test_roles_are_kept_apart(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna")
        with pytest.raises(IdentityError, match="client anna may not do this"):
            await driver.coordinator.get_status(driver.members.peer("anna"))
        operator = driver.members.peer("olga", "operator")
        with pytest.raises(IdentityError, match="operator olga may not do this"):
            await driver.coordinator.join(operator, fed.JoinRequest(plan_digest=driver.plan.digest(), instance_id="1"))
        with pytest.raises(IdentityError, match="operator anna may not do this"):
            await driver.coordinator.get_global_prompt(driver.members.peer("anna", "operator"), 0)


async def test_silent_members_go_offline_and_their_next_call_brings_them_back(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3)) as driver:
        await driver.join("anna", "bert")
        assert (await driver.view("anna")).clients_online == 2
        driver.clock.advance(11)
        before = await driver.view("anna")
        driver.clock.advance(1.5)
        after = await driver.until("anna", lambda view: view.version > before.version)
        assert after.clients_online == 1
        await driver.coordinator.heartbeat(driver.members.peer("bert"), fed.HeartbeatRequest(instance_id="1"))
        back = await driver.until("anna", lambda view: view.version > after.version)
        assert back.clients_online == 2


async def test_a_long_poll_answers_at_a_change_and_not_before(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3)) as driver:
        await driver.join("anna")
        seen = await driver.settled("anna")
        waiting = asyncio.create_task(driver.view("anna", seen=seen, wait=30))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await driver.join("bert")
        view = await asyncio.wait_for(waiting, timeout=5)
        assert view.version > seen


async def test_a_long_poll_ends_before_its_caller_is_taken_for_gone(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3)) as driver:
        await driver.join("anna")
        seen = await driver.settled("anna")
        waiting = asyncio.create_task(driver.view("anna", seen=seen, wait=1e9))
        await asyncio.sleep(0.05)
        driver.clock.advance(6)  # half of six heartbeats
        view = await asyncio.wait_for(waiting, timeout=5)
        assert (view.version, view.clients_online) == (seen, 1)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf")])
async def test_a_wait_is_a_number(make_plan: MakePlan, drive: Any, seconds: float) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna")
        with pytest.raises(MessageRejected, match="not a number of seconds"):
            await driver.view("anna", wait=seconds)


async def test_stopping_ends_long_polls(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3)) as driver:
        await driver.join("anna")
        seen = await driver.settled("anna")
        waiting = asyncio.create_task(driver.view("anna", seen=seen, wait=30))
        await asyncio.sleep(0.02)
        driver.coordinator.end_waits()
        assert (await asyncio.wait_for(waiting, timeout=5)).version == seen


async def test_a_caller_that_hangs_up_leaves_memory_and_store_in_step(make_plan: MakePlan, drive: Any) -> None:
    plan = make_plan(start_clients=3)
    store = SqlStore.in_memory(plan)
    async with drive(plan, store) as driver:
        joining = asyncio.create_task(driver.join("anna"))
        await asyncio.sleep(0)  # the call has begun
        joining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joining
        await driver.join("bert")
        assert (await driver.view("bert")).clients_online == 2
    assert sorted(store.load().members) == ["anna", "bert"]
    store.close()


async def test_status_shows_members_and_rounds(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        operator = driver.members.peer("olga", "operator")
        empty = await driver.coordinator.get_status(operator)
        assert (empty.phase, empty.rounds_planned, list(empty.members)) == ("gathering", 3, [])
        await driver.join("bert", "anna")
        await driver.until_round("anna", 1)
        for name in ("anna", "bert"):
            await driver.work(name, 1, np.ones((2, 3)))
        await driver.until_round("anna", 2)
        await driver.submit("bert", 2, np.ones((2, 3)))
        status = await driver.coordinator.get_status(operator)
        assert (status.phase, status.round, status.rounds_completed) == ("round open", 2, 1)
        assert status.unprotected == list(driver.plan.unprotected())
        shown = [(m.name, m.online, m.in_cohort, m.step_received, m.last_round) for m in status.members]
        assert shown == [("anna", True, True, 0, 1), ("bert", True, True, 1, 1)]
        first, second = status.rounds
        assert (first.number, first.outcome, first.cohort, first.updates) == (1, "closed", 2, 2)
        assert (second.number, second.outcome, second.updates) == (2, "open", 1)
        update = len(driver.contribution(np.ones((2, 3))))
        assert first.bytes_received == 2 * (update + len(driver.publication(np.ones((2, 3)))))
        assert second.bytes_received == update
