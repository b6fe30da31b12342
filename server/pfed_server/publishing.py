"""What comes into the pool: a member's expert of the open round, or the expert that it has there, sealed again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from pfed_server.federation import Federation
from pfed_server.publication import read_publication
from pfed_server.rounds import part_of
from pfed_server.store import Member, StoredPublication
from pfed_server.together import Together
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.interface import ServerExperts
from pfedsecure.matching.interface import ServerMatching
from pfedsecure.wire.v1 import round_pb2 as rnd

OVERHEAD_BYTES = 4096
SEALED_AGAIN_A_ROUND = 4
"""So often a member's expert may be replaced by one of a newer epoch, of which there is one for each `pfed pki rotate`.

Each replacement wakes all members, and lets its author set up matching for the epoch that it claims.
"""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Publication:
    name: str
    round: int
    content: StoredPublication


class Publishing:
    """The calls of `federation`'s members that publish experts; callers have proved to be members."""

    def __init__(self, federation: Federation, experts: ServerExperts, matching: ServerMatching) -> None:
        self._federation = federation
        self._experts = experts
        self._matching = matching
        self.max_bytes = experts.max_bytes + matching.max_sketch_bytes + OVERHEAD_BYTES
        self._sealed_again: tuple[int, Counter[str]] = 0, Counter()
        self._publications = Together(federation, self._publish)

    def expect(self, member: Member, round_number: int) -> None:
        """Raise MessageRejected unless `member` may publish an expert of a round."""
        if not self._federation.plan.n_experts:
            raise MessageRejected("in this plan clients lend each other no experts")
        if not self._may_replace(member.name, round_number):
            part_of(self._federation.state, member.name, round_number)

    async def publish(self, member: Member, round_number: int, publication: bytes) -> rnd.Receipt:
        content = await asyncio.to_thread(
            read_publication, publication, self._experts, self._matching, member.expert_id, round_number
        )
        self._federation.count(member.name, received=len(publication))
        return await self._publications(_Publication(member.name, round_number, content))

    def _may_replace(self, name: str, round_number: int) -> bool:
        """Whether a member's publication for a round would take the place of its expert in the pool."""
        state = self._federation.state
        if state.open_round is not None and state.open_round.number == round_number:
            return False
        pooled = state.pooled.get(name)
        return pooled is not None and pooled.round <= round_number <= state.last_round

    async def _publish(self, publications: Mapping[str, _Publication]) -> dict[str, rnd.Receipt | Exception]:
        federation = self._federation
        answers: dict[str, rnd.Receipt | Exception] = {}
        staged: dict[str, StoredPublication] = {}
        for name, each in publications.items():
            try:
                if self._may_replace(name, each.round):
                    await self._replace(name, each.round, each.content)
                elif self._is_new(name, each.round, each.content):
                    staged[name] = each.content
            except Exception as error:  # one member's mistake is not another's
                answers[name] = error
            else:
                answers[name] = rnd.Receipt(sha256=each.content.digest)
        if staged and federation.state.open_round is not None:
            traffic = {name: federation.take_traffic(name) for name in staged}
            number, before = federation.state.open_round.number, federation.state.open_round.parts
            await federation.change_with(
                traffic, partial(federation.store.record_publications, number, staged, traffic)
            )
            for name in staged:
                if before[name].publication_digest is not None:
                    self._sealed_one_again(name)
        return answers

    async def _replace(self, name: str, round_number: int, content: StoredPublication) -> None:
        pooled = self._federation.state.pooled[name]
        if content.epoch > pooled.epoch:
            self._check_seals_again(name)
            replace = self._federation.store.replace_expert
            await self._federation.change(partial(replace, round_number, name, content))
            self._sealed_one_again(name)
            _logger.info("%s sealed its expert again, epoch %d", name, content.epoch, extra={"peer": name})
        elif content.digest != pooled.digest:
            raise MessageRejected(f"round {round_number} is closed; ask where the federation stands")

    def _is_new(self, name: str, round_number: int, content: StoredPublication) -> bool:
        """Whether an expert of the open round is to be stored; False when it is already.

        Raises MessageRejected when it may not be.
        """
        part, pooled = part_of(self._federation.state, name, round_number), self._federation.state.pooled.get(name)
        if pooled is not None and content.epoch < pooled.epoch:
            raise MessageRejected(
                f"the expert is of epoch {content.epoch}, {name} has lent one of epoch {pooled.epoch} before: install "
                "the newest kit of the authority"
            )
        if part.publication_digest is None:
            return True
        if content.epoch > part.publication_epoch:
            self._check_seals_again(name)
            return True
        if part.publication_digest != content.digest:
            raise MessageRejected(f"{name} has already published another expert in round {round_number}")
        return False

    def _check_seals_again(self, name: str) -> None:
        """Raise MessageRejected for a member that claims one new epoch after another; this server cannot verify any."""
        number = self._federation.state.last_round
        if self._sealed_again[0] != number:
            self._sealed_again = number, Counter()
        if self._sealed_again[1][name] >= SEALED_AGAIN_A_ROUND:
            raise MessageRejected(
                f"{name} has sealed its expert {SEALED_AGAIN_A_ROUND} times again since round {number} was opened; try "
                "again in the next round"
            )

    def _sealed_one_again(self, name: str) -> None:
        """Count it, once it is stored."""
        self._sealed_again[1][name] += 1
