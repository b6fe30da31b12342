"""A round from opening to its end: what is taken, what is shown to whom, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfed_server.rounds import draw_cohort
from pfed_server.sql_store import SqlStore
from pfedsecure.errors import MessageRejected
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.payload_pb2 import Publication

MakePlan = Callable[..., Plan]


def prompt(number: float) -> np.ndarray:
    return np.full((2, 3), number, dtype=np.float32)


async def test_a_federation_from_beginning_to_end(make_plan: MakePlan, drive: Any) -> None:
    names = ("anna", "bert", "cleo")
    async with drive(make_plan(start_clients=3)) as driver:
        await driver.join("anna", "bert")
        gathering = await driver.view("anna")
        assert (gathering.phase, gathering.round) == (fed.FEDERATION_PHASE_GATHERING, 0)
        assert (gathering.clients_online, gathering.clients_needed) == (2, 3)
        await driver.join("cleo")
        for number in (1, 2, 3):
            view = await driver.until_round("anna", number)
            assert (view.selected, view.step_received, view.expert_received) == (True, 0, False)
            assert (view.rounds_completed, view.rounds_planned) == (number - 1, 3)
            assert view.seconds_left == 60
            assert await driver.global_prompt("anna", number) is None if number == 1 else True
            for worth, name in enumerate(names, 1):
                await driver.work(name, number, prompt(number * worth), weight=worth)
        end = await driver.until("bert", lambda view: view.phase == fed.FEDERATION_PHASE_FINISHED)
        assert (end.round, end.rounds_completed, end.selected, end.seconds_left) == (3, 3, False, 0)
        # (1 * 1 + 2 * 2 + 3 * 3) / (1 + 2 + 3) = 7/3 of the round's number
        for number in (2, 3):
            assert await driver.global_prompt("anna", number) == pytest.approx(prompt((number - 1) * 7 / 3))
        assert await driver.global_prompt("anna") == pytest.approx(prompt(7))
        with pytest.raises(MessageRejected, match="round 3 is closed"):
            await driver.submit("anna", 3, prompt(1))


async def test_experts_are_seen_from_the_next_round_on(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna", "bert")
        await driver.until_round("anna", 1)
        await driver.publish("bert", 1, prompt(1))
        assert await driver.nearest("anna", 1, prompt(1), 2) == []
        for name in ("anna", "bert"):
            await driver.submit(name, 1, prompt(1))
        await driver.publish("anna", 1, prompt(5))
        await driver.until_round("anna", 2)
        await driver.publish("bert", 2, prompt(2))
        ids = await driver.nearest("anna", 2, prompt(2), 2)
        assert len(ids) == 1
        assert await driver.experts("anna", 2, ids) == [pytest.approx(prompt(1))]
        assert "bert" not in ids[0]
        assert await driver.experts("bert", 2, await driver.nearest("bert", 2, prompt(0), 2)) == [
            pytest.approx(prompt(5))
        ]


async def test_an_old_expert_stays_until_its_author_publishes_again(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3, deadline_seconds=5)) as driver:
        await driver.join("anna", "bert", "cleo")
        await driver.until_round("anna", 1)
        for worth, name in enumerate(("anna", "bert", "cleo"), 1):
            await driver.work(name, 1, prompt(worth))
        await driver.until_round("anna", 2)
        for name in ("anna", "bert"):
            await driver.work(name, 2, prompt(10))
        driver.clock.advance(5)
        await driver.until_round("anna", 3)
        ids = await driver.nearest("anna", 3, prompt(3), 2)
        experts = await driver.experts("anna", 3, ids)
        assert [expert[0, 0] for expert in experts] == [3, 10]


async def test_the_expert_of_a_member_that_left_goes_with_the_next_round(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3)) as driver:
        await driver.join("anna", "bert", "cleo")
        await driver.until_round("anna", 1)
        for worth, name in enumerate(("anna", "bert", "cleo"), 1):
            await driver.work(name, 1, prompt(worth))
        await driver.until_round("anna", 2)
        (cleos,) = await driver.nearest("anna", 2, prompt(3), 1)
        await driver.coordinator.leave(driver.members.peer("cleo"), fed.LeaveRequest(instance_id="1"))
        assert await driver.nearest("anna", 2, prompt(3), 1) == [cleos]
        for name in ("anna", "bert"):  # cleo is not waited for
            await driver.work(name, 2, prompt(1))
        await driver.until_round("anna", 3)
        assert cleos not in await driver.nearest("anna", 3, prompt(3), 2)
        assert await driver.coordinator.get_experts(driver.members.peer("anna"), 3, [cleos]) == {}


async def test_with_too_few_updates_nothing_is_combined_or_revealed(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3, deadline_seconds=10)) as driver:
        await driver.join("anna", "bert", "cleo")
        await driver.until_round("anna", 1)
        await driver.work("anna", 1, prompt(1))
        await driver.publish("bert", 1, prompt(2))
        driver.clock.advance(10)
        view = await driver.until_round("anna", 2)
        assert view.rounds_completed == 0
        assert await driver.global_prompt("anna", 2) is None
        assert await driver.nearest("anna", 2, prompt(1), 2) == []
        status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
        assert [(record.outcome, record.updates) for record in status.rounds] == [("abandoned", 1), ("open", 0)]
        assert {member.last_round for member in status.members} == {0}


async def test_a_straggler_is_left_out_at_the_deadline(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3, deadline_seconds=10)) as driver:
        await driver.join("anna", "bert", "cleo")
        await driver.until_round("anna", 1)
        await driver.work("anna", 1, prompt(1), weight=1)
        await driver.work("bert", 1, prompt(4), weight=2)
        assert (await driver.view("anna")).round == 1
        driver.clock.advance(10)
        await driver.until_round("anna", 2)
        assert await driver.global_prompt("anna", 2) == pytest.approx(prompt(3))
        with pytest.raises(MessageRejected, match="round 1 is closed; ask where the federation stands"):
            await driver.submit("cleo", 1, prompt(100))
        reply = await driver.coordinator.heartbeat(driver.members.peer("cleo"), fed.HeartbeatRequest(instance_id="1"))
        assert (reply.round_open, reply.round) == (True, 2)


async def test_what_is_sent_again_is_taken_once_and_what_differs_is_refused(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna", "bert")
        await driver.until_round("anna", 1)
        first = await driver.submit("anna", 1, prompt(1), weight=3)
        assert await driver.submit("anna", 1, prompt(1), weight=3) == first
        with pytest.raises(MessageRejected, match="anna has already sent another message of step 1 of round 1"):
            await driver.submit("anna", 1, prompt(2), weight=3)
        published = await driver.publish("anna", 1, prompt(1))
        assert await driver.publish("anna", 1, prompt(1)) == published
        with pytest.raises(MessageRejected, match="anna has already published another expert in round 1"):
            await driver.publish("anna", 1, prompt(2))
        await driver.work("bert", 1, prompt(5))
        await driver.until_round("anna", 2)
        assert await driver.global_prompt("anna", 2) == pytest.approx(prompt(2))


async def test_only_the_cohort_works_on_the_open_round(make_plan: MakePlan, drive: Any) -> None:
    plan = make_plan(start_clients=4, participation=0.5)
    names = {"anna", "bert", "cleo", "dora"}
    async with drive(plan) as driver:
        await driver.join(*sorted(names))
        await driver.until_round("anna", 1)
        cohort = draw_cohort(plan, 1, names)
        idle = min(names - set(cohort))
        assert [name for name in sorted(names) if (await driver.view(name)).selected] == cohort
        for call in (
            driver.submit(idle, 1, prompt(1)),
            driver.publish(idle, 1, prompt(1)),
            driver.nearest(idle, 1, prompt(1), 1),
            driver.experts(idle, 1, []),
        ):
            with pytest.raises(MessageRejected, match=f"{idle} was not chosen for round 1"):
                await call
        with pytest.raises(MessageRejected, match="round 2 has not been opened"):
            await driver.submit(cohort[0], 2, prompt(1))
        with pytest.raises(MessageRejected, match="round 2 has not been opened yet"):
            await driver.global_prompt(idle, 2)
        with pytest.raises(MessageRejected, match="round 0 has not been opened"):
            await driver.submit(cohort[0], 0, prompt(1))
        assert not (
            await driver.coordinator.heartbeat(driver.members.peer(idle), fed.HeartbeatRequest(instance_id="1"))
        ).round_open


async def test_malformed_work_is_refused_and_counts_for_nothing(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan()) as driver:
        await driver.join("anna", "bert")
        await driver.until_round("anna", 1)
        peer, calls = driver.members.peer("anna"), driver.coordinator
        good = Publication.FromString(driver.publication(prompt(1)))
        wrong_shape = Publication.FromString(driver.publication(np.ones((3, 2))))
        not_finite = Publication.FromString(driver.publication(prompt(np.nan)))
        for message, call in (
            ("not a PlainContribution", calls.submit_step(peer, 1, 1, b"\xff")),
            ("weight 0 is not in", calls.submit_step(peer, 1, 1, driver.contribution(prompt(1), weight=0))),
            ("not finite", calls.submit_step(peer, 1, 1, driver.contribution(prompt(np.inf)))),
            ("not a Publication", calls.publish_expert(peer, 1, b"\xff")),
            (
                "the expert is not a PlainExpert",
                calls.publish_expert(peer, 1, Publication(expert=b"\xff", sketch=good.sketch).SerializeToString()),
            ),
            ("the expert has shape", calls.publish_expert(peer, 1, wrong_shape.SerializeToString())),
            ("not finite", calls.publish_expert(peer, 1, not_finite.SerializeToString())),
            (
                "the sketch",
                calls.publish_expert(peer, 1, Publication(expert=good.expert, sketch=b"\xff").SerializeToString()),
            ),
            ("the sketch", calls.match(peer, rnd.MatchRequest(round=1, query=b"\xff", experts=1))),
            ("0 experts asked for, the plan allows 1 to 2", calls.match(peer, rnd.MatchRequest(round=1, experts=0))),
            ("3 experts asked for", calls.match(peer, rnd.MatchRequest(round=1, experts=3))),
            ("fetched once each, and no more than there are", calls.get_experts(peer, 1, ["x"])),
            ("fetched once each, and no more than there are", calls.get_experts(peer, 1, ["x", "x"])),
        ):
            with pytest.raises(MessageRejected, match=message):
                await call
        view = await driver.view("anna")
        assert (view.step_received, view.expert_received) == (0, False)


async def test_a_plan_without_experts_takes_none(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(experts=0)) as driver:
        await driver.join("anna", "bert")
        await driver.until_round("anna", 1)
        with pytest.raises(MessageRejected, match="lend each other no experts"):
            await driver.publish("anna", 1, prompt(1))
        with pytest.raises(MessageRejected, match="1 experts asked for, the plan allows 1 to 0"):
            await driver.nearest("anna", 1, prompt(1), 1)
        for name in ("anna", "bert"):
            await driver.submit(name, 1, prompt(1))
        await driver.until_round("anna", 2)


async def test_matching_by_lot_offers_everybody_elses(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(start_clients=3, protection={"matching": "random"})) as driver:
        await driver.join("anna", "bert", "cleo")
        await driver.until_round("anna", 1)
        for worth, name in enumerate(("anna", "bert", "cleo"), 1):
            await driver.work(name, 1, prompt(worth))
        await driver.until_round("anna", 2)
        experts = await driver.experts("anna", 2, await driver.nearest("anna", 2, prompt(1), 2))
        assert sorted(expert[0, 0] for expert in experts) == [2, 3]


async def test_the_end_is_waited_for_until_everybody_knows(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(count=1)) as driver:
        await driver.join("anna", "bert")
        await driver.until_round("anna", 1)
        waiting = asyncio.create_task(driver.coordinator.wait_until_end_is_known())
        for name in ("anna", "bert"):
            await driver.work(name, 1, prompt(1))
        await driver.until("anna", lambda view: view.phase == fed.FEDERATION_PHASE_FINISHED)
        driver.clock.advance(2)
        await asyncio.sleep(0.05)
        driver.clock.advance(2)
        await asyncio.sleep(0.05)
        assert not waiting.done(), "bert does not know yet"
        await driver.view("bert")
        for _ in range(2):  # one heartbeat to notice, one for bert to fetch the final prompt
            assert not waiting.done()
            driver.clock.advance(2)
            await asyncio.sleep(0.05)
        await asyncio.wait_for(waiting, timeout=5)


async def test_a_member_that_vanished_does_not_keep_the_end_from_coming(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(count=1)) as driver:
        await driver.join("anna", "bert")
        await driver.until_round("anna", 1)
        for name in ("anna", "bert"):
            await driver.work(name, 1, prompt(1))
        await driver.until("anna", lambda view: view.phase == fed.FEDERATION_PHASE_FINISHED)
        waiting = asyncio.create_task(driver.coordinator.wait_until_end_is_known())
        for _ in range(7):  # six heartbeats are the time-out, and one more
            await asyncio.sleep(0.02)
            driver.clock.advance(2)
        await asyncio.wait_for(waiting, timeout=5)


async def test_the_global_prompt_is_the_weighted_mean_in_any_order_of_arrival(make_plan: MakePlan, drive: Any) -> None:
    names = ("anna", "bert", "cleo", "dora")
    weights = (1, 2, 1000, 77)
    contexts = np.random.default_rng(0).normal(0, 0.02, (4, 2, 3)).astype(np.float32)
    combined = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        async with drive(make_plan(start_clients=4, experts=0)) as driver:
            await driver.join(*names)
            await driver.until_round("anna", 1)
            for row in order:
                await driver.submit(names[row], 1, contexts[row], weights[row])
            await driver.until_round("anna", 2)
            combined.append(await driver.global_prompt("anna", 2))
    oracle = np.average(contexts.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(combined[0], oracle, rtol=1e-6)
    np.testing.assert_array_equal(combined[0], combined[1])
    np.testing.assert_array_equal(combined[0], combined[2])


async def test_a_transition_that_the_disk_refuses_is_tried_again(
    make_plan: MakePlan, drive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class FullDisk(SqlStore):
        refusals = 1

        def open_round(self, *arguments: Any) -> Any:
            if self.refusals:
                self.refusals -= 1
                raise OSError("no space left on device")
            return super().open_round(*arguments)

    plan = make_plan()
    store = FullDisk.in_memory(plan)
    async with drive(plan, store) as driver:
        await driver.join("anna", "bert")
        while "a transition failed" not in caplog.text:
            await asyncio.sleep(0.005)
        driver.clock.advance(2)  # after a pause, or at once where somebody called meanwhile
        await driver.until_round("anna", 1)
    assert store.refusals == 0
    store.close()
