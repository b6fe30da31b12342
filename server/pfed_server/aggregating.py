"""The cohort's messages of the open round's aggregation: what members send, and what they need for it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial

from pfed_server.federation import Federation
from pfed_server.messages import NONE
from pfed_server.rounds import open_round_of
from pfed_server.store import Member, OpenRound
from pfed_server.together import Together, outcome
from pfedsecure.aggregation.interface import ServerAggregationRound
from pfedsecure.errors import MessageRejected
from pfedsecure.wire.v1 import round_pb2 as rnd


@dataclass(frozen=True)
class _Request:
    name: str
    round: int
    step: int


@dataclass(frozen=True)
class _Upload:
    name: str
    round: int
    step: int
    message: bytes

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.message).digest()


class Aggregating:
    """The calls of `federation`'s members about its aggregation; callers have proved to be members."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._round: tuple[tuple[int, int], ServerAggregationRound] | None = None
        self._requests = Together(federation, self._answer_requests)
        self._uploads = Together(federation, self._store_uploads)

    @property
    def max_message_bytes(self) -> int:
        """No message of the open round is longer."""
        open_round = self._federation.state.open_round
        clients = 0 if open_round is None else len(open_round.parts)
        return self._federation.aggregation.max_message_bytes(clients)

    async def request(self, member: Member, round_number: int, step: int) -> bytes:
        """What a member needs for the open step. Raises MessageRejected."""
        request = await self._requests(_Request(member.name, round_number, step))
        self._federation.count(member.name, sent=len(request))
        return request

    async def submit(self, member: Member, round_number: int, step: int, message: bytes) -> rnd.Receipt:
        """Store a member's message of the open step. The same again gets the same receipt, also when the step is over.

        Raises MessageRejected.
        """
        self._federation.count(member.name, received=len(message))
        return await self._uploads(_Upload(member.name, round_number, step, message))

    async def _answer_requests(self, requests: Mapping[str, _Request]) -> dict[str, bytes | Exception]:
        return await asyncio.to_thread(
            lambda: {name: outcome(partial(self._answer, request)) for name, request in requests.items()}
        )

    def _answer(self, request: _Request) -> bytes:
        open_round = open_round_of(self._federation.state, request.name, request.round)
        _require_open(open_round, request.step)
        if request.step == 1:
            raise MessageRejected("nothing is asked for in step 1 of an aggregation: its messages come by themselves")
        return self._aggregation_round(open_round).request(request.step, request.name)

    async def _store_uploads(self, uploads: Mapping[str, _Upload]) -> dict[str, rnd.Receipt | Exception]:
        federation = self._federation
        new = {name: outcome(partial(self._is_new, upload)) for name, upload in uploads.items()}
        answers: dict[str, rnd.Receipt | Exception] = {
            name: is_new if isinstance(is_new, Exception) else rnd.Receipt(sha256=uploads[name].digest)
            for name, is_new in new.items()
        }
        open_round = federation.state.open_round
        to_check = [uploads[name] for name, is_new in new.items() if is_new is True]
        if open_round is None or not to_check:
            return answers
        refused = await asyncio.to_thread(self._check, open_round, to_check)
        answers.update(refused)
        accepted = {upload.name: upload.message for upload in to_check if upload.name not in refused}
        if accepted:
            traffic = {name: federation.take_traffic(name) for name in accepted}
            number, step = open_round.number, open_round.step
            counts = step == federation.aggregation.input_step
            record = partial(federation.store.record_messages, number, step, accepted, traffic, counts=counts)
            await federation.change_with(traffic, record)
        return answers

    def _is_new(self, upload: _Upload) -> bool:
        """Whether a message is to be stored; False when it is already. Raises MessageRejected when it may not be."""
        name, number, step = upload.name, upload.round, upload.step
        open_round = open_round_of(self._federation.state, name, number)
        part = open_round.parts[name]
        if 0 < part.step == step:
            if part.message_digest != upload.digest:
                raise MessageRejected(f"{name} has already sent another message of step {step} of round {number}")
            return False
        _require_open(open_round, step)
        if part.step != step - 1:
            raise MessageRejected(f"{name} has no part in step {step} of round {number}: it missed an earlier one")
        return True

    def _check(self, open_round: OpenRound, uploads: Sequence[_Upload]) -> dict[str, Exception]:
        """Why those messages that must not be stored must not be. Each is checked against those before it, too."""
        accepted: dict[str, bytes] = {}
        aggregation = self._aggregation_round(open_round, accepted)
        refused = {}
        for upload in uploads:
            check = partial(aggregation.check, upload.step, upload.name, upload.message, datetime.now(UTC))
            if isinstance(reason := outcome(check), Exception):
                refused[upload.name] = reason
            else:
                accepted[upload.name] = upload.message
        return refused

    def _aggregation_round(self, open_round: OpenRound, arriving: Mapping[str, bytes] = NONE) -> ServerAggregationRound:
        """The aggregation of the open round for what concerns single members. Reads the store, in a thread.

        `arriving`: as `RoundReader.round` has it.
        """
        if open_round.step == 1:  # a first message is checked against all others
            return self._federation.aggregation_round(open_round, arriving)
        # Further steps depend on closed ones alone. What it takes to read those for one member serves all others.
        key = open_round.number, open_round.step
        if self._round is None or self._round[0] != key:
            self._round = key, self._federation.aggregation_round(open_round)
        return self._round[1]


def _require_open(open_round: OpenRound, step: int) -> None:
    if step != open_round.step:
        raise MessageRejected(f"step {step} of round {open_round.number} is not open, step {open_round.step} is")
