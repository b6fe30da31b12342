"""What the expert benchmark measures: a main setting for each data set, and variations of one factor each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .expert_clients import DIGITS
from .expert_forms import TRIED
from .light_federation import Matching

OFFICE, PACS = "office_caltech10", "pacs"
MAIN_BETA, MAIN_EXPERTS, FEW_EXPERTS, FEW_SHOTS = 0.3, 9, 2, 4
OTHER_BETAS = (0.1, 1.0)

ALONE, SHAKEN, SOFTENED, PAPER, ENSEMBLE = "gate alone", "shaken", "softened", "paper", "ensemble"
BORROWING = (Matching.NEAREST, Matching.RANDOM, Matching.SAME_FOR_ALL, Matching.FARTHEST)


@dataclass(frozen=True)
class Task:
    """One federation to train. The task of form `ALONE` also measures what needs no training of its own."""

    data_set: str
    beta: float
    shots: int | None
    form: str
    matching: Matching
    experts: int
    seed: int


@dataclass(frozen=True)
class _Setting:
    """The main setting of a data set, or a variation of it."""

    data_set: str
    beta: float = MAIN_BETA
    shots: int | None = None

    def alone(self, seeds: Sequence[int], form: str = ALONE) -> list[Task]:
        return [Task(self.data_set, self.beta, self.shots, form, Matching.NONE, 0, seed) for seed in seeds]

    def borrowing(
        self, seeds: Sequence[int], *matchings: Matching, experts: int = MAIN_EXPERTS, form: str = PAPER
    ) -> list[Task]:
        return [
            Task(self.data_set, self.beta, self.shots, form, matching, experts, seed)
            for seed in seeds
            for matching in matchings
        ]


def tasks_of(available: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """What is measured on the data sets that are `available`, the most important first."""
    digits, office, pacs = (_Setting(name) for name in (DIGITS, OFFICE, PACS))
    few_digits, few_pacs = (_Setting(name, shots=FEW_SHOTS) for name in (DIGITS, PACS))
    tasks = []
    for main in (digits, office):
        tasks += main.alone(seeds) + main.borrowing(seeds, *BORROWING, Matching.ONESELF)
        tasks += main.alone(seeds, form=SHAKEN)
    tasks += pacs.alone(seeds) + pacs.borrowing(seeds, Matching.NEAREST, Matching.RANDOM)
    for few in (few_digits, few_pacs):
        tasks += few.alone(seeds) + few.borrowing(seeds, *BORROWING)
    tasks += few_pacs.borrowing(seeds, Matching.ONESELF)
    for form in TRIED:
        tasks += digits.borrowing(seeds, Matching.NEAREST, form=form)
    tasks += digits.alone(seeds, form="normalised")
    for beta in OTHER_BETAS:
        skewed = _Setting(DIGITS, beta=beta)
        tasks += skewed.alone(seeds) + skewed.borrowing(seeds, Matching.NEAREST, Matching.RANDOM)
    tasks += digits.borrowing(seeds, *BORROWING, experts=FEW_EXPERTS)
    for beta in OTHER_BETAS:
        tasks += _Setting(OFFICE, beta=beta).alone(seeds)
    return [task for task in tasks if task.data_set in available]


def quick_tasks() -> list[Task]:
    """One seed, digits, four images a class."""
    return [task for task in tasks_of((DIGITS,), (1,)) if task.shots == FEW_SHOTS]
