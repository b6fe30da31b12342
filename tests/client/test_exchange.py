"""A server that answers wrongly: one clear error, and nothing trained or sent because of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from pfed_client.exchange import Exchange
from pfed_server.publication import read_publication
from pfedsecure.aggregation.interface import RoundIdentity
from pfedsecure.aggregation.plain import PlainServerAggregation
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.plain import PlainExperts
from pfedsecure.matching.plain import PlainClientMatching, PlainServerMatching
from pfedsecure.plan import Plan
from pfedsecure.wire.tensors import check_norm, to_tensor
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.expert_pb2 import PlainExpert
from pfedsecure.wire.v1.matching_pb2 import EncryptedAnswer
from pfedsecure.wire.v1.payload_pb2 import PlainMatchAnswer

GOOD = np.zeros((2, 3), np.float32)


def prompt(array: np.ndarray) -> bytes:
    return to_tensor(array.astype(np.float32)).SerializeToString()


def expert(array: np.ndarray) -> bytes:
    return PlainExpert(context=to_tensor(array.astype(np.float32))).SerializeToString()


def answer(*ids: str) -> bytes:
    return PlainMatchAnswer(candidates=[PlainMatchAnswer.Candidate(expert_id=i) for i in ids]).SerializeToString()


def always(reply: Any) -> Callable[..., Any]:
    async def call(*_args: Any) -> Any:
        return reply

    return call


BAD_REPLIES: dict[str, tuple[dict[str, Any], str]] = {
    "prompt of another shape": ({"get_global_prompt": prompt(np.zeros((3, 2)))}, r"global prompt has shape \(3, 2\)"),
    "prompt with a number missing": (
        {"get_global_prompt": prompt(np.full((2, 3), np.nan))},
        "global prompt holds numbers that are not finite",
    ),
    "prompt of other bytes": ({"get_global_prompt": b"\xff\xff"}, "global prompt from the server cannot be decoded"),
    "answer of other bytes": ({"match": b"\xff\xff"}, "not a PlainMatchAnswer"),
    "an expert twice": ({"match": answer("e", "e")}, "names an expert twice"),
    "another expert": (
        {"match": answer("e"), "get_experts": {"f": expert(GOOD)}},
        "other experts than were asked for",
    ),
}


@pytest.mark.parametrize("case", BAD_REPLIES)
async def test_wrong_answers(
    federation: Any, make_plan: Any, around: Any, make_trainer: Any, recorder: Any, case: str
) -> None:
    replies, message = BAD_REPLIES[case]
    trainer = make_trainer("a")
    async with federation(make_plan(mixture__experts=2)) as it:
        api = around(it.api("a"), **{method: always(reply) for method, reply in replies.items()})
        tasks = [
            asyncio.create_task(it.run("b")),
            asyncio.create_task(it.run("a", api=api, trainer=trainer, observer=recorder)),
        ]
        while not recorder.reasons:
            await asyncio.sleep(0.01)
        assert re.search(message, recorder.reasons[0])
        await ended(tasks)
        assert trainer.trained == []
        assert not (it.folder / "a" / "model.safetensors").exists()
        part = it.store.load().open_round.parts["a"]
        assert part.message_digest is None
        assert part.publication_digest is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(6), r"has shape \(6,\)"),
        (np.full((2, 3), np.inf), "holds numbers that are not finite"),
        (np.full((2, 3), 3e38), "over the plan's prompt.max_norm"),
    ],
)
async def test_an_expert_that_cannot_be_used_is_left_out(
    federation: Any, make_plan: Any, around: Any, caplog: pytest.LogCaptureFixture, bad: Any, message: str
) -> None:
    """One member must not be able to stop the others: the round goes on with the experts that are good."""
    async with federation(make_plan(mixture__experts=2)) as it:
        offer = always(answer("e", "f"))
        experts = always({"e": expert(bad), "f": expert(GOOD)})
        await asyncio.gather(it.run("a", api=around(it.api("a"), match=offer, get_experts=experts)), it.run("b"))
        np.testing.assert_array_equal(it.model("a").experts, GOOD[None])
    assert re.search(message, caplog.text)


def test_a_prompt_over_the_norm_is_scaled(make_plan: Any) -> None:
    exchange = exchange_of(make_plan(prompt__max_norm=5.0))
    bounded = exchange.bounded(np.full((2, 3), 1000, np.float32))
    check_norm(bounded, 5.0, "the prompt")
    with pytest.raises(MessageRejected, match="the prompt has norm 5, over"):
        check_norm(bounded, 4.99, "the prompt")
    np.testing.assert_array_equal(exchange.bounded(GOOD), GOOD)


async def test_a_global_prompt_over_the_norm_is_scaled_and_ends_nobody(federation: Any, around: Any) -> None:
    """A single member can make the mean too long, and the clients that refused it would refuse it for ever."""
    async with federation() as it:
        huge = around(it.api("a"), get_global_prompt=always(prompt(np.full((2, 3), 3e38))))
        await asyncio.gather(it.run("a", api=huge), it.run("b"))
        assert np.linalg.norm(it.model("a").context) < 101


async def test_experts_that_are_gone_are_gone_without(
    federation: Any, make_plan: Any, around: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Their authors left, or came back with other keys, after the match: that must stop nobody."""
    async with federation(make_plan(mixture__experts=2)) as it:
        api = around(it.api("a"), match=always(answer("e", "f")), get_experts=always({"f": expert(GOOD)}))
        await asyncio.gather(it.run("a", api=api), it.run("b"))
        np.testing.assert_array_equal(it.model("a").experts, GOOD[None])
    assert "1 of 2 experts are not there any more" in caplog.text


async def test_all_experts_are_fetched_and_the_nearest_chosen_here(
    federation: Any, make_plan: Any, around: Any
) -> None:
    """The server is asked for all of them, in an order that has nothing to do with who is near, and for no match."""
    asked: list[Any] = []
    async with federation(make_plan(mixture__experts=1, rounds__minimum_cohort=4)) as it:
        api = it.api("a")

        async def match(request: Any) -> Any:
            asked.append((request.everything, request.query))
            return await api.match(request)

        async def get_experts(number: int, ids: Any) -> Any:
            asked.append(sorted(ids) == list(ids) and len(ids))
            return await api.get_experts(number, ids)

        around_a = around(api, match=match, get_experts=get_experts)
        await asyncio.gather(it.run("a", api=around_a, fetch_all=True), *(it.run(name) for name in "bcd"))
        everything = (True, b"")
        assert asked == [everything, everything, 3, everything, 3]
        contexts = {name: it.model(name) for name in "abcd"}
        assert contexts["a"].experts.shape == (1, 2, 3)


async def test_fetching_all_finds_what_plain_matching_finds(federation: Any, make_plan: Any) -> None:
    plan = make_plan(mixture__experts=2, rounds__minimum_cohort=4)
    found = []
    for fetch_all in (False, True):
        async with federation(plan) as it:
            await asyncio.gather(*(it.run(name, fetch_all=fetch_all) for name in "abcd"))
            found.append({name: it.model(name).experts for name in "abcd"})
    for name in "abcd":
        np.testing.assert_array_equal(found[0][name], found[1][name])


async def ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def exchange_of(plan: Plan) -> Exchange:
    """One that is never going to call anybody."""
    experts = PlainExperts((2, 3), plan.prompt.max_norm)
    return Exchange(None, plan, GOOD, experts, PlainClientMatching())  # type: ignore[arg-type]


async def test_both_that_is_sent_of_a_prompt_over_the_norm_is_scaled(
    federation: Any, make_plan: Any, make_trainer: Any, around: Any
) -> None:
    """Read as the server reads it, once with the plan's bound and once with a bound that is a little tighter."""
    plan = make_plan(rounds__count=1, prompt__max_norm=0.25)
    sent: dict[str, bytes] = {}
    async with federation(plan) as it:
        api = it.api("a")

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            sent["message"] = content
            return await api.submit_step(number, step, content)

        async def publish_expert(number: int, content: bytes) -> Any:
            sent["publication"] = content
            return await api.publish_expert(number, content)

        watched = around(api, submit_step=submit_step, publish_expert=publish_expert)
        await asyncio.gather(it.run("a", api=watched), it.run("b"))
        assert np.linalg.norm(it.model("a").context) > 0.26

    def read(max_norm: float) -> list[Callable[[], Any]]:
        experts, matching = PlainExperts((2, 3), max_norm), PlainServerMatching((2, 3), max_norm)
        identity = RoundIdentity("0f" * 16, 1, "ab" * 32)
        aggregation = PlainServerAggregation((2, 3), max_norm, 1).round(identity, {1: {}})
        return [
            lambda: read_publication(sent["publication"], experts, matching, "", 1),
            lambda: aggregation.check(1, "a", sent["message"], datetime.now(UTC)),
        ]

    for check in read(0.25):
        check()
    for check in read(0.249):
        with pytest.raises(MessageRejected, match=r"has norm 0\.25, over"):
            check()


@pytest.mark.parametrize("method", ["submit_step", "publish_expert"])
async def test_a_receipt_for_something_else(federation: Any, around: Any, recorder: Any, method: str) -> None:
    async with federation() as it:
        api = around(it.api("a"), **{method: always(rnd.Receipt(sha256=b"0" * 32))})
        tasks = [asyncio.create_task(it.run("b")), asyncio.create_task(it.run("a", api=api, observer=recorder))]
        while not recorder.reasons:
            await asyncio.sleep(0.01)
        assert "receipt is for something else" in recorder.reasons[0]
        await ended(tasks)


async def test_never_more_experts_than_the_plan_has(federation: Any, around: Any, make_trainer: Any) -> None:
    """The plan says K = 1, the server offers three: the nearest one is used, the others are not even fetched."""
    fetched: list[Any] = []

    async def get_experts(_round: int, ids: Any) -> dict[str, bytes]:
        fetched.append(list(ids))
        return {i: expert(GOOD) for i in ids}

    async with federation() as it:
        offer = always(answer("e", "f", "g"))
        api = around(it.api("a"), match=offer, get_experts=get_experts)
        await asyncio.gather(it.run("a", api=api), it.run("b"))
        assert fetched == [["e"]] * 3
        assert it.model("a").experts.shape == (1, 2, 3)


async def test_who_finds_that_answers_are_made_up_asks_no_more(
    federation: Any, make_protected_plan: Any, around: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that makes up answers learns from what is asked for: ids that nobody has make a client stop."""
    questions = []
    async with federation(make_protected_plan(rounds__count=4, mixture__experts=2)) as it:
        api = it.api("a")

        async def match(request: Any) -> bytes:
            questions.append(request.round)
            answer = EncryptedAnswer.FromString(await api.match(request))
            for block in answer.blocks:
                block.expert_ids[:] = [f"made-up-{lane}" if name else "" for lane, name in enumerate(block.expert_ids)]
            return answer.SerializeToString()

        async def get_experts(_number: int, _ids: Any) -> dict[str, bytes]:
            return {}

        cheated = around(api, match=match, get_experts=get_experts)
        await asyncio.gather(it.run("a", api=cheated), it.run("b"), it.run("c"))
        assert len(it.model("b").experts) == 2
        assert len(it.model("a").experts) == 0
    assert max(questions) == 2  # in round 1 there was nothing to ask for
    assert "this session matches no more" in caplog.text


async def test_who_is_told_a_wrong_distance_to_itself_says_so_and_believes_nothing_beside_it(
    federation: Any, make_protected_plan: Any, around: Any
) -> None:
    reports = []
    async with federation(make_protected_plan(rounds__count=2, mixture__experts=2)) as it:
        api = it.api("a")

        async def match(request: Any) -> bytes:
            answer = EncryptedAnswer.FromString(await api.match(request))
            if answer.HasField("own"):
                block = answer.blocks[answer.own.block]
                block.bodies = bytes(len(block.bodies))
            return answer.SerializeToString()

        async def report_matching(request: Any) -> Any:
            reports.append(request.round)
            return await api.report_matching(request)

        spoilt = around(api, match=match, report_matching=report_matching)
        await asyncio.gather(it.run("a", api=spoilt), it.run("b"), it.run("c"))
        assert (len(it.model("a").experts), len(it.model("b").experts)) == (0, 2)
    assert reports == [2]
