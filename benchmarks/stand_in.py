"""What stands in for training where the server and the protocol are what is looked at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pfed_client.local_model import Array, LocalModel


@dataclass(frozen=True)
class Report:
    """What a round of it came to."""

    train_loss: float
    n_experts: int


class StandIn(ABC):
    """A trainer without images or a gate: what a round makes of a prompt `shape (n, d)` is up to `prompt_after`."""

    score = 0.0
    """Its loss and its accuracy, always."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    @property
    @abstractmethod
    def n_train(self) -> int:
        """How many training images it would have."""

    @abstractmethod
    def prompt_after(self, start: Array, round_number: int) -> Array:
        """The prompt that a round ends with, of the one `start` that it begins with."""

    def initial_context(self) -> Array:
        return np.zeros(self.shape, np.float32)

    def new_model(self) -> LocalModel:
        return LocalModel(self.initial_context(), {}, np.zeros((0, *self.shape), np.float32), trained_round=0)

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> tuple[LocalModel, Report]:
        if on_step is not None:
            on_step(1, 1, self.score)
        context = self.prompt_after(start, round_number)
        return LocalModel(context, model.gate, experts, round_number, self.n_train), Report(self.score, len(experts))

    def lent(self, model: LocalModel) -> Array:
        return model.context

    def evaluate(self, _model: LocalModel) -> float:
        return self.score
