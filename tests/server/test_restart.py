"""A server that is started again on its state goes on as if it had never been away."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfed_server.sql_store import SqlStore
from pfed_server.store import Traffic
from pfedsecure.errors import NameTaken
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
Step = Callable[[Any], Coroutine[Any, Any, Any]]

NAMES = ("anna", "bert", "cleo")
ROUNDS = 3


def context(name: str, number: int) -> np.ndarray:
    return np.random.default_rng([NAMES.index(name), number]).normal(0, 0.02, (2, 3)).astype(np.float32)


def steps() -> list[Step]:
    """What the clients of a federation do, one call after the other."""

    def joining(name: str) -> Step:
        return lambda driver: driver.join(name)

    def working(name: str, number: int, publish: bool) -> Step:
        async def step(driver: Any) -> None:
            await driver.until_round(name, number)
            if publish:
                await driver.publish(name, number, context(name, number))
            else:
                await driver.submit(name, number, context(name, number), weight=1 + NAMES.index(name))

        return step

    calls = [joining(name) for name in NAMES]
    for number in range(1, ROUNDS + 1):
        calls += [working(name, number, publish) for name in NAMES for publish in (False, True)]
    return calls


async def run(plan: Plan, folder: Path, drive: Any, parts: list[list[Step]]) -> tuple[np.ndarray, Any]:
    """Global prompt and status at the end of a federation whose server is started anew for each part of the steps."""
    for number, part in enumerate(parts, 1):
        with closing(SqlStore.open(folder, plan)) as store:
            async with drive(plan, store) as driver:
                for step in part:
                    await step(driver)
                if number == len(parts):
                    await driver.until("anna", lambda view: view.phase == fed.FEDERATION_PHASE_FINISHED)
                    prompt = await driver.global_prompt("anna")
                    status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
    return prompt, status


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param([1], id="while gathering"),
        pytest.param([3], id="round just opened"),
        pytest.param([4], id="one update stored"),
        pytest.param([5], id="one expert staged"),
        pytest.param([8], id="all but one expert stored"),
        pytest.param([9], id="between rounds"),
        pytest.param([21], id="after the end"),
        pytest.param(list(range(1, 21)), id="before every call"),
    ],
)
async def test_the_final_prompt_is_that_of_an_undisturbed_run(
    make_plan: MakePlan, drive: Any, tmp_path: Path, cuts: list[int]
) -> None:
    plan, script = make_plan(start_clients=3), steps()
    undisturbed, status = await run(plan, tmp_path / "undisturbed", drive, [script])
    bounds = [0, *cuts, len(script)]
    parts = [script[start:end] for start, end in pairwise(bounds)]
    prompt, status_after = await run(plan, tmp_path / "restarted", drive, parts)
    np.testing.assert_array_equal(prompt, undisturbed)
    for key in ("outcome", "cohort", "updates", "bytes_received"):
        assert [getattr(r, key) for r in status_after.rounds] == [getattr(r, key) for r in status.rounds]
    assert [member.last_round for member in status_after.members] == [ROUNDS] * 3


async def opened(driver: Any) -> None:
    await driver.join(*NAMES)
    await driver.until_round("anna", 1)


async def test_a_round_that_was_complete_at_the_crash_closes_at_the_start(make_plan: MakePlan, drive: Any) -> None:
    plan = make_plan(start_clients=3, experts=0)
    store = SqlStore.in_memory(plan)
    async with drive(plan, store) as driver:
        await opened(driver)
        for name in NAMES[:2]:
            await driver.submit(name, 1, context(name, 1))
        last = driver.contribution(context("cleo", 1))
    # Written by a server that died before it could close the round.
    store.record_messages(1, 1, {"cleo": last}, {"cleo": Traffic(len(last))}, counts=True)
    async with drive(plan, store) as driver:
        view = await driver.view("anna")
        assert (view.phase, view.round, view.rounds_completed) == (fed.FEDERATION_PHASE_ROUND_OPEN, 2, 1)
        oracle = np.mean([context(name, 1).astype(np.float64) for name in NAMES], axis=0)
        np.testing.assert_allclose(await driver.global_prompt("anna", 2), oracle, rtol=1e-6)
    store.close()


@pytest.mark.parametrize(("updates", "completed"), [(1, 0), (2, 1)])
async def test_a_deadline_that_passed_meanwhile_counts(
    make_plan: MakePlan, drive: Any, updates: int, completed: int
) -> None:
    plan = make_plan(start_clients=3)
    store = SqlStore.in_memory(plan)
    async with drive(plan, store) as driver:
        await opened(driver)
        for name in NAMES[:updates]:
            await driver.work(name, 1, context(name, 1))
        driver.clock.advance(30)
    driver.clock.advance(3600)
    async with drive(plan, store) as driver:
        view = await driver.view("anna")
        # Nobody could be heard of while the server was down: all count as online and are drawn again.
        assert (view.round, view.selected, view.rounds_completed, view.clients_online) == (2, True, completed, 3)
        assert (await driver.global_prompt("anna", 2) is not None) == bool(completed)
    store.close()


async def test_versions_grow_across_a_restart_and_names_stay_taken(make_plan: MakePlan, drive: Any) -> None:
    plan = make_plan(start_clients=3)
    store = SqlStore.in_memory(plan)
    async with drive(plan, store) as driver:
        await opened(driver)
        before = await driver.view("anna")
        first = await driver.coordinator.get_plan(driver.members.peer("anna"))
    async with drive(plan, store) as driver:
        assert (await driver.view("anna")).version > before.version
        with pytest.raises(NameTaken, match="another process takes part as anna"):
            await driver.join("anna", instance="2")
        assert await driver.coordinator.get_plan(driver.members.peer("anna")) == first
    store.close()


async def test_expert_ids_survive_and_the_pool_is_matched_as_before(make_plan: MakePlan, drive: Any) -> None:
    plan = make_plan(start_clients=3)
    store = SqlStore.in_memory(plan)
    async with drive(plan, store) as driver:
        await opened(driver)
        for name in NAMES:
            await driver.work(name, 1, context(name, 1))
        await driver.until_round("anna", 2)
        ids = await driver.nearest("anna", 2, context("anna", 1), 2)
        assert len(ids) == 2
        await driver.publish("bert", 2, context("bert", 2))
    async with drive(plan, store) as driver:
        assert await driver.nearest("anna", 2, context("anna", 1), 2) == ids
    store.close()
