"""Weighted averaging in the clear, in one step.

Guarantee: none. The server reads every client's prompt and its number of training images. It is the baseline, and what
the protected ways of aggregating are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pfedsecure.aggregation.interface import Aggregate, Contribution, RoundIdentity, Save, Stored
from pfedsecure.errors import MessageRejected
from pfedsecure.wire.tensors import check_norm, from_tensor, to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainContribution

MAX_WEIGHT = 2**32 - 1
OVERHEAD_BYTES = 1024

STEP = 1
"""The only one."""


class PlainClientRound:
    """A client's part: its contribution as it is."""

    step = STEP

    def __init__(self, contribution: Contribution) -> None:
        weighted = (contribution.context.astype(np.float64) * contribution.weight).astype(np.float32)
        message = PlainContribution(weighted_context=to_tensor(weighted), weight=contribution.weight)
        self.message = message.SerializeToString(deterministic=True)

    def answer(self, request: bytes, now: datetime) -> bytes:
        """Always raises MessageRejected: there is no second step."""
        raise MessageRejected("plain averaging has one step; the server asks for more")


class PlainClientAggregation:
    """The client's side. There is nothing to save: the same contribution makes the same message."""

    input_step = STEP

    def begin(self, identity: RoundIdentity, contribution: Contribution, save: Save) -> PlainClientRound:
        """The only message is ready: context times weight, and weight, in the clear. `save` is not called."""
        return PlainClientRound(contribution)

    def restore(
        self, saved: bytes, identity: RoundIdentity, contribution: Contribution, save: Save, now: datetime
    ) -> PlainClientRound:
        """As `begin`: the same contribution makes the same bytes, so `saved` is not needed. Raises nothing."""
        return PlainClientRound(contribution)


class PlainServerAggregation:
    """The server's side for contexts of `shape (n, d)` and Euclidean norm up to `max_norm`."""

    steps = STEP
    input_step = STEP

    def __init__(self, shape: tuple[int, int], max_norm: float, minimum_cohort: int) -> None:
        self._shape = shape
        self._max_norm = max_norm
        self._minimum_cohort = minimum_cohort

    def max_message_bytes(self, clients: int) -> int:
        """Bytes of `n * d` float32 and their framing, for a cohort of any size."""
        return self._shape[0] * self._shape[1] * np.dtype(np.float32).itemsize + OVERHEAD_BYTES

    def wiring(self, clients: int) -> Mapping[str, int]:
        """Empty: nothing is shared among clients."""
        return {}

    def round(self, identity: RoundIdentity, stored: Stored) -> PlainServerRound:
        """The round whose messages are `stored`; `identity` does not matter without keys."""
        return PlainServerRound(self._shape, self._max_norm, self._minimum_cohort, stored)


class PlainServerRound:
    """One round of plain averaging."""

    def __init__(self, shape: tuple[int, int], max_norm: float, minimum_cohort: int, stored: Stored) -> None:
        self._shape = shape
        self._max_norm = max_norm
        self._minimum_cohort = minimum_cohort
        self._stored = stored

    def check(self, step: int, name: str, message: bytes, now: datetime) -> None:
        """Raise MessageRejected for what is no PlainContribution of this shape, has a weight that is not in
        1..MAX_WEIGHT, or a mean over the plan's norm.
        """
        weighted, weight = self._read(message)
        check_norm(weighted / np.float32(weight), self._max_norm, "the update")

    def ready(self, step: int) -> bool:
        """Whether at least the plan's minimum of clients has sent its contribution."""
        return len(self._stored[STEP]) >= self._minimum_cohort

    def request(self, step: int, name: str) -> bytes:
        """Always raises MessageRejected: there is no second step."""
        raise MessageRejected(f"plain averaging has one step, there is no step {step}")

    def result(self) -> Aggregate:
        """The weighted mean of everybody's contexts: float64 sums in the order of names, so that no order of arrival
        shows.
        """
        total = np.zeros(self._shape, dtype=np.float64)
        total_weight = 0
        # Floating-point sums depend on the order of their terms: the order is that of the names.
        for _, message in sorted(self._stored[STEP].items()):
            weighted, weight = self._read(message)
            total += weighted
            total_weight += weight
        return Aggregate(context=(total / total_weight).astype(np.float32), total_weight=total_weight)

    def _read(self, message: bytes) -> tuple[NDArray[np.float32], int]:
        try:
            contribution = PlainContribution.FromString(message)
        except DecodeError:
            raise MessageRejected("the update is not a PlainContribution") from None
        if not 1 <= contribution.weight <= MAX_WEIGHT:
            raise MessageRejected(f"the update's weight {contribution.weight} is not in 1..{MAX_WEIGHT}")
        return from_tensor(contribution.weighted_context, self._shape, "the update"), contribution.weight
