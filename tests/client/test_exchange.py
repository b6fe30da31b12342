"""A server that answers wrongly: one clear error, and nothing trained or sent because of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfed_client.exchange import Exchange
from pfed_server.publication import read_publication
from pfedsecure.aggregation.plain import PlainAggregation
from pfedsecure.errors import MessageRejected
from pfedsecure.matching.plain import PlainServerMatching
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.payload_pb2 import PlainExpert, PlainMatchAnswer

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
        assert part.update_digest is None
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


def test_a_prompt_over_the_norm_is_scaled_before_it_is_sent(make_plan: Any) -> None:
    exchange = Exchange(None, make_plan(prompt__max_norm=5.0), np.zeros((2, 3), np.float32))  # type: ignore[arg-type]
    upload = exchange.upload(np.full((2, 3), 1000, np.float32), 7)
    PlainAggregation((2, 3), 5.0).check(upload.contribution)
    assert upload.publication is not None
    read_publication(upload.publication, PlainServerMatching((2, 3), 5.0), (2, 3), 5.0)
    with pytest.raises(MessageRejected, match="the expert has norm 5, over"):
        read_publication(upload.publication, PlainServerMatching((2, 3), 5.0), (2, 3), 4.99)


@pytest.mark.parametrize("method", ["submit_update", "publish_expert"])
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
