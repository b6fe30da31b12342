"""A server that is started again in the middle of an aggregation goes on as if it had never been away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfed_server.sql_store import SqlStore
from pfed_server.store import Traffic
from pfedsecure.plan import Plan

MakePlan = Callable[..., Plan]
FOUR = ("anna", "bert", "cleo", "dora")


async def round_played(
    plan: Plan, folder: Path, drive: Any, cohort: Any, stops: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, Any]:
    """The prompt and status after round 1. The server is started anew after so many messages of those steps."""
    calls = [(step, name) for step in range(1, 6) for name in cohort.names]
    cuts = sorted(calls.index((step, cohort.names[sent - 1])) + 1 for step, sent in stops)
    entered = False
    for start, end in zip([0, *cuts], [*cuts, len(calls)], strict=True):
        with closing(SqlStore.open(folder, plan)) as store:
            async with drive(plan, store) as driver:
                if not entered:
                    await driver.join(*cohort.names)
                    await cohort.opened(driver, 1, 1)
                    await cohort.enter(driver, 1)
                    entered = True
                for step, name in calls[start:end]:
                    await cohort.opened(driver, 1, step)
                    await cohort.send(driver, 1, step, name)
                if end == len(calls):
                    await cohort.opened(driver, 2, 1)
                    status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
                    return await driver.global_prompt("anna", 2), status
    raise AssertionError("the last part plays the round to its end")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops",
    [
        *[pytest.param([(step, 2)], id=f"in step {step}") for step in range(1, 6)],
        *[pytest.param([(step, 4)], id=f"after step {step}") for step in range(1, 5)],
        pytest.param([(step, sent) for step in range(1, 6) for sent in (1, 2, 3)], id="after every message"),
    ],
)
async def test_the_mean_is_that_of_an_undisturbed_round(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, tmp_path: Path, stops: list[tuple[int, int]]
) -> None:
    # Few fractional bits: were a number rounded another way, it would show.
    plan = secure_plan(clients=4, secure_aggregation={"clip": 1.0, "precision": 0.01, "max_weight": 2**21 - 1})
    undisturbed, status = await round_played(plan, tmp_path / "undisturbed", drive, cohort_of(plan, FOUR), [])
    cohort = cohort_of(plan, FOUR)
    prompt, status_after = await round_played(plan, tmp_path / "restarted", drive, cohort, stops)
    np.testing.assert_array_equal(prompt, undisturbed)
    np.testing.assert_allclose(prompt, cohort.mean(), rtol=0, atol=cohort.bound())
    for key in ("outcome", "cohort", "updates"):
        assert [getattr(r, key) for r in status_after.rounds] == [getattr(r, key) for r in status.rounds]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
async def test_a_step_that_was_complete_at_the_crash_closes_at_the_start(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, tmp_path: Path, step: int
) -> None:
    plan = secure_plan(clients=4)
    cohort, undisturbed = cohort_of(plan, FOUR), cohort_of(plan, FOUR)
    expected, _ = await round_played(plan, tmp_path / "undisturbed", drive, undisturbed, [])
    with closing(SqlStore.open(tmp_path / "state", plan)) as store:
        async with drive(plan, store) as driver:
            await driver.join(*FOUR)
            await cohort.opened(driver, 1, 1)
            if step == 1:
                await cohort.enter(driver, 1)
            else:
                await cohort.play(driver, 1, until=step - 1)
            await cohort.opened(driver, 1, step)
            await cohort.send(driver, 1, step, *FOUR[:3])
            last = await cohort.message(driver, 1, step, "dora")
        # Written by a server that died before it could close the step.
        store.record_messages(1, step, {"dora": last}, {"dora": Traffic(len(last))}, counts=step == 3)
    with closing(SqlStore.open(tmp_path / "state", plan)) as store:
        async with drive(plan, store) as driver:
            view = await driver.view("anna")
            assert (view.round, view.step) == ((1, step + 1) if step < 5 else (2, 1)), "closed before anybody called"
            for later in range(step + 1, 6):
                await cohort.opened(driver, 1, later)
                await cohort.send(driver, 1, later)
            await cohort.opened(driver, 2, 1)
            np.testing.assert_array_equal(await driver.global_prompt("anna", 2), expected)


@pytest.mark.parametrize(("gone", "closes"), [(2, True), (3, False)])
async def test_a_deadline_that_passed_meanwhile_counts(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, gone: int, closes: bool
) -> None:
    plan = secure_plan()
    store = SqlStore.in_memory(plan)
    cohort = cohort_of(plan)
    async with drive(plan, store) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, until=4)
        await cohort.opened(driver, 1, 5)
        await cohort.send(driver, 1, 5, *cohort.names[gone:])
    driver.clock.advance(3600)
    async with drive(plan, store) as driver:
        view = await driver.view("anna")
        assert (view.round, view.step, view.rounds_completed) == (2, 1, int(closes))
        if closes:
            prompt = await driver.global_prompt("anna", 2)
            np.testing.assert_allclose(prompt, cohort.mean(), rtol=0, atol=cohort.bound())
    store.close()
