"""Clients that leave, fall silent or are too late in the middle of an aggregation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfed_server.sql_store import SqlStore
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
SEALED = {"aggregation": "secure", "experts": "sealed", "matching": "random"}


def outcomes(store: SqlStore) -> list[tuple[str, int]]:
    return [(record.outcome, record.updates) for record in store.history().rounds]


def messages(store: SqlStore) -> int:
    """How many of the members' messages are stored."""
    with store._engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM messages").scalar_one())


async def leave(driver: Any, name: str) -> None:
    await driver.coordinator.leave(driver.members.peer(name), fed.LeaveRequest(instance_id="1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "in_the_mean"),
    [
        pytest.param(1, 5, id="never came"),
        pytest.param(2, 5, id="after its keys"),
        pytest.param(3, 5, id="after its shares"),
        pytest.param(4, 7, id="after its masked input"),
        pytest.param(5, 7, id="during unmasking"),
    ],
)
async def test_the_rest_goes_on_without_two_of_seven(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, step: int, in_the_mean: int
) -> None:
    plan = secure_plan()
    store = SqlStore.in_memory(plan)
    cohort = cohort_of(plan)
    async with drive(plan, store) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, without={step: cohort.names[-2:]})
        await cohort.opened(driver, 2, 1)
        survivors = cohort.names[:in_the_mean]
        np.testing.assert_allclose(
            await driver.global_prompt("anna", 2), cohort.mean(*survivors), rtol=0, atol=cohort.bound(*survivors)
        )
        assert outcomes(store) == [("closed", in_the_mean), ("open", 0)]
        assert messages(store) == 0
        status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
        assert {member.name for member in status.members if member.last_round == 1} == set(survivors)
    store.close()


@pytest.mark.parametrize("step", [2, 3, 4, 5])
async def test_without_three_of_seven_nothing_is_combined_and_the_next_round_succeeds(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plan = secure_plan(experts=2, protection=SEALED)
    store = SqlStore.in_memory(plan)
    cohort = cohort_of(plan)
    async with drive(plan, store) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        for name in cohort.names:
            await driver.publish_sealed(name, 1, cohort.contributions[name].context)
        await cohort.play(driver, 1, without={step: cohort.names[-3:]}, until=step)
        view = await cohort.opened(driver, 2, 1)
        assert (view.rounds_completed, view.expert_epoch) == (0, 0)
        assert outcomes(store) == [("abandoned", {2: 0, 3: 4, 4: 7, 5: 7}[step]), ("open", 0)]
        assert messages(store) == 0
        assert await driver.global_prompt("anna", 2) is None
        assert await driver.nearest("anna", 2, cohort.mean(), 2) == []
        assert f"round 1 cannot go on: 4 of 7 clients are in it after step {step} of 5" in caplog.text
        assert "nothing was combined or revealed" in caplog.text
        for name in cohort.names:
            await driver.publish_sealed(name, 2, cohort.contributions[name].context)
        await cohort.play(driver, 2)
        await cohort.opened(driver, 3, 1)
        np.testing.assert_allclose(await driver.global_prompt("anna", 3), cohort.mean(), rtol=0, atol=cohort.bound())
        assert len(await driver.nearest("anna", 3, cohort.mean(), 2)) == 2
    store.close()


async def test_too_few_that_begin_are_too_few(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    plan = secure_plan(clients=4, minimum_cohort=4)
    store = SqlStore.in_memory(plan)
    cohort = cohort_of(plan, ("anna", "bert", "cleo", "dora"))
    async with drive(plan, store) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        await cohort.send(driver, 1, 1, "anna", "bert", "cleo")
        driver.clock.advance(5)
        await cohort.opened(driver, 2, 1)
        assert outcomes(store) == [("abandoned", 0), ("open", 0)]
        assert messages(store) == 0
    store.close()


@pytest.mark.parametrize(("step", "outcome"), [(2, ("abandoned", 0)), (3, ("abandoned", 6)), (4, ("closed", 7))])
async def test_fewer_updates_than_the_minimum_cohort_are_too_few_though_a_quorum(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, step: int, outcome: tuple[str, int]
) -> None:
    plan = secure_plan(minimum_cohort=7)
    store = SqlStore.in_memory(plan)
    cohort = cohort_of(plan)
    async with drive(plan, store) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, without={step: ["gina"]}, until=5 if outcome[0] == "closed" else step)
        await cohort.opened(driver, 2, 1)
        assert outcomes(store)[0] == outcome
    store.close()


async def test_nobody_waits_for_a_client_that_left(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    """Not a second passes."""
    plan = secure_plan()
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, until=1)
        await cohort.opened(driver, 1, 2)
        await cohort.send(driver, 1, 2, *cohort.names[:6])
        await leave(driver, "gina")
        await cohort.opened(driver, 1, 3)
        await cohort.send(driver, 1, 3, *cohort.names[:6])
        await cohort.opened(driver, 1, 4)
        await leave(driver, "fred")
        for step in (4, 5):
            await cohort.opened(driver, 1, step)
            await cohort.send(driver, 1, step, *cohort.names[:5])
        await cohort.opened(driver, 2, 1)
        survivors = cohort.names[:6]
        np.testing.assert_allclose(
            await driver.global_prompt("anna", 2), cohort.mean(*survivors), rtol=0, atol=cohort.bound(*survivors)
        )


async def test_nor_for_one_that_left_while_it_trained(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    plan = secure_plan()
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        await cohort.send(driver, 1, 1, *cohort.names[:6])
        await leave(driver, "gina")
        await cohort.opened(driver, 1, 2)


async def test_a_round_that_everybody_left_is_over(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    plan = secure_plan()
    store = SqlStore.in_memory(plan)
    cohort = cohort_of(plan)
    async with drive(plan, store) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, until=3)
        await cohort.opened(driver, 1, 4)
        for name in cohort.names:
            await leave(driver, name)
        async with asyncio.timeout(10):
            while outcomes(store) != [("abandoned", 7)]:
                await asyncio.sleep(0.01)
        assert messages(store) == 0
    store.close()


async def heard(driver: Any, names: tuple[str, ...], seconds: float) -> None:
    """Time passes, and of the clients `names` is heard all the while."""
    for _ in range(round(seconds)):
        driver.clock.advance(1)
        for name in names:
            await driver.coordinator.heartbeat(driver.members.peer(name), fed.HeartbeatRequest(instance_id="1"))
    await asyncio.sleep(0.1)


async def test_training_is_waited_for_until_its_deadline_and_messages_as_long_as_their_client_lives(
    secure_plan: MakePlan, drive: Any, cohort_of: Any
) -> None:
    """Silence is twelve seconds; what is left of the step's hour is not waited for."""
    plan = secure_plan(deadline_seconds=600, step_seconds=3600)
    cohort = cohort_of(plan)
    others = cohort.names[:6]
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        await cohort.send(driver, 1, 1, *others)
        await heard(driver, others, 30)
        assert (await driver.view("anna")).step == 1, "gina may still be training"
        await cohort.send(driver, 1, 1, "gina")
        view = await cohort.opened(driver, 1, 2)
        assert view.seconds_left == 3600
        await cohort.send(driver, 1, 2, *others)
        await heard(driver, cohort.names, 30)
        assert (await driver.view("anna")).step == 2, "gina is heard of"
        await heard(driver, others, 11)
        assert (await driver.view("anna")).step == 2
        await heard(driver, others, 2)
        await cohort.opened(driver, 1, 3)
        await cohort.send(driver, 1, 3, *others)
        await cohort.opened(driver, 1, 4)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
async def test_a_step_ends_at_its_deadline_and_not_before(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, step: int
) -> None:
    plan = secure_plan(step_seconds=8)
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        if step == 1:
            await cohort.enter(driver, 1)
        else:
            await cohort.play(driver, 1, until=step - 1)
        view = await cohort.opened(driver, 1, step)
        seconds = 5 if step == 1 else 8
        assert view.seconds_left == seconds
        await cohort.send(driver, 1, step, *cohort.names[:6])
        driver.clock.advance(seconds - 0.01)
        await asyncio.sleep(0.1)
        view = await driver.view("anna")
        assert (view.round, view.step, view.seconds_left) == (1, step, pytest.approx(0.01))
        driver.clock.advance(0.02)
        await driver.until("anna", lambda view: (view.round, view.step) == ((1, step + 1) if step < 5 else (2, 1)))


async def test_who_missed_a_step_has_no_part_in_the_rest_and_is_asked_again_in_the_next_round(
    secure_plan: MakePlan, drive: Any, cohort_of: Any
) -> None:
    plan = secure_plan()
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, without={2: ["gina"]}, until=2)
        await cohort.opened(driver, 1, 3)
        view = await driver.view("gina")
        assert (view.selected, view.step, view.step_received) == (True, 3, 1)
        for step in (3, 4, 5):  # without a second's wait for her
            await cohort.opened(driver, 1, step)
            await cohort.send(driver, 1, step, *cohort.names[:6])
        await cohort.opened(driver, 2, 1)
        assert (await driver.view("gina")).selected
        await cohort.play(driver, 2)
        await cohort.opened(driver, 3, 1)
        np.testing.assert_allclose(await driver.global_prompt("anna"), cohort.mean(), rtol=0, atol=cohort.bound())
