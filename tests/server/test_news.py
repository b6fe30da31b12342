"""Who waits for news is woken at once where there is something to do, and cannot be kept busy by others' comings."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from pfed_server import news
from pfed_server.news import News
from pfedsecure.errors import NotAMember
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
WAITING = tuple(f"member-{number}" for number in range(8))
CHANGES = 40


async def heard(told: News, version: int, seconds: float) -> bool:
    """Whether somebody who has seen `version` is woken within so many seconds."""
    while told.must_wait(version):
        with told.change() as change:
            try:
                await asyncio.wait_for(change.wait(), seconds)
            except TimeoutError:
                return False
    return True


async def test_a_first_change_is_told_at_once_and_further_ones_together_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "WOKEN_A_SECOND", 4.0)
    told = News(7)
    assert told.must_wait(7)
    waiting = [asyncio.create_task(heard(told, 7, 5)) for _ in range(2)]
    await asyncio.sleep(0)
    told.tell(8, urgent=False)
    assert all(await asyncio.gather(*waiting))
    began = time.monotonic()
    for version in range(9, 30):
        told.tell(version, urgent=False)
    assert told.must_wait(8)
    assert told.must_wait(20)  # whoever saw a part of it is not told of the rest alone
    assert not told.must_wait(7)
    assert await heard(told, 8, 5)
    assert time.monotonic() - began == pytest.approx(0.5, abs=0.2)  # two callers at four a second
    assert told.must_wait(29)
    assert not told.must_wait(28)


async def test_what_is_urgent_is_told_at_once_with_all_that_was_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "WOKEN_A_SECOND", 0.01)
    told = News(1)
    with told.change():
        told.tell(2, urgent=False)
    told.tell(3, urgent=False)
    assert told.must_wait(2)
    assert not await heard(told, 2, 0.05)
    told.tell(4, urgent=True)
    assert await heard(told, 2, 0.05)
    assert await heard(told, 3, 0.05)
    assert told.must_wait(4)


async def test_many_are_woken_in_groups_between_which_others_have_their_turn() -> None:
    told, woken = News(1), 0

    async def wait() -> None:
        nonlocal woken
        await heard(told, 1, 5)
        woken += 1

    waiting = [asyncio.create_task(wait()) for _ in range(3 * news.GROUP + 1)]
    await asyncio.sleep(0)
    told.tell(2, urgent=True)
    seen = []
    while woken < len(waiting):
        await asyncio.sleep(0)
        seen.append(woken)
    steps = [after - before for before, after in itertools.pairwise([0, *seen])]
    assert max(steps) <= news.GROUP
    assert sum(map(bool, steps)) >= 4
    assert not told.must_wait(1)


async def test_nothing_is_remembered_of_those_who_waited_long_enough() -> None:
    told = News(1)
    for _ in range(3):
        waiting = [asyncio.create_task(heard(told, 1, 0.02)) for _ in range(2 * news.GROUP)]
        await asyncio.sleep(0)
        assert len(told._groups) == 2
        assert not any(await asyncio.gather(*waiting))
        assert told._groups == []


async def test_a_version_of_another_history_is_not_waited_for() -> None:
    assert not News(5).must_wait(6)
    assert not News(5).must_wait(4)


async def test_nobody_waits_once_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "WOKEN_A_SECOND", 0.01)
    told = News(1)
    waiting = asyncio.create_task(heard(told, 1, 5))
    await asyncio.sleep(0)
    told.end()
    assert await waiting
    assert not told.must_wait(1)


async def flooded(driver: Any) -> tuple[int, float]:
    """Answers to members that wait while another one joins and leaves again and again; and the seconds it takes."""
    answers = 0

    async def wait_again_and_again(name: str) -> None:
        nonlocal answers
        version = 0
        while True:
            version = (await driver.view(name, seen=version, wait=5)).version
            answers += 1

    await driver.join(*WAITING)
    waiting = [asyncio.create_task(wait_again_and_again(name)) for name in WAITING]
    await asyncio.sleep(0.3)
    answers, began = 0, time.monotonic()
    for _ in range(CHANGES):
        await driver.join("mallory")
        await driver.coordinator.leave(driver.members.peer("mallory"), fed.LeaveRequest(instance_id="1"))
    seconds = time.monotonic() - began
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    return answers, seconds


@pytest.mark.slow
async def test_who_joins_and_leaves_again_and_again_does_not_wake_everybody_each_time(
    make_plan: MakePlan, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(start_clients=50)
    monkeypatch.setattr(news, "WOKEN_A_SECOND", 10.0)  # fewer, so that a slow machine makes no difference
    async with drive(plan) as driver:
        answers, seconds = await flooded(driver)
    assert answers <= 10 * seconds + 2 * len(WAITING)

    monkeypatch.setattr(news, "WOKEN_A_SECOND", math.inf)
    async with drive(plan) as driver:
        without, _ = await flooded(driver)
    assert without > CHANGES * len(WAITING)
    assert without > 4 * answers


async def test_what_was_held_back_is_told_in_the_end(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=50)) as driver:
        await driver.join(*WAITING)
        await driver.settled("member-0")
        views = [asyncio.create_task(last_view(driver, name, len(WAITING) + 1)) for name in WAITING]
        await driver.join("late", "later")
        await driver.coordinator.leave(driver.members.peer("later"), fed.LeaveRequest(instance_id="1"))
        with pytest.raises(NotAMember):
            await driver.view("later")
        await asyncio.wait_for(asyncio.gather(*views), timeout=10)


async def last_view(driver: Any, name: str, online: int) -> None:
    """Wait, only ever for what is new, until so many are said to be online."""
    version = 0
    while (view := await driver.view(name, seen=version, wait=5)).clients_online != online:
        version = view.version


async def test_the_start_of_a_round_is_heard_of_at_once_by_all(
    make_plan: MakePlan, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "WOKEN_A_SECOND", 0.01)  # nothing else would be told within this test
    async with drive(make_plan(start_clients=len(WAITING))) as driver:
        await driver.join(*WAITING[:-1])
        version = await driver.settled("member-0")
        waiting = [asyncio.create_task(driver.view(name, seen=version, wait=5)) for name in WAITING[:-1]]
        await asyncio.sleep(0.05)
        await driver.join("member-7")
        while (await driver.view("member-7")).phase != fed.FEDERATION_PHASE_ROUND_OPEN:
            await asyncio.sleep(0.01)
        for view in await asyncio.wait_for(asyncio.gather(*waiting), timeout=5):
            # The last to come may have been told first, for the first news after a silence is told at once.
            opened = view.phase == fed.FEDERATION_PHASE_ROUND_OPEN
            assert opened or view.version > version
        again = [asyncio.create_task(driver.view(name, seen=version + 1, wait=5)) for name in WAITING[:-1]]
        for view in await asyncio.wait_for(asyncio.gather(*again), timeout=5):
            assert view.phase == fed.FEDERATION_PHASE_ROUND_OPEN
