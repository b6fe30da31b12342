"""Whole rounds of secure aggregation through the coordinator: what comes out, and what is taken on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfed_server.store import Traffic
from pfedsecure.errors import MessageRejected, NotAMember, PlanError, ProtectionUnavailable
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1.secagg_pb2 import MaskedInput, Unmasking

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
FOUR = ("anna", "bert", "cleo", "dora")


async def test_rounds_give_the_weighted_mean(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    plan = secure_plan()
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        for number in (1, 2, 3):
            view = await cohort.opened(driver, number, 1)
            assert (view.selected, view.step_received, view.seconds_left) == (True, 0, 5)
            await cohort.play(driver, number)
        await driver.until("anna", lambda view: view.phase == fed.FEDERATION_PHASE_FINISHED)
        for number in (2, 3, 0):
            prompt = await driver.global_prompt("anna", number)
            np.testing.assert_allclose(prompt, cohort.mean(), rtol=0, atol=cohort.bound())
        status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
        assert [(r.outcome, r.cohort, r.updates, dict(r.metrics)) for r in status.rounds] == [("closed", 7, 7, {})] * 3
        assert {member.last_round for member in status.members} == {3}


async def test_views_and_status_show_the_step(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, FOUR)
    async with drive(plan) as driver:
        await driver.join(*FOUR)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        for step in range(1, 6):
            view = await cohort.opened(driver, 1, step)
            assert (view.step_received, view.seconds_left) == (step - 1, 5 if step == 1 else 4)
            await cohort.send(driver, 1, step, "bert")
            assert (await driver.view("bert")).step_received == step
            status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
            updates = {1: 0, 2: 0, 3: 1, 4: 4, 5: 4}[step]
            assert (status.step, status.aggregation, status.rounds[0].updates) == (step, "secure", updates)
            assert [member.step_received for member in status.members] == [step - 1, step, step - 1, step - 1]
            await cohort.send(driver, 1, step, "anna", "cleo", "dora")
        await cohort.opened(driver, 2, 1)


async def test_two_runs_give_the_same_prompts_bit_by_bit(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    # Few fractional bits: which way a number is rounded shows.
    plan = secure_plan(secure_aggregation={"clip": 1.0, "precision": 0.01, "max_weight": 2**20})
    prompts, masked = [], []
    for _ in range(2):
        cohort = cohort_of(plan)
        async with drive(plan) as driver:
            await driver.join(*cohort.names)
            await cohort.opened(driver, 1, 1)
            await cohort.play(driver, 1)
            await cohort.opened(driver, 2, 1)
            prompts.append(await driver.global_prompt("anna", 2))
            masked.append(cohort.clients["anna"].message)
    np.testing.assert_array_equal(*prompts)
    assert masked[0] != masked[1]


@pytest.mark.parametrize("metrics", [True, False])
async def test_the_operator_sees_the_means_of_metrics_that_the_plan_asks_for(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, metrics: bool
) -> None:
    plan = secure_plan(metrics=metrics)
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1)
        await cohort.opened(driver, 2, 1)
        status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
        shown = dict(status.rounds[0].metrics)
        np.testing.assert_allclose(await driver.global_prompt("anna"), cohort.mean(), rtol=0, atol=cohort.bound())
    told = [cohort.contributions[name] for name in cohort.names]
    weights = [one.weight for one in told]
    assert shown == (
        {
            name: pytest.approx(np.average([one.metrics[name] for one in told], weights=weights), abs=16e-3)
            for name in ("test_accuracy", "train_loss")
        }
        if metrics
        else {}
    )


async def test_what_is_sent_again_gets_its_receipt_and_what_differs_is_refused(
    secure_plan: MakePlan, drive: Any, cohort_of: Any
) -> None:
    plan = secure_plan(clients=4)
    cohort, again = cohort_of(plan, FOUR), cohort_of(plan, FOUR)
    async with drive(plan) as driver:
        await driver.join(*FOUR)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        await again.enter(driver, 1)
        for step in range(1, 6):
            await cohort.opened(driver, 1, step)
            message = await cohort.message(driver, 1, step, "anna")
            receipt = await cohort.submit(driver, 1, step, "anna", message)
            assert await cohort.submit(driver, 1, step, "anna", message) == receipt
            for other in (message + b"\0", b"", await again.message(driver, 1, 1, "anna")):
                if other != message:
                    with pytest.raises(MessageRejected, match=f"another message of step {step} of round 1"):
                        await cohort.submit(driver, 1, step, "anna", other)
            await cohort.send(driver, 1, step, "bert", "cleo", "dora")
            if step < 5:
                await cohort.opened(driver, 1, step + 1)
                assert await cohort.submit(driver, 1, step, "anna", message) == receipt, "the step is closed by now"
                with pytest.raises(MessageRejected, match=f"another message of step {step} of round 1"):
                    await cohort.submit(driver, 1, step, "anna", message + b"\0")
        await cohort.opened(driver, 2, 1)
        with pytest.raises(MessageRejected, match="round 1 is closed; ask where the federation stands"):
            await cohort.submit(driver, 1, 5, "anna", message)
        np.testing.assert_allclose(await driver.global_prompt("anna"), cohort.mean(), rtol=0, atol=cohort.bound())


async def test_messages_and_requests_out_of_order_are_refused(
    secure_plan: MakePlan, drive: Any, cohort_of: Any
) -> None:
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, FOUR)
    async with drive(plan) as driver:
        await driver.join(*FOUR)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        ask = driver.coordinator.get_step_request
        anna, dora = driver.members.peer("anna"), driver.members.peer("dora")
        advertisement = cohort.clients["anna"].message
        for step in (0, 2, 6, 2**32 - 1):
            with pytest.raises(MessageRejected, match=f"step {step} of round 1 is not open, step 1 is"):
                await cohort.submit(driver, 1, step, "anna", advertisement)
            with pytest.raises(MessageRejected, match=f"step {step} of round 1 is not open, step 1 is"):
                await ask(anna, 1, step)
        with pytest.raises(MessageRejected, match="nothing is asked for in step 1"):
            await ask(anna, 1, 1)
        for number in (0, 2):
            with pytest.raises(MessageRejected, match=f"round {number} has not been opened"):
                await cohort.submit(driver, number, 1, "anna", advertisement)
            with pytest.raises(MessageRejected, match=f"round {number} has not been opened"):
                await ask(anna, number, 1)
        await cohort.send(driver, 1, 1, "anna", "bert", "cleo")
        driver.clock.advance(5)
        await cohort.opened(driver, 1, 2)
        late = cohort.clients["dora"].message
        with pytest.raises(MessageRejected, match="step 1 of round 1 is not open, step 2 is"):
            await cohort.submit(driver, 1, 1, "dora", late)
        shares = await cohort.message(driver, 1, 2, "anna")
        with pytest.raises(MessageRejected, match="dora has no part in step 2 of round 1: it missed an earlier one"):
            await cohort.submit(driver, 1, 2, "dora", shares)
        with pytest.raises(MessageRejected, match="dora has no part in step SHARE of round 1"):
            await ask(dora, 1, 2)
        roster = await ask(anna, 1, 2)
        assert await ask(anna, 1, 2) == roster
        await cohort.send(driver, 1, 2, "anna", "bert", "cleo")
        await cohort.opened(driver, 1, 3)
        with pytest.raises(MessageRejected, match="step 2 of round 1 is not open, step 3 is"):
            await ask(anna, 1, 2)


async def test_a_round_is_for_its_cohort(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, FOUR)
    async with drive(plan) as driver:
        await driver.join(*FOUR)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        await driver.join("emil")
        emil, anna = driver.members.peer("emil"), driver.members.peer("anna")
        with pytest.raises(MessageRejected, match="emil was not chosen for round 1"):
            await driver.coordinator.submit_step(emil, 1, 1, cohort.clients["anna"].message)
        with pytest.raises(NotAMember, match="fred does not take part"):
            await driver.coordinator.submit_step(driver.members.peer("fred"), 1, 1, cohort.clients["anna"].message)
        with pytest.raises(MessageRejected, match="bert sent an advertisement of anna"):
            await cohort.submit(driver, 1, 1, "bert", cohort.clients["anna"].message)
        await cohort.send(driver, 1, 1)
        await cohort.opened(driver, 1, 2)
        with pytest.raises(MessageRejected, match="emil was not chosen for round 1"):
            await driver.coordinator.get_step_request(emil, 1, 2)
        with pytest.raises(NotAMember):
            await driver.coordinator.get_step_request(driver.members.peer("fred"), 1, 2)
        with pytest.raises(MessageRejected, match="go to 0 clients, they must go to 3 others"):
            await driver.coordinator.submit_step(anna, 1, 2, b"")
        assert (await driver.view("anna")).step_received == 1, "what was refused has not arrived"


async def test_an_advertisement_of_another_round_or_model_is_refused(
    secure_plan: MakePlan, drive: Any, cohort_of: Any
) -> None:
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, FOUR)
    async with drive(plan) as driver:
        await driver.join(*FOUR)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        old = cohort.clients["anna"].message
        await cohort.play(driver, 1)
        await cohort.opened(driver, 2, 1)
        with pytest.raises(MessageRejected, match="is for round 1, this is round 2: it was replayed"):
            await cohort.submit(driver, 2, 1, "anna", old)
        federation_id = (await driver.coordinator.get_plan(driver.members.peer("anna"))).federation_id
        misled = cohort.client("anna", federation_id, 2, b"another prompt")
        with pytest.raises(MessageRejected, match="anna was given model"):
            await cohort.submit(driver, 2, 1, "anna", misled.message)


async def test_two_names_for_one_key_are_one_client(secure_plan: MakePlan, drive: Any, cohort_of: Any) -> None:
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, ("anna", "bert", "cleo", "dora-clone"))
    async with drive(plan) as driver:
        driver.members.clone("dora-clone", of="anna")
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        await cohort.send(driver, 1, 1, "anna")
        with pytest.raises(MessageRejected, match="the certified key of dora-clone stands twice in the roster"):
            await cohort.send(driver, 1, 1, "dora-clone")
        await cohort.send(driver, 1, 1, "bert", "cleo")
        driver.clock.advance(5)
        assert (await cohort.opened(driver, 1, 2)).step_received == 1


async def test_two_names_for_one_key_are_one_client_though_they_come_at_once(
    secure_plan: MakePlan, drive: Any, cohort_of: Any
) -> None:
    """What comes together is checked together: neither of the two is stored when the other is looked at."""
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, ("anna", "bert", "cleo", "dora-clone"))
    async with drive(plan) as driver:
        driver.members.clone("dora-clone", of="anna")
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.enter(driver, 1)
        calls = [cohort.send(driver, 1, 1, name) for name in cohort.names]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [type(None)] * 3 + [MessageRejected]
        assert "the certified key of dora-clone stands twice in the roster" in str(results[3])


@pytest.mark.parametrize("when", ["at once", "after a restart"])
async def test_whatever_a_sum_is_refused_for_loses_the_round_and_nothing_else(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The messages are the same at the next try: the server would neither go on nor ever start again."""

    def refuse(_server: Any) -> Any:
        raise MessageRejected("the X25519 key of anna is of small order")

    monkeypatch.setattr("pfedsecure.aggregation.secure.result", refuse)
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, FOUR)
    store = SqlStore.in_memory(plan)
    async with drive(plan, store) as driver:
        await driver.join(*FOUR)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, until=4)
        await cohort.opened(driver, 1, 5)
        await cohort.send(driver, 1, 5, *FOUR[:3])
        last = await cohort.message(driver, 1, 5, "dora")
        if when == "at once":
            await cohort.submit(driver, 1, 5, "dora", last)
            await cohort.opened(driver, 2, 1)
    if when != "at once":
        store.record_messages(1, 5, {"dora": last}, {"dora": Traffic()}, counts=False)
    async with drive(plan, store) as driver:
        view = await cohort.opened(driver, 2, 1)
        assert view.rounds_completed == 0
        assert await driver.global_prompt("anna", 2) is None
        assert "round 1 is lost: the X25519 key of anna is of small order" in caplog.text
    store.close()


async def test_a_vector_that_is_no_masked_one_loses_the_round_and_nothing_else(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plan = secure_plan()
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, until=2)
        await cohort.opened(driver, 1, 3)
        honest = MaskedInput.FromString(await cohort.message(driver, 1, 3, "anna"))
        honest.vector = np.random.default_rng(0).bytes(len(honest.vector))
        await cohort.submit(driver, 1, 3, "anna", honest.SerializeToString())
        await cohort.send(driver, 1, 3, *cohort.names[1:])
        for step in (4, 5):
            await cohort.opened(driver, 1, step)
            await cohort.send(driver, 1, step)
        view = await cohort.opened(driver, 2, 1)
        assert view.rounds_completed == 0
        assert await driver.global_prompt("anna", 2) is None
        assert "round 1 is lost: the masks of round 1 do not cancel" in caplog.text
        await cohort.play(driver, 2)
        await cohort.opened(driver, 3, 1)
        np.testing.assert_allclose(await driver.global_prompt("anna"), cohort.mean(), rtol=0, atol=cohort.bound())


async def test_wrong_shares_are_told_to_the_operator(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plan = secure_plan()
    cohort = cohort_of(plan)
    async with drive(plan) as driver:
        await driver.join(*cohort.names)
        await cohort.opened(driver, 1, 1)
        await cohort.play(driver, 1, until=4)
        await cohort.opened(driver, 1, 5)
        size = len(Unmasking.FromString(await cohort.message(driver, 1, 5, "bert")).shares)
        await cohort.submit(driver, 1, 5, "bert", Unmasking(shares=b"\xff" * size).SerializeToString())
        await cohort.send(driver, 1, 5, *[name for name in cohort.names if name != "bert"])
        await cohort.opened(driver, 2, 1)
        np.testing.assert_allclose(await driver.global_prompt("anna"), cohort.mean(), rtol=0, atol=cohort.bound())
    assert "round 1: wrong shares from bert" in caplog.text


def test_a_coordinator_takes_an_authority_and_a_precision_that_can_be_had(secure_plan: MakePlan, members: Any) -> None:
    plan = secure_plan()
    with pytest.raises(ProtectionUnavailable, match='"secure", which takes certificates: use TLS, or a plan'):
        Coordinator(plan, SqlStore.in_memory(plan), context_shape=SHAPE)
    plan = secure_plan(secure_aggregation={"precision": 1e-12})
    with pytest.raises(PlanError, match="precision 1e-12 cannot be had"):
        Coordinator(plan, SqlStore.in_memory(plan), context_shape=SHAPE, authority=members.server.authority)


def test_a_plan_for_a_cohort_of_two_is_refused(secure_plan: MakePlan) -> None:
    with pytest.raises(ValueError, match="of two clients each could read the other's prompt off the mean"):
        secure_plan(minimum_cohort=2)
