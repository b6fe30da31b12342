"""This client's part in the aggregation of a round, one message a step, across crashes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from pfed_client.receipts import check_receipt
from pfed_client.state import ClientState
from pfedsecure.aggregation.interface import ClientAggregation, ClientAggregationRound, Contribution, RoundIdentity
from pfedsecure.errors import MessageRejected, StateError
from pfedsecure.wire.api import FederationApi


class LeftRound(Exception):
    """This client goes no further in a round, for the reason told; the federation goes on without it."""


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of payload of one step."""

    sent: int
    received: int


class Contributor:
    """Sends the messages of `aggregation`. What must outlive a crash is in `state` before anything is sent."""

    def __init__(self, api: FederationApi, aggregation: ClientAggregation, state: ClientState) -> None:
        self._api = api
        self._aggregation = aggregation
        self._state = state
        self._round: tuple[RoundIdentity, ClientAggregationRound] | None = None

    @property
    def input_step(self) -> int:
        """The step whose message holds this client's contribution."""
        return self._aggregation.input_step

    async def send(self, identity: RoundIdentity, step: int, contribution: Contribution) -> StepTraffic:
        """Send the message of the open step of a round.

        Raises LeftRound when this client has no part in it or refuses what the server asks, MessageRejected when the
        server refuses the message.
        """
        taking_part = await asyncio.to_thread(self._taking_part, identity, step, contribution)
        request = b""
        if taking_part.step == step - 1:
            request = await self._api.get_step_request(identity.number, step)
            try:
                await asyncio.to_thread(taking_part.answer, request, datetime.now(UTC))
            except MessageRejected as refused:
                raise LeftRound(str(refused)) from None
        if taking_part.step != step:
            raise LeftRound(f"the server is at step {step} of the aggregation, this client at {taking_part.step}")
        message = taking_part.message
        check_receipt(await self._api.submit_step(identity.number, step, message), message)
        return StepTraffic(len(message), len(request))

    def end(self, round_number: int) -> None:
        """Forget the secrets of this round and earlier ones, which are over: this client enters none of them again."""
        if self._round is not None and self._round[0].number <= round_number:
            self._round = None
        self._state.aggregation.end(round_number)

    def _taking_part(self, identity: RoundIdentity, step: int, contribution: Contribution) -> ClientAggregationRound:
        if self._round is None or self._round[0] != identity:
            self._round = identity, self._enter(identity, step, contribution)
        return self._round[1]

    def _enter(self, identity: RoundIdentity, step: int, contribution: Contribution) -> ClientAggregationRound:
        file = self._state.aggregation
        save = partial(file.save, identity.number)
        try:
            saved = file.load(identity.number)
            if saved is not None:
                return self._aggregation.restore(saved, identity, contribution, save, datetime.now(UTC))
        except (StateError, MessageRejected) as unusable:
            # What was signed for this round may be with the server, and nothing else may ever be signed for it.
            file.give_up(identity.number)
            raise LeftRound(str(unusable)) from None
        if step > 1:
            raise LeftRound("this client has no part in the aggregation that is under way")
        return self._aggregation.begin(identity, contribution, save)
