"""What many ask for at once: one step for all, an answer for each, and nothing of one in another's."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from pfed_server import sql_store
from pfed_server.sql_store import SqlStore
from pfed_server.together import AT_ONCE, Together
from pfedsecure.errors import MessageRejected
from pfedsecure.plan import Plan

MakePlan = Callable[..., Plan]
FOUR = ("anna", "bert", "cleo", "dora")


@dataclass(frozen=True)
class Asked:
    name: str
    what: str = ""


class Steps:
    """A federation's turns, each of which takes a while; `fails` is what the next ones end with before they begin."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.fails: list[Exception] = []

    async def exclusively(self, step: Callable[[], Awaitable[Any]]) -> Any:
        async with self._lock:
            await asyncio.sleep(0)
            if self.fails:
                raise self.fails.pop(0)
            return await asyncio.shield(asyncio.create_task(step()))


class Recorder:
    """Answers with what was asked, unless that is a wish to fail; remembers who was answered together."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def __call__(self, asked: Mapping[str, Asked]) -> dict[str, str | Exception]:
        self.steps.append(list(asked))
        await self.goes_on.wait()
        if any(each.what == "full" for each in asked.values()):
            raise OSError("nobody gets anything")
        if any(each.what == "poison" for each in asked.values()):
            raise RuntimeError("that is no number")
        return {
            name: MessageRejected(f"not {name}") if each.what == "refuse" else f"{name}{each.what}"
            for name, each in asked.items()
        }


def together(steps: Steps, recorder: Recorder) -> Together[Asked, str]:
    return Together(steps, recorder)  # type: ignore[arg-type]


async def test_those_who_come_meanwhile_are_answered_in_one_step() -> None:
    recorder = Recorder()
    ask = together(Steps(), recorder)
    recorder.goes_on.clear()
    first = asyncio.create_task(ask(Asked("zoe")))
    while not recorder.steps:
        await asyncio.sleep(0)
    others = [asyncio.create_task(ask(Asked(name))) for name in FOUR]
    await asyncio.sleep(0.01)
    recorder.goes_on.set()
    assert await asyncio.gather(first, *others) == ["zoe", *FOUR]
    assert recorder.steps == [["zoe"], list(FOUR)]


async def test_one_step_has_no_more_than_so_many_and_each_member_once() -> None:
    recorder = Recorder()
    ask = together(Steps(), recorder)
    crowd = [f"c{number}" for number in range(2 * AT_ONCE)]
    calls = [*(ask(Asked(name)) for name in crowd), ask(Asked("c0", "again"))]
    assert await asyncio.gather(*calls) == [*crowd, "c0again"]
    assert [len(step) for step in recorder.steps] == [AT_ONCE, AT_ONCE, 1]


async def test_a_refusal_is_one_members_and_a_fault_of_the_storage_everybodys() -> None:
    recorder = Recorder()
    ask = together(Steps(), recorder)
    calls = (ask(Asked("anna")), ask(Asked("bert", "refuse")), ask(Asked("cleo")))
    anna, bert, cleo = await asyncio.gather(*calls, return_exceptions=True)
    assert (anna, str(bert), cleo) == ("anna", "not bert", "cleo")
    calls = (ask(Asked("anna")), ask(Asked("bert", "full")))
    assert [str(each) for each in await asyncio.gather(*calls, return_exceptions=True)] == ["nobody gets anything"] * 2
    assert await ask(Asked("anna")) == "anna"


async def test_what_spoils_a_step_for_all_is_answered_by_itself() -> None:
    recorder = Recorder()
    ask = together(Steps(), recorder)
    calls = [ask(Asked("anna")), ask(Asked("bert", "poison")), ask(Asked("cleo"))]
    anna, bert, cleo = await asyncio.gather(*calls, return_exceptions=True)
    assert (anna, str(bert), cleo) == ("anna", "that is no number", "cleo")
    assert recorder.steps == [["anna", "bert", "cleo"], ["anna"], ["bert"], ["cleo"]]


async def test_a_turn_that_does_not_come_fails_those_who_waited_for_it_and_nobody_later() -> None:
    steps, recorder = Steps(), Recorder()
    ask = together(steps, recorder)
    steps.fails = [OSError("no lock")]
    calls = [ask(Asked(name)) for name in FOUR]
    assert [str(each) for each in await asyncio.gather(*calls, return_exceptions=True)] == ["no lock"] * 4
    assert recorder.steps == []
    assert await ask(Asked("anna")) == "anna"


async def test_who_hangs_up_takes_nobody_along(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    ask = together(Steps(), recorder)
    recorder.goes_on.clear()
    gone = asyncio.create_task(ask(Asked("anna", "refuse")))
    while not recorder.steps:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(ask(Asked("bert")))
    left = asyncio.create_task(ask(Asked("cleo")))
    await asyncio.sleep(0)
    gone.cancel()
    left.cancel()
    await asyncio.sleep(0)
    recorder.goes_on.set()
    assert await waiting == "bert"
    assert recorder.steps == [["anna"], ["bert"]], "who left before the step is not in it"
    del gone, left
    gc.collect()
    assert "never retrieved" not in caplog.text


def context(name: str) -> np.ndarray:
    return np.full((2, 3), float(FOUR.index(name)))


async def test_messages_that_come_at_once_are_one_transaction_and_all_in_the_mean(
    make_plan: MakePlan, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[list[str]] = []
    inner = SqlStore.record_messages

    def record_messages(self: SqlStore, number: int, step: int, messages: Any, *more: Any, **how: Any) -> Any:
        stored.append(list(messages))
        return inner(self, number, step, messages, *more, **how)

    monkeypatch.setattr(SqlStore, "record_messages", record_messages)
    async with drive(make_plan(experts=0, start_clients=4)) as driver:
        await driver.join(*FOUR)
        await driver.until_round("anna", 1)
        await asyncio.gather(*(driver.submit(name, 1, context(name)) for name in FOUR))
        await driver.until_round("anna", 2)
        prompt = await driver.global_prompt("anna", 2)
    assert stored == [list(FOUR)]
    np.testing.assert_allclose(prompt, np.mean([context(name) for name in FOUR], axis=0), rtol=1e-6)


async def test_experts_that_come_at_once_are_all_kept(
    make_plan: MakePlan, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[list[str]] = []
    inner = SqlStore.record_publications

    def record_publications(self: SqlStore, number: int, publications: Any, traffic: Any) -> Any:
        stored.append(sorted(publications))
        return inner(self, number, publications, traffic)

    monkeypatch.setattr(SqlStore, "record_publications", record_publications)
    async with drive(make_plan(start_clients=4)) as driver:
        await driver.join(*FOUR)
        await driver.until_round("anna", 1)
        all_there = asyncio.Event()  # each is read in a thread of its own, and ready when it is
        turn = asyncio.create_task(driver.coordinator.federation.exclusively(all_there.wait))
        published = asyncio.gather(*(driver.publish(name, 1, context(name)) for name in FOUR))
        while len(driver.coordinator._publishing._publications._waiting) < len(FOUR):
            await asyncio.sleep(0)
        all_there.set()
        await asyncio.gather(turn, published)
        await asyncio.gather(*(driver.submit(name, 1, context(name)) for name in FOUR))
        await driver.until_round("anna", 2)
        assert sorted(driver.coordinator.federation.state.pooled) == list(FOUR)
    assert stored == [list(FOUR)]


async def test_the_newest_prompt_asked_for_in_a_round_is_not_the_one_that_the_next_begins_with(
    make_plan: MakePlan, drive: Any
) -> None:
    async with drive(make_plan(experts=0, start_clients=4)) as driver:
        await driver.join(*FOUR)
        await driver.until_round("anna", 1)
        assert await driver.global_prompt("anna", 0) is None
        await asyncio.gather(*(driver.submit(name, 1, context(name)) for name in FOUR))
        await driver.until_round("anna", 2)
        assert await driver.global_prompt("bert", 2) is not None


async def test_what_was_counted_of_members_is_not_lost_with_a_transaction(
    make_plan: MakePlan, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [OSError("full")]
    inner = SqlStore.record_messages

    def record_messages(self: SqlStore, *arguments: Any, **how: Any) -> Any:
        if full:
            raise full.pop()
        return inner(self, *arguments, **how)

    monkeypatch.setattr(SqlStore, "record_messages", record_messages)
    async with drive(make_plan(experts=0, start_clients=4)) as driver:
        await driver.join(*FOUR)
        await driver.until_round("anna", 1)
        calls = [driver.submit(name, 1, context(name)) for name in FOUR]
        assert {type(each) for each in await asyncio.gather(*calls, return_exceptions=True)} == {OSError}
        await asyncio.gather(*(driver.submit(name, 1, context(name)) for name in FOUR))
        await driver.until_round("anna", 2)
        sizes = sum(len(driver.contribution(context(name))) for name in FOUR)
        assert driver.coordinator.federation.store.history().rounds[0].traffic.received == 2 * sizes


async def test_a_disk_that_is_full_keeps_none_of_them_and_each_may_come_again(
    make_plan: MakePlan, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, full = sql_store.update_parts, [True]

    def update_parts(*arguments: Any) -> None:
        inner(*arguments)
        if full:
            raise OperationalError("update", None, Exception("database or disk is full"))

    monkeypatch.setattr(sql_store, "update_parts", update_parts)
    async with drive(make_plan(experts=0, start_clients=4)) as driver:
        await driver.join(*FOUR)
        await driver.until_round("anna", 1)
        calls = [driver.submit(name, 1, context(name)) for name in FOUR]
        assert {type(each) for each in await asyncio.gather(*calls, return_exceptions=True)} == {OperationalError}
        state = driver.coordinator.federation.store.load()
        assert {part.step for part in state.open_round.parts.values()} == {0}
        full.clear()
        await asyncio.gather(*(driver.submit(name, 1, context(name)) for name in FOUR))
        await driver.until_round("anna", 2)


async def test_two_messages_of_one_member_at_once_are_not_both_taken(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(experts=0, start_clients=4)) as driver:
        await driver.join(*FOUR)
        await driver.until_round("anna", 1)
        calls = [driver.submit("anna", 1, context(name)) for name in ("anna", "bert", "anna")]
        first, other, again = await asyncio.gather(*calls, return_exceptions=True)
        assert first == again
        assert "already sent another message of step 1" in str(other)
