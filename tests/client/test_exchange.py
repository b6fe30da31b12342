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
from pfedsecure.matching.plain import PlainServerMatching
from pfedsecure.plan import Plan
from pfedsecure.wire.tensors import check_norm, to_tensor
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.expert_pb2 import PlainExpert
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
    "answer of other bytes": ({"match": rnd.MatchReply(answer=b"\xff\xff")}, "not a PlainMatchAnswer"),
    "an expert twice": ({"match": rnd.MatchReply(answer=answer("e", "e"))}, "names an expert twice"),
    "an expert missing": (
        {"match": rnd.MatchReply(answer=answer("e", "f")), "get_experts": {"e": expert(GOOD)}},
        "other experts than were asked for",
    ),
    "another expert": (
        {"match": rnd.MatchReply(answer=answer("e")), "get_experts": {"f": expert(GOOD)}},
        "other experts than were asked for",
    ),
    "prompt over the norm": (
        {"get_global_prompt": prompt(np.full((2, 3), 3e38))},
        r"global prompt has norm .*, over the plan's prompt.max_norm",
    ),
}


@pytest.mark.parametrize("case", BAD_REPLIES)
async def test_wrong_answers(federation: Any, make_plan: Any, around: Any, make_trainer: Any, case: str) -> None:
    replies, message = BAD_REPLIES[case]
    trainer = make_trainer("a")
    async with federation(make_plan(mixture__experts=2)) as it:
        other = asyncio.create_task(it.run("b"))
        api = around(it.api("a"), **{method: always(reply) for method, reply in replies.items()})
        with pytest.raises(MessageRejected, match=message):
            await it.run("a", api=api, trainer=trainer)
        other.cancel()
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
        offer = always(rnd.MatchReply(answer=answer("e", "f")))
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


def exchange_of(plan: Plan) -> Exchange:
    """One that is never going to call anybody."""
    return Exchange(None, plan, GOOD, PlainExperts((2, 3), plan.prompt.max_norm))  # type: ignore[arg-type]


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
async def test_a_receipt_for_something_else(federation: Any, around: Any, method: str) -> None:
    async with federation() as it:
        other = asyncio.create_task(it.run("b"))
        api = around(it.api("a"), **{method: always(rnd.Receipt(sha256=b"0" * 32))})
        with pytest.raises(MessageRejected, match="receipt is for something else"):
            await it.run("a", api=api)
        other.cancel()


async def test_never_more_experts_than_the_plan_has(federation: Any, around: Any, make_trainer: Any) -> None:
    """The plan says K = 1, the server offers three: the nearest one is used, the others are not even fetched."""
    fetched: list[Any] = []

    async def get_experts(_round: int, ids: Any) -> dict[str, bytes]:
        fetched.append(list(ids))
        return {i: expert(GOOD) for i in ids}

    async with federation() as it:
        offer = always(rnd.MatchReply(answer=answer("e", "f", "g")))
        api = around(it.api("a"), match=offer, get_experts=get_experts)
        await asyncio.gather(it.run("a", api=api), it.run("b"))
        assert fetched == [["e"]] * 3
        assert it.model("a").experts.shape == (1, 2, 3)
