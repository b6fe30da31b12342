"""A client's trainer whose long work is done elsewhere: in a batch with others, or on another machine."""

from __future__ import annotations

from pfed_client.local_model import Array, LocalModel
from pfed_client.trainer import Trainer


class TrainerElsewhere:
    """What takes no time is `trainer`'s; a subclass says where the rest of `training.RoundTrainer` is done."""

    def __init__(self, name: str, trainer: Trainer) -> None:
        self._name = name
        self._trainer = trainer

    @property
    def n_train(self) -> int:
        return self._trainer.n_train

    def initial_context(self) -> Array:
        return self._trainer.initial_context()

    def new_model(self) -> LocalModel:
        return self._trainer.new_model()
