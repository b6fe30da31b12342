"""What stands in for training: a small change of the prompt that anybody can work out again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pfed_client.local_model import Array
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed

from ..stand_in import StandIn

CHANGE = 0.01
"""Standard deviation of what a round changes in each number of the prompt."""


class SeededTrainer(StandIn):
    """The trainer of client `name` of a plan that says how wide its prompt is. It has no gate.

    `seconds`: by round, how long it takes; no time in others.
    """

    def __init__(self, plan: Plan, name: str, seconds: Mapping[int, float] | None = None) -> None:
        assert plan.backbone.text_width is not None
        super().__init__((plan.prompt.context_length, plan.backbone.text_width))
        self._seconds = seconds or {}
        self._plan = plan
        self._name = name

    @property
    def n_train(self) -> int:
        return 16 + derive_seed(self._plan.seed, self._name, "images") % 200

    def prompt_after(self, start: Array, round_number: int) -> Array:
        time.sleep(self._seconds.get(round_number, 0.0))
        return start + self.change(round_number)

    def change(self, round_number: int) -> Array:
        """What it adds to the prompt that a round starts from."""
        generator = np.random.default_rng(derive_seed(self._plan.seed, self._name, "change", round_number))
        return generator.normal(0, CHANGE, self.shape).astype(np.float32)


def expected_prompts(plan: Plan, names: Sequence[str], rounds: int) -> Mapping[int, NDArray[np.float64]]:
    """The global prompt after each of so many rounds in which all these clients took part, without fixed point."""
    trainers = [SeededTrainer(plan, name) for name in names]
    total = sum(trainer.n_train for trainer in trainers)
    prompt = trainers[0].initial_context().astype(np.float64)
    found = {}
    for number in range(1, rounds + 1):
        prompt = prompt + sum(trainer.n_train / total * trainer.change(number) for trainer in trainers)
        found[number] = prompt
    return found
