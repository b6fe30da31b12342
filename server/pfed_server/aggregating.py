"""The cohort's messages of the open round's aggregation: what members send, and what they need for it."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime
from functools import partial

from pfed_server.federation import Federation
from pfed_server.rounds import open_round_of
from pfed_server.store import Member, OpenRound
from pfedsecure.aggregation.interface import ServerAggregationRound
from pfedsecure.errors import MessageRejected
from pfedsecure.wire.v1 import round_pb2 as rnd


class Aggregating:
    """The calls of `federation`'s members about its aggregation; callers have proved to be members."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._round: tuple[tuple[int, int], ServerAggregationRound] | None = None

    @property
    def max_message_bytes(self) -> int:
        """No message of the open round is longer."""
        open_round = self._federation.state.open_round
        clients = 0 if open_round is None else len(open_round.parts)
        return self._federation.aggregation.max_message_bytes(clients)

    async def request(self, member: Member, round_number: int, step: int) -> bytes:
        """What a member needs for the open step. Raises MessageRejected."""
        request = await self._federation.exclusively(partial(self._request, member.name, round_number, step))
        self._federation.count(member.name, sent=len(request))
        return request

    async def submit(self, member: Member, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        """Store a member's message of the open step. The same again gets the same receipt, also when the step is over.

        Raises MessageRejected.
        """
        return await self._federation.exclusively(partial(self._submit, member.name, round_number, step, message))

    async def _request(self, name: str, round_number: int, step: int) -> bytes:
        open_round = open_round_of(self._federation.state, name, round_number)
        _require_open(open_round, step)
        if step == 1:
            raise MessageRejected("nothing is asked for in step 1 of an aggregation: its messages come by themselves")
        return await asyncio.to_thread(lambda: self._aggregation_round(open_round).request(step, name))

    async def _submit(self, name: str, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        open_round = open_round_of(self._federation.state, name, round_number)
        part = open_round.parts[name]
        digest = hashlib.sha256(message).digest()
        self._federation.count(name, received=len(message))
        if 0 < part.step == step:
            if part.message_digest != digest:
                raise MessageRejected(f"{name} has already sent another message of step {step} of round {round_number}")
            return rnd.Receipt(sha256=digest)
        _require_open(open_round, step)
        if part.step != step - 1:
            raise MessageRejected(
                f"{name} has no part in step {step} of round {round_number}: it missed an earlier one"
            )
        await asyncio.to_thread(self._check, open_round, name, message)
        traffic = self._federation.take_traffic(name)
        counts = step == self._federation.aggregation.input_step
        record = self._federation.store.record_message
        await self._federation.change(partial(record, round_number, step, name, message, traffic, counts=counts))
        return rnd.Receipt(sha256=digest)

    def _check(self, open_round: OpenRound, name: str, message: bytes) -> None:
        self._aggregation_round(open_round).check(open_round.step, name, message, datetime.now(UTC))

    def _aggregation_round(self, open_round: OpenRound) -> ServerAggregationRound:
        """The aggregation of the open round for what concerns one member. Reads the store, in a thread."""
        if open_round.step == 1:  # a first message is checked against all others
            return self._federation.aggregation_round(open_round)
        # Further steps depend on closed ones alone. What it takes to read those for one member serves all others.
        key = open_round.number, open_round.step
        if self._round is None or self._round[0] != key:
            self._round = key, self._federation.aggregation_round(open_round)
        return self._round[1]


def _require_open(open_round: OpenRound, step: int) -> None:
    if step != open_round.step:
        raise MessageRejected(f"step {step} of round {open_round.number} is not open, step {open_round.step} is")
