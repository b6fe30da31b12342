"""What every way of aggregating has in common.

The client turns `(ctx, n_i)` into an opaque contribution; the server checks each contribution as it arrives, stores it,
and combines those that arrived when the round closes. The server side keeps nothing in memory between calls: whatever
must survive a restart is in the contributions that the store holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Aggregate:
    """The outcome of a round: the weighted mean `ctx (n, d)` and the sum of the weights."""

    context: NDArray[np.float32]
    total_weight: int


class ClientAggregation(Protocol):
    """The client's side of one way of aggregating."""

    def contribution(self, context: NDArray[np.float32], weight: int) -> bytes:
        """What leaves the client for `context (n, d)` trained on `weight` images (at least 1)."""


class ServerAggregation(Protocol):
    """The server's side of one way of aggregating."""

    def check(self, contribution: bytes) -> None:
        """Raise MessageRejected when a contribution cannot be used."""

    def combine(self, contributions: Mapping[str, bytes]) -> Aggregate:
        """The weighted mean of contributions that passed `check`, by client name; at least one.

        The result does not depend on the order of arrival.
        """
