"""Where the clients of a simulation train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from pfed_client.trainer import Trainer
from pfed_client.training import RoundTrainer


class Workers(Protocol):
    """Asked from the event loop's thread, but for what trainers do."""

    threads: int
    """In how many threads clients train, or wait for their training."""

    def start(self, names: Sequence[str], version: Callable[[], int]) -> None:
        """The clients `names` are about to take part; `version()` is that of the federation's newest view."""

    def trainer(self, name: str, trainer: Trainer) -> RoundTrainer:
        """What the client `name`, whose own trainer is `trainer`, trains with."""

    def waiting(self, name: str, version: int) -> AbstractContextManager[None]:
        """Entered while the client waits for a view other than that of `version`."""

    def gone(self, name: str) -> None:
        """The client has done its part."""

    def stop(self) -> None:
        """Nobody takes part any more: end all waiting in trainers."""


class SideBySide:
    """Clients train one by one in each of some threads. What a client computes is its own, and so depends on no other.

    `threads`: how many train at a time.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def start(self, names: Sequence[str], version: Callable[[], int]) -> None:
        return

    def trainer(self, name: str, trainer: Trainer) -> RoundTrainer:
        return trainer

    def waiting(self, name: str, version: int) -> AbstractContextManager[None]:
        return nullcontext()

    def gone(self, name: str) -> None:
        return

    def stop(self) -> None:
        return
