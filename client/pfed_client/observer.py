"""What a session tells whoever watches it."""

from __future__ import annotations

from typing import Protocol

from pfed_client.metrics import RoundRecord
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed


class Observer(Protocol):
    """Told of every step of a session, in order. `step` comes from the training thread."""

    def joined(self, plan: Plan) -> None:
        """The server took this client in."""

    def waiting(self, view: fed.FederationView) -> None:
        """There is nothing to do until the federation moves on."""

    def step(self, round_number: int, done: int, total: int, loss: float) -> None:
        """`done` of a round's `total` optimiser steps are made."""

    def round_done(self, record: RoundRecord) -> None:
        """The work of a round reached the server."""

    def left_out(self, round_number: int) -> None:
        """The round was closed before this client's work arrived; the federation goes on without it."""

    def withdrew(self, round_number: int, reason: str) -> None:
        """This client goes no further in the round, for `reason`; the federation goes on without it."""

    def finished(self, accuracy: float) -> None:
        """The federation is over; `accuracy` of the final model on the own test images, in [0, 1]."""


class SilentObserver:
    """Nobody watches."""

    def joined(self, plan: Plan) -> None:
        return

    def waiting(self, view: fed.FederationView) -> None:
        return

    def step(self, round_number: int, done: int, total: int, loss: float) -> None:
        return

    def round_done(self, record: RoundRecord) -> None:
        return

    def left_out(self, round_number: int) -> None:
        return

    def withdrew(self, round_number: int, reason: str) -> None:
        return

    def finished(self, accuracy: float) -> None:
        return
