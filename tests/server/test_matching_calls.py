"""Matching as the coordinator's calls: who sets it up, that it keeps nobody waiting, and one query a round."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfed_client.kept_file import KeptFiles
from pfed_server import lending
from pfed_server.coordinator import Coordinator
from pfed_server.lending import ANSWERS_A_ROUND
from pfed_server.sql_store import SqlStore
from pfed_server.store import Closing
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.factory import client_experts
from pfedsecure.matching.factory import client_matching
from pfedsecure.matching.he.parameters import Layout
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.payload_pb2 import PlainMatchAnswer, Publication

SHAPE = (2, 3)
NAMES = ("anna", "bert", "cleo")


class Unseen:
    def newest(self, pseudonym: str) -> int:
        return 0

    def note(self, pseudonym: str, round_number: int) -> None:
        pass


class Slow(ThreadPoolExecutor):
    """Runs nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__(max_workers=2)
        self.free = threading.Event()
        self.free.set()
        self.waiting = threading.Event()

    def submit(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            self.waiting.set()
            assert self.free.wait(30)
            return work(*args, **kwargs)

        return super().submit(run)


class Scene:
    """Three members in round 2, whose experts of round 1 are in the pool."""

    def __init__(self, folder: Path, members: Any, plan: Plan, executor: Slow) -> None:
        self.executor, self.members, self.plan = executor, members, plan
        self.store = SqlStore.open(folder / "server", plan)
        authority = members.server.authority
        self.coordinator = Coordinator(plan, self.store, context_shape=SHAPE, authority=authority, executor=executor)
        initial = np.zeros(SHAPE, np.float32)
        self.matching = {
            name: client_matching(plan, initial, members.identity(name), KeptFiles(folder / name), lambda _event: None)
            for name in NAMES
        }

    def context(self, name: str) -> np.ndarray:
        return np.full(SHAPE, 0.1 * (1 + NAMES.index(name)), np.float32)

    def query(self, name: str, number: int = 2) -> rnd.MatchRequest:
        query = self.matching[name].query(self.context(name), 1, number)
        return rnd.MatchRequest(round=number, query=query, experts=2)

    async def match(self, name: str, request: rnd.MatchRequest | None = None) -> bytes:
        return await self.coordinator.match(self.members.peer(name), request or self.query(name))

    async def set_up(self, name: str, setup: bytes | None = None, epoch: int = 1) -> None:
        content = self.matching[name].setup() if setup is None else setup
        await self.coordinator.set_up_matching(self.members.peer(name), epoch, content)

    async def reach_round_2(self) -> None:
        await self.coordinator.start()
        federation_id = self.store.load().federation_id
        for name in NAMES:
            identity = self.members.identity(name)
            experts = client_experts(self.plan, SHAPE, federation_id, identity, Unseen())
            claim = experts.claim(identity.subject.fingerprint)
            await self.coordinator.join(
                self.members.peer(name),
                fed.JoinRequest(
                    plan_digest=self.plan.digest(),
                    instance_id=name,
                    author_certificate=claim.certificate,
                    author_signature=claim.signature,
                ),
            )
        while self.coordinator._federation.state.open_round is None:
            await asyncio.sleep(0.01)
        for name in NAMES:
            identity = self.members.identity(name)
            experts = client_experts(self.plan, SHAPE, federation_id, identity, Unseen())
            context = self.context(name)
            publication = Publication(expert=experts.pack(context, 1), sketch=self.matching[name].sketch(context, 1))
            await self.coordinator.publish_expert(self.members.peer(name), 1, publication.SerializeToString())
        # As if the round had closed: nothing here is about aggregation.
        await self.next_round()

    async def next_round(self) -> None:
        await self.coordinator._federation.exclusively(self._close)

    async def _close(self) -> None:
        federation = self.coordinator._federation
        number = federation.state.last_round
        await federation.change(lambda: self.store.close_round(number, 0.0, Closing(b"\0"), {}))
        await federation._advance()


@pytest.fixture
def scene(tmp_path: Path, members: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def made() -> AsyncIterator[Scene]:
        plan = Plan.model_validate(
            {
                "class_names": ["cat", "dog"],
                "backbone": {"text_width": SHAPE[1]},
                "prompt": {"context_length": SHAPE[0]},
                "mixture": {"experts": 2},
                "protection": {"aggregation": "plain"},
                "rounds": {"heartbeat_seconds": 60},
            }
        )
        executor = Slow()
        it = Scene(tmp_path, members, plan, executor)
        await it.reach_round_2()
        try:
            yield it
        finally:
            executor.free.set()
            await it.coordinator.stop()
            it.store.close()
            executor.shutdown()

    return made


async def test_the_first_who_asks_sets_it_up_and_the_others_wait_for_it(scene: Any) -> None:
    async with scene() as it:
        first = await it.match("anna")
        assert it.matching["anna"].asks_for_setup(first)
        other = asyncio.create_task(it.match("bert"))
        await asyncio.sleep(0.05)
        assert not other.done()
        await it.set_up("anna")
        answers = {"bert": await other, "anna": await it.match("anna")}
        ids = {name: member.expert_id for name, member in it.store.load().members.items()}
        for name, nearest in (("anna", ["bert", "cleo"]), ("bert", ["anna", "cleo"])):
            ranked = it.matching[name].rank(answers[name], 2)
            assert {candidate.expert_id for candidate in ranked} == {ids[other] for other in nearest}
        assert it.store.load().matching_epochs == {1}


async def test_it_stays_set_up_after_a_restart(scene: Any) -> None:
    async with scene() as it:
        assert it.matching["anna"].asks_for_setup(await it.match("anna"))
        await it.set_up("anna")
        await it.coordinator.stop()
        authority = it.members.server.authority
        it.coordinator = Coordinator(it.plan, it.store, context_shape=SHAPE, authority=authority, executor=it.executor)
        await it.coordinator.start()
        assert len(it.matching["cleo"].rank(await it.match("cleo"), 2)) == 2


async def test_who_was_asked_before_a_restart_sets_it_up_after_it(scene: Any) -> None:
    async with scene() as it:
        assert it.matching["bert"].asks_for_setup(await it.match("bert"))
        await it.coordinator.stop()
        authority = it.members.server.authority
        it.coordinator = Coordinator(it.plan, it.store, context_shape=SHAPE, authority=authority, executor=it.executor)
        await it.coordinator.start()
        await it.set_up("bert")
        assert len(it.matching["cleo"].rank(await it.match("cleo"), 2)) == 2


async def test_keys_that_spoil_everything_are_replaced_by_another_members(scene: Any) -> None:
    """Those of another secret: of the right form, and of no use to anybody. Whoever sent them is not asked again."""
    async with scene() as it:
        wrong = SecretKey(CohortSecrets.of({1: b"\x09" * 32}), 1).evaluation_keys(Layout(64))
        assert it.matching["anna"].asks_for_setup(await it.match("anna"))
        await it.set_up("anna", wrong)
        for number in (2, 3):
            for name in NAMES:
                matching = it.matching[name]
                matching.rank(await it.match(name, it.query(name, number)), 2)
                assert matching.spoilt
                told = rnd.ReportMatchingRequest(round=number)
                await it.coordinator.report_matching(it.members.peer(name), told)
            await it.next_round()
        assert it.store.load().matching_epochs == {1}  # known only when somebody asks again
        asking = asyncio.create_task(it.match("anna", it.query("anna", 4)))
        async with asyncio.timeout(30):
            while not it.coordinator.federation.state.distrusted_setups:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not asking.done()
        assert it.store.load().distrusted_setups == {(1, "anna")}
        with pytest.raises(MessageRejected, match="anna was not asked"):
            await it.set_up("anna")
        assert it.matching["bert"].asks_for_setup(await it.match("bert", it.query("bert", 4)))
        await it.set_up("bert")
        assert len(it.matching["anna"].rank(await asking, 2)) == 2
        assert len(it.matching["bert"].rank(await it.match("bert", it.query("bert", 4)), 2)) == 2
        assert it.store.load().matching_epochs == {1}


async def test_only_who_got_an_answer_in_the_open_round_says_that_it_was_spoilt(scene: Any) -> None:
    async with scene() as it:
        for number in (1, 2, 3):
            told = rnd.ReportMatchingRequest(round=number)
            with pytest.raises(MessageRejected):
                await it.coordinator.report_matching(it.members.peer("anna"), told)


async def test_keys_that_are_none_set_nothing_up(scene: Any) -> None:
    async with scene() as it:
        await it.match("anna")
        with pytest.raises(MessageRejected, match="no EvaluationKeys"):
            await it.set_up("anna", b"\xff")
        for name, epoch in (("anna", 7), ("bert", 1)):  # nobody fills the server with keys
            with pytest.raises(MessageRejected, match=f"{name} was not asked to set up matching for epoch {epoch}"):
                await it.set_up(name, epoch=epoch)
        assert it.store.load().matching_epochs == frozenset()
        assert it.coordinator.max_setup_bytes > len(it.matching["anna"].setup())


async def test_a_member_asks_one_thing_a_round(scene: Any) -> None:
    """Each answer tells a number of every expert; enough different questions would tell the sketches."""
    async with scene() as it:
        await it.match("anna")
        await it.set_up("anna")
        request = it.query("anna")
        for _ in range(ANSWERS_A_ROUND - 1):
            assert await it.match("anna", request)
        with pytest.raises(MessageRejected, match="anna has had 8 answers to its query in round 2"):
            await it.match("anna", request)
        other = it.matching["bert"].query(it.context("bert"), 1, 2)
        with pytest.raises(MessageRejected, match="anna has already sent another query in round 2"):
            await it.match("anna", rnd.MatchRequest(round=2, query=other, experts=2))


async def test_naming_another_round_does_not_give_a_second_query(scene: Any) -> None:
    """Rounds are counted by the server, not by what a member says."""
    async with scene() as it:
        await it.match("anna")
        other = it.matching["bert"].query(it.context("bert"), 1, 2)
        for number in (1, 3, 2**63):
            with pytest.raises(MessageRejected):
                await it.match("anna", rnd.MatchRequest(round=number, query=other, experts=2))
        with pytest.raises(MessageRejected, match="anna has already sent another query in round 2"):
            await it.match("anna", rnd.MatchRequest(round=2, query=other, experts=2))


async def test_who_does_not_set_it_up_gives_way_to_the_next(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it asks: neither does that prolong its time, nor is it the next to be asked."""
    monkeypatch.setattr(lending, "SECONDS_TO_SET_UP", 2.0)
    async with scene() as it:
        for _ in range(3):
            assert it.matching["anna"].asks_for_setup(await it.match("anna"))
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.75)  # its time is over now, counted from its first question
        again = asyncio.create_task(it.match("anna"))
        await asyncio.sleep(0.25)
        assert not again.done()
        assert it.matching["bert"].asks_for_setup(await it.match("bert"))
        await it.set_up("bert")
        assert len(it.matching["bert"].rank(await it.match("bert"), 2)) == 2
        assert len(it.matching["anna"].rank(await again, 2)) == 2


async def test_a_slow_match_keeps_nobody_waiting(scene: Any) -> None:
    """Neither the one who computes the pool nor the answers hold up heartbeats, views or uploads of others."""
    async with scene() as it:
        await it.match("anna")
        await it.set_up("anna")
        it.executor.free.clear()
        it.executor.waiting.clear()
        slow = [asyncio.create_task(it.match(name)) for name in NAMES]
        await asyncio.to_thread(it.executor.waiting.wait, 10)
        peer = it.members.peer("bert")
        async with asyncio.timeout(2):
            beat = await it.coordinator.heartbeat(peer, fed.HeartbeatRequest(instance_id="bert"))
            assert beat.round_open
            await it.coordinator.await_view(peer, fed.AwaitRequest(instance_id="bert"))
            assert await it.coordinator.get_global_prompt(peer, 2)
            ids = await it.coordinator.match(peer, rnd.MatchRequest(round=2, experts=2, everything=True))
            others = [candidate.expert_id for candidate in PlainMatchAnswer.FromString(ids).candidates]
            assert len(await it.coordinator.get_experts(peer, 2, others)) == 2
        assert not any(task.done() for task in slow)
        it.executor.free.set()
        for answer in await asyncio.gather(*slow):
            assert answer


async def test_everything_is_all_others_in_an_order_of_its_own(scene: Any) -> None:
    async with scene() as it:
        answer = await it.match("bert", rnd.MatchRequest(round=2, experts=2, everything=True))
        members = it.store.load().members
        ids = [candidate.expert_id for candidate in PlainMatchAnswer.FromString(answer).candidates]
        assert ids == sorted(members[name].expert_id for name in ("anna", "cleo"))
        with pytest.raises(MessageRejected, match="no more than there are"):
            await it.coordinator.get_experts(it.members.peer("bert"), 2, [*ids, "x", "y"])
