"""What clients lend each other: the pool of experts, who gets which, and what comes into it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

import numpy as np

from pfed_server.federation import Federation
from pfed_server.publication import read_publication
from pfed_server.rounds import part_of
from pfed_server.store import Member, StoredPublication
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.factory import server_experts
from pfedsecure.matching.factory import server_matching
from pfedsecure.matching.interface import MatchIndex
from pfedsecure.wire.v1 import round_pb2 as rnd

OVERHEAD_BYTES = 4096

_logger = logging.getLogger(__name__)


class Lending:
    """The calls of `federation`'s members about experts; callers have proved to be members."""

    def __init__(self, federation: Federation, context_shape: tuple[int, int]) -> None:
        self._federation = federation
        self._n_experts = federation.plan.n_experts
        self._experts = server_experts(federation.plan, context_shape)
        self._matching = server_matching(federation.plan, context_shape)
        sketch_bytes = context_shape[0] * context_shape[1] * np.dtype(np.float32).itemsize
        self.max_publication_bytes = self._experts.max_bytes + sketch_bytes + OVERHEAD_BYTES
        self._index: tuple[int, MatchIndex] | None = None

    async def match(self, member: Member, request: rnd.MatchRequest) -> rnd.MatchReply:
        if not 1 <= request.experts <= self._n_experts:
            raise MessageRejected(f"{request.experts} experts asked for, the plan allows 1 to {self._n_experts}")
        index = await self._federation.exclusively(partial(self._match_index, member.name, request.round))
        answer = await asyncio.to_thread(index.answer, request.query, request.experts, member.name, request.round)
        self._federation.count(member.name, received=len(request.query), sent=len(answer))
        return rnd.MatchReply(answer=answer)

    async def fetch(self, member: Member, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        if len(expert_ids) > self._n_experts or len(set(expert_ids)) < len(expert_ids):
            raise MessageRejected(f"experts are fetched once each, at most {self._n_experts} of them")
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
        await self._federation.exclusively(partial(asyncio.to_thread, note))
        _logger.warning("%s cannot use the expert of %s, fetched in round %d", member.name, author, request.round)
        return rnd.ReportExpertReply()

    def expect(self, member: Member, round_number: int) -> None:
        """Raise MessageRejected unless `member` may publish an expert of a round."""
        if not self._n_experts:
            raise MessageRejected("in this plan clients lend each other no experts")
        if not self._may_replace(member.name, round_number):
            part_of(self._federation.state, member.name, round_number)

    async def publish(self, member: Member, round_number: int, publication: bytes) -> rnd.Receipt:
        content = await asyncio.to_thread(
            read_publication, publication, self._experts, self._matching, member.expert_id, round_number
        )
        self._federation.count(member.name, received=len(publication))
        return await self._federation.exclusively(partial(self._publish, member.name, round_number, content))

    async def _match_index(self, name: str, round_number: int) -> MatchIndex:
        part_of(self._federation.state, name, round_number)
        if self._index is None or self._index[0] != round_number:
            pool = await asyncio.to_thread(self._federation.store.pool)
            self._index = round_number, await asyncio.to_thread(self._matching.index, pool)
        return self._index[1]

    async def _fetch(self, name: str, round_number: int, expert_ids: Sequence[str]) -> dict[str, bytes]:
        part_of(self._federation.state, name, round_number)
        experts = await asyncio.to_thread(self._federation.store.experts, expert_ids)
        for expert_id in expert_ids:
            if expert_id not in experts:
                raise MessageRejected(f"expert {expert_id[:40]!r} is not in the pool of round {round_number}")
        return {expert_id: experts[expert_id] for expert_id in expert_ids}

    def _may_replace(self, name: str, round_number: int) -> bool:
        """Whether a member's publication for a round would take the place of its expert in the pool."""
        state = self._federation.state
        if state.open_round is not None and state.open_round.number == round_number:
            return False
        pooled = state.pooled.get(name)
        return pooled is not None and pooled.round <= round_number <= state.last_round

    async def _publish(self, name: str, round_number: int, content: StoredPublication) -> rnd.Receipt:
        if self._may_replace(name, round_number):
            await self._replace(name, round_number, content)
        else:
            await self._stage(name, round_number, content)
        return rnd.Receipt(sha256=content.digest)

    async def _replace(self, name: str, round_number: int, content: StoredPublication) -> None:
        pooled = self._federation.state.pooled[name]
        if content.epoch > pooled.epoch:
            replace = self._federation.store.replace_expert
            await self._federation.change(partial(replace, round_number, name, content))
            _logger.info("%s sealed its expert again, epoch %d", name, content.epoch)
        elif content.digest != pooled.digest:
            raise MessageRejected(f"round {round_number} is closed; ask where the federation stands")

    async def _stage(self, name: str, round_number: int, content: StoredPublication) -> None:
        part = part_of(self._federation.state, name, round_number)
        if part.publication_digest is None or content.epoch > part.publication_epoch:
            traffic = self._federation.take_traffic(name)
            record = self._federation.store.record_publication
            await self._federation.change(partial(record, round_number, name, content, traffic))
        elif part.publication_digest != content.digest:
            raise MessageRejected(f"{name} has already published another expert in round {round_number}")
