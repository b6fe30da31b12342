"""What every way of aggregating has in common.

An aggregation has steps, numbered from 1. In each of them every client that is still in it sends one message; the
server checks and stores what arrives, closes the step, and then has for each client a request: what that client needs
for its next message. Plain averaging has one step. Neither side keeps anything in memory that matters: the server's
side is a function of the messages that its store holds, the client's hands what must outlive a crash to `save` before
it gives out the message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pfedsecure.secagg import RoundLost

__all__ = [
    "Aggregate",
    "ClientAggregation",
    "ClientAggregationRound",
    "Contribution",
    "RoundIdentity",
    "RoundLost",
    "Save",
    "ServerAggregation",
    "ServerAggregationRound",
    "Stored",
]

Save = Callable[[bytes], None]
"""Makes a client's part in a round durable. The bytes may be secret."""

Stored = Mapping[int, Mapping[str, bytes]]
"""The messages of a round by step and client's name: of all closed steps, and what has arrived of the open one."""


@dataclass(frozen=True)
class RoundIdentity:
    """Which round of which federation. `start_digest`: SHA-256, in hex, of the global prompt as it travels."""

    federation_id: str
    number: int
    start_digest: str


@dataclass(frozen=True)
class Contribution:
    """What a client puts in: `context (n, d)` trained on `weight` images (at least 1), and metrics or None."""

    context: NDArray[np.float32]
    weight: int
    metrics: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Aggregate:
    """The outcome of a round: the weighted mean `context (n, d)` and the sum of the weights.

    `metrics`: weighted means over those who sent any, or None. `culprits`: clients that broke the rules without harm.
    """

    context: NDArray[np.float32]
    total_weight: int
    metrics: Mapping[str, float] | None = None
    culprits: tuple[str, ...] = ()


class ClientAggregationRound(Protocol):
    """One client in one round."""

    @property
    def step(self) -> int:
        """The last step that has a message."""

    @property
    def message(self) -> bytes:
        """The message of that step. It can be sent any number of times."""

    def answer(self, request: bytes, now: datetime) -> bytes:
        """The message of the step after `step`, for what the server sent.

        Raises MessageRejected for a request that a client does not answer; nothing was revealed then.
        """


class ClientAggregation(Protocol):
    """The client's side of one way of aggregating."""

    @property
    def input_step(self) -> int:
        """The step whose message holds the client's contribution."""

    def begin(self, identity: RoundIdentity, contribution: Contribution, save: Save) -> ClientAggregationRound:
        """Enter a round; the message of step 1 is ready."""

    def restore(
        self, saved: bytes, identity: RoundIdentity, contribution: Contribution, save: Save, now: datetime
    ) -> ClientAggregationRound:
        """Go on where `saved` was handed to `save`. Raises StateError, MessageRejected."""


class ServerAggregationRound(Protocol):
    """The server's side of one round, of which some steps are closed. To be made anew when another step is."""

    def check(self, step: int, name: str, message: bytes, now: datetime) -> None:
        """Raise MessageRejected for a message of the open step that must not be stored.

        After step 1 it depends on the messages of closed steps alone.
        """

    def ready(self, step: int) -> bool:
        """Whether what is stored of `step` is enough to close it."""

    def request(self, step: int, name: str) -> bytes:
        """What `name` needs for `step`, whose predecessor is closed. Raises MessageRejected."""

    def result(self) -> Aggregate:
        """The outcome, once all steps are closed or ready to be. Raises RoundLost.

        It does not depend on the order of arrival.
        """


class ServerAggregation(Protocol):
    """The server's side of one way of aggregating."""

    @property
    def steps(self) -> int:
        """How many there are."""

    @property
    def input_step(self) -> int:
        """The step whose message holds a client's contribution."""

    def max_message_bytes(self, clients: int) -> int:
        """No message of a cohort of `clients` is longer."""

    def wiring(self, clients: int) -> Mapping[str, int]:
        """How a cohort of `clients` is wired, for people: empty where nothing is shared."""

    def round(self, identity: RoundIdentity, stored: Stored) -> ServerAggregationRound:
        """The round whose messages are `stored`."""
