"""What clients lend each other: the pool of experts, and who gets which. `publishing` has what comes into it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from pfed_server import events
from pfed_server.federation import Federation
from pfed_server.publishing import Publishing
from pfed_server.rounds import part_of
from pfed_server.store import Member, State
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.factory import server_experts
from pfedsecure.matching.factory import server_matching
from pfedsecure.matching.interface import MatchIndex
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.payload_pb2 import PlainMatchAnswer

T = TypeVar("T")

EPOCHS_KEPT = 4
"""For so many epochs of the cohort's secret matching stays set up."""
SECONDS_TO_SET_UP = 30
"""Then another member is asked."""
ANSWERS_A_ROUND = 8
"""To one query of a member: one is needed, some more after crashes; each takes the server a while."""
MATCHES_AT_ONCE = 16
"""They wait for the processes that compute; in threads of their own, so that nothing else waits for them."""

_logger = logging.getLogger(__name__)


class Lending:
    """The calls of `federation`'s members about experts; callers have proved to be members."""

    def __init__(
        self,
        federation: Federation,
        context_shape: tuple[int, int],
        executor: Executor | None,
        scratch: Path | None,
    ) -> None:
        self._federation = federation
        self._n_experts = federation.plan.n_experts
        self._matching = server_matching(federation.plan, context_shape, executor, scratch)
        self.publishing = Publishing(federation, server_experts(federation.plan, context_shape), self._matching)
        self.max_setup_bytes = self._matching.max_setup_bytes
        self._threads = ThreadPoolExecutor(MATCHES_AT_ONCE, thread_name_prefix="matching")
        self._setting_up, self._indexing = asyncio.Lock(), asyncio.Lock()
        self._index: tuple[int, MatchIndex] | None = None
        # By epoch that is installed: whose set-ups had been distrusted by then, which says which one of them it is.
        self._installed: dict[int, frozenset[str]] = {}
        self._set_up = asyncio.Event()
        self._asked_to_set_up: dict[int, tuple[str, float]] = {}
        federation.when_changed(self._changed)

    async def start(self) -> None:
        """Set up matching with what the store has."""
        async with self._setting_up:
            await self._follow()

    async def stop(self) -> None:
        """End what runs for matching."""
        await asyncio.to_thread(self._matching.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def set_up(self, member: Member, epoch: int, setup: bytes) -> rnd.Receipt:
        """Take what matching needs in an epoch, where it is not there yet. Raises MessageRejected."""
        async with self._setting_up:
            if epoch not in self._federation.state.matching_epochs:
                # Whoever was asked before this server was restarted still is, unless somebody else is by now.
                in_use = {pooled.epoch for pooled in self._federation.state.pooled.values()}
                if epoch not in in_use or not self._is_asked_to_set_up(member.name, epoch):
                    raise MessageRejected(f"{member.name} was not asked to set up matching for epoch {epoch}")
                await self._in_thread(partial(self._matching.install, epoch, setup))
                if await self._federation.exclusively(partial(self._save_setup, member.name, epoch, setup)):
                    self._index = None  # for the experts of this epoch, which it leaves out
                    _logger.info("%s set up matching for epoch %d", member.name, epoch, extra={"peer": member.name})
                    await self._federation.tell(events.matching_set_up(member.name, epoch))
                self._wake_those_who_wait()
        return rnd.Receipt(sha256=hashlib.sha256(setup).digest())

    async def match(self, member: Member, request: rnd.MatchRequest) -> bytes:
        if not 1 <= request.experts <= self._n_experts:
            raise MessageRejected(f"{request.experts} experts asked for, the plan allows 1 to {self._n_experts}")
        part_of(self._federation.state, member.name, request.round)
        if request.everything:
            return self._all_but(member)
        if self._matching.one_query:
            await self._federation.exclusively(partial(self._note_query, member.name, request))
        index = await self._match_index(member.name, request.round)
        while epoch := index.lacks_setup(request.query):
            if self._is_asked_to_set_up(member.name, epoch):
                return index.asking_for_setup(epoch)
            await self._federation.clock.wait(self._set_up, SECONDS_TO_SET_UP)
            index = await self._match_index(member.name, request.round)
            if index.lacks_setup(request.query) and (epoch, member.name) in self._federation.state.distrusted_setups:
                break  # it may be that nobody else is there to set it up: a round without experts, then
        answer = await self._in_thread(
            partial(index.answer, request.query, request.experts, member.name, request.round)
        )
        self._federation.count(member.name, received=len(request.query), sent=len(answer))
        return answer

    async def fetch(self, member: Member, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        if len(expert_ids) > len(self._federation.state.pooled) or len(set(expert_ids)) < len(expert_ids):
            raise MessageRejected("experts are fetched once each, and no more than there are")
        experts = await self._federation.exclusively(partial(self._fetch, member.name, round_number, expert_ids))
        self._federation.count(member.name, sent=sum(map(len, experts.values())))
        return experts

    async def report(self, member: Member, request: rnd.ReportExpertRequest) -> rnd.ReportExpertReply:
        """Note that `member` could not use an expert; in the log and the status it stands by its author's name."""
        members = self._federation.state.members.values()
        author = next((other.name for other in members if other.expert_id == request.expert_id), member.name)
        if author == member.name:
            raise MessageRejected(f"expert {request.expert_id[:40]!r} is not another member's")
        note = partial(self._federation.store.record_report, member.name, request.expert_id)
        if await self._federation.exclusively(partial(asyncio.to_thread, note)):
            where = {"peer": member.name, "round": request.round}
            said = "%s cannot use the expert of %s, fetched in round %d"
            _logger.warning(said, member.name, author, request.round, extra=where)
            await self._federation.tell(events.expert_reported(member.name, author, request.round))
        return rnd.ReportExpertReply()

    async def report_matching(self, member: Member, request: rnd.ReportMatchingRequest) -> rnd.ReportMatchingReply:
        """Note that the answer to `member` was wrong about itself. Raises MessageRejected."""
        part_of(self._federation.state, member.name, request.round)
        if self._index is None or self._index[0] != request.round:
            raise MessageRejected(f"{member.name} has had no answer in round {request.round}")
        self._index[1].complain(member.name)
        where = {"peer": member.name, "round": request.round}
        _logger.warning("%s got a wrong distance to itself in round %d", member.name, request.round, extra=where)
        await self._federation.tell(events.matching_reported(member.name, request.round))
        return rnd.ReportMatchingReply()

    def _is_asked_to_set_up(self, name: str, epoch: int) -> bool:
        """Whether this member is to set up matching for an epoch; others wait, and are asked when it does not."""
        if (epoch, name) in self._federation.state.distrusted_setups:
            return False
        now = self._federation.clock.monotonic()
        asked, until = self._asked_to_set_up.get(epoch, ("", now))
        if now < until:
            return asked == name
        if asked == name and now < until + SECONDS_TO_SET_UP:
            return False  # it had its time; one of the others who wait looks again before this is over
        self._asked_to_set_up[epoch] = name, now + SECONDS_TO_SET_UP
        return True

    def _all_but(self, member: Member) -> bytes:
        """The experts of all others, in an order that tells nothing."""
        state = self._federation.state
        answer = PlainMatchAnswer()
        for expert_id in sorted(state.members[name].expert_id for name in state.pooled if name != member.name):
            answer.candidates.add(expert_id=expert_id)
        return answer.SerializeToString(deterministic=True)

    async def _note_query(self, name: str, request: rnd.MatchRequest) -> None:
        """Raise MessageRejected for a second query in a round, where every answer tells of others' sketches."""
        part_of(self._federation.state, name, request.round)
        digest = hashlib.sha256(request.query).digest()
        asked = await asyncio.to_thread(self._federation.store.record_query, request.round, name, digest)
        if asked.digest != digest:
            raise MessageRejected(f"{name} has already sent another query in round {request.round}")
        if asked.answers > ANSWERS_A_ROUND:
            raise MessageRejected(f"{name} has had {ANSWERS_A_ROUND} answers to its query in round {request.round}")

    async def _match_index(self, name: str, round_number: int) -> MatchIndex:
        """That of the open round. Made while others' calls go on: it can take long."""
        async with self._indexing:
            part_of(self._federation.state, name, round_number)
            if self._stored() != self._installed:
                async with self._setting_up:
                    await self._follow()
            if self._index is None or self._index[0] != round_number:
                pool = await self._federation.exclusively(partial(asyncio.to_thread, self._federation.store.pool))
                self._index = round_number, await self._in_thread(partial(self._matching.index, pool))
                for epoch in self._index[1].distrusted:
                    await self._federation.exclusively(partial(self._distrust_setup, epoch))
            return self._index[1]

    def _stored(self) -> dict[int, frozenset[str]]:
        """As `_installed`, of what the store has."""
        state = self._federation.state
        distrusted = state.distrusted_setups
        return {
            epoch: frozenset(name for number, name in distrusted if number == epoch) for epoch in state.matching_epochs
        }

    async def _follow(self) -> None:
        """Work with what the store has, where another server has put or dropped a set-up. Inside `_setting_up`."""
        stored = self._stored()
        if stored == self._installed:
            return
        for epoch in [epoch for epoch, which in self._installed.items() if stored.get(epoch) != which]:
            del self._installed[epoch]
            await self._in_thread(partial(self._matching.forget, epoch))
        setups = await self._federation.exclusively(partial(asyncio.to_thread, self._federation.store.setups))
        for epoch in (setups.keys() & stored.keys()) - self._installed.keys():
            await self._in_thread(partial(self._matching.install, epoch, setups[epoch]))
            self._installed[epoch] = stored[epoch]
        self._index = None

    def _changed(self, before: State, after: State) -> None:
        # Set up by another server. Who waits for what is set up here is woken once the index is made anew with it.
        if after.matching_epochs - before.matching_epochs - self._installed.keys():
            self._wake_those_who_wait()

    def _wake_those_who_wait(self) -> None:
        self._set_up.set()
        self._set_up = asyncio.Event()

    async def _distrust_setup(self, epoch: int) -> None:
        self._asked_to_set_up.pop(epoch, None)
        installed = self._installed.pop(epoch, None)
        await self._in_thread(partial(self._matching.forget, epoch))
        if installed != self._stored().get(epoch):
            return  # another server has seen to it
        await self._federation.change(partial(self._federation.store.distrust_setup, epoch))
        names = sorted(name for number, name in self._federation.state.distrusted_setups if number == epoch)
        _logger.warning(
            "matching of epoch %d came out wrong for everybody with the keys of %s",
            epoch,
            names[-1],
            extra={"peer": names[-1]},
        )
        await self._federation.tell(events.matching_distrusted(names[-1], epoch))

    async def _save_setup(self, name: str, epoch: int, setup: bytes) -> bool:
        """Keep what was just installed; False when another server was faster: `_follow` installs what that one has."""
        state = self._federation.state
        if epoch in state.matching_epochs:
            await self._in_thread(partial(self._matching.forget, epoch))
            return False
        in_use = Counter(pooled.epoch for pooled in state.pooled.values())
        drop = None
        if len(state.matching_epochs) >= EPOCHS_KEPT:
            drop = min(state.matching_epochs, key=lambda known: (in_use[known], known))
            self._installed.pop(drop, None)
            await self._in_thread(partial(self._matching.forget, drop))
        self._installed[epoch] = frozenset(name for number, name in state.distrusted_setups if number == epoch)
        try:
            await self._federation.change(partial(self._federation.store.save_setup, epoch, name, setup, drop))
        except BaseException:
            del self._installed[epoch]
            raise
        return True

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _fetch(self, name: str, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        part_of(self._federation.state, name, round_number)
        experts = await asyncio.to_thread(self._federation.store.experts, expert_ids)
        return {expert_id: experts[expert_id] for expert_id in expert_ids if expert_id in experts}
