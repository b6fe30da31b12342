"""How long calls take as those who make them see it, and when the steps of rounds began."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from pfedsecure.errors import MessageRejected, NameTaken, NotAMember, PlanMismatch, TooManyCalls
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.v1 import federation_pb2 as fed

from ..contract import Row

Calls = Mapping[str, Sequence[tuple[float, float]]]
"""By method: when each call began, by the machine's monotonic clock, and how many seconds it took."""

REFUSALS = (MessageRejected, NameTaken, NotAMember, PlanMismatch, TooManyCalls)
"""What a server answers; a call that ends with anything else was not answered."""
FINISHED = "finished"
STEPS = ("train and advertise", "share", "mask", "confirm", "unmask")
"""Of a round with secure aggregation. In the first, matching, fetching and publishing come before the message."""


@dataclass
class Seen:
    """What the clients of a process saw: their calls, and when the first of them was told of each place of a round.

    `places` are round and step as in `place`, and FINISHED.
    """

    calls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    places: dict[str, float] = field(default_factory=dict)

    def timed(self, api: FederationApi) -> FederationApi:
        """`api`, whose calls are noted, with all their waiting and trying again, unless they are never answered."""
        return cast(FederationApi, _Timed(api, self))

    def note(self, view: fed.FederationView) -> None:
        where = None
        if view.phase == fed.FEDERATION_PHASE_FINISHED:
            where = FINISHED
        elif view.phase == fed.FEDERATION_PHASE_ROUND_OPEN:
            where = place(view.round, view.step)
        if where is not None:
            self.places.setdefault(where, time.monotonic())


class _Timed:
    """Any of the calls of a `FederationApi`."""

    def __init__(self, api: FederationApi, seen: Seen) -> None:
        self._api = api
        self._seen = seen

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        call: Callable[..., Awaitable[Any]] = getattr(self._api, method)

        async def timed(*arguments: object) -> Any:
            began = time.monotonic()
            try:
                answer = await call(*arguments)
            except REFUSALS:
                self._note(method, began)
                raise
            self._note(method, began)
            if isinstance(answer, fed.FederationView):
                self._seen.note(answer)
            return answer

        return timed

    def _note(self, method: str, began: float) -> None:
        self._seen.calls[method].append((began, time.monotonic() - began))


def place(round_number: int, step: int) -> str:
    """How a step of a round is written in `Seen.places`."""
    return f"{round_number}.{step}"


def between(calls: Calls, begin: float, end: float) -> dict[str, list[float]]:
    """By method, the milliseconds of the calls that began and ended between two moments."""
    return {
        method: [1000 * took for began, took in found if begin <= began and began + took <= end]
        for method, found in calls.items()
    }


def call_rows(phase: str, milliseconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """A row for each method, with the middle, the 99th percentile and the most."""
    return [
        {
            "what": "call",
            "phase": phase,
            "method": method,
            "calls": len(taken),
            "p50_ms": percentile(taken, 50),
            "p99_ms": percentile(taken, 99),
            "max_ms": max(taken),
        }
        for method, taken in sorted(milliseconds.items())
        if taken
    ]


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(np.array(values), share))
