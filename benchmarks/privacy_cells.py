"""What the benchmark of privacy against accuracy measures: a base design, and variations of one factor each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

SEEDS = (1, 2, 3)
EPSILONS = (8.0, 4.0, 2.0, 1.0, 0.5)
PAPERS_EPSILON = 25.0
"""At which the paper claims a loss below one point, with a delta of 0.05; measured here with a delta below 1 / n."""
VARIED = (None, 8.0)
"""Epsilons at which matching and shots are varied."""
FEW = (None, 8.0, 1.0)
"""Epsilons of what training alone and a shared prompt are measured at."""
PHOTO_EPSILONS = (None, 8.0, 2.0)
MATCHING = "he"
"""The plan's default. Its experts are those of `plain`, up to the rounding of sketches."""
SHOTS = (16, 4)
"""Training images of a class at most, besides all of them."""
FEATURE_SPACE, PER_SAMPLE = "feature-space", "per-sample"


class Way(StrEnum):
    """What is trained, and what of it is made private. The values are the names in JSON."""

    PFEDMOAP = "pfedmoap"
    LOCAL_GATE = "local_gate"
    """Prompt and gate of one's own, trained alone."""
    LOCAL = "local"
    """A prompt of one's own, trained alone."""
    PROMPTFL = "promptfl"
    UPLOADS = "uploads"
    """The paper's way: training without noise, which is put on the prompts that are sent."""


@dataclass(frozen=True)
class Cell:
    """One federation, or one set of clients that train alone. `epsilon` None: without privacy; `shots` None: all."""

    data_set: str
    way: Way
    mechanism: str | None
    matching: str
    shots: int | None
    epsilon: float | None
    seed: int


def digit_cells(data_set: str, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """All cells of the embedded digits, the base design first."""
    cells = _of(data_set, Way.PFEDMOAP, (None, PAPERS_EPSILON, *EPSILONS), seeds)
    cells += _of(data_set, Way.PFEDMOAP, EPSILONS, seeds, mechanism=PER_SAMPLE)
    cells += _of(data_set, Way.UPLOADS, (PAPERS_EPSILON, *EPSILONS), seeds)
    for way in (Way.LOCAL_GATE, Way.LOCAL, Way.PROMPTFL):
        cells += _of(data_set, way, FEW, seeds)
    for matching in ("dp", "random"):
        cells += _of(data_set, Way.PFEDMOAP, VARIED, seeds, matching=matching)
    for shots in SHOTS:
        cells += _of(data_set, Way.PFEDMOAP, VARIED, seeds, shots=shots)
    return cells


def photo_cells(data_set: str, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """The cells of a photo data set: twenty clients, so that each costs much more."""
    return _of(data_set, Way.PFEDMOAP, PHOTO_EPSILONS, seeds)


def quick_cells(data_set: str) -> list[Cell]:
    """One seed: the bar, and something of every kind of way and variation."""
    seeds, at = (1,), (8.0,)
    cells = _of(data_set, Way.PFEDMOAP, (None, 8.0), seeds)
    cells += _of(data_set, Way.PFEDMOAP, at, seeds, mechanism=PER_SAMPLE)
    cells += _of(data_set, Way.UPLOADS, at, seeds) + _of(data_set, Way.LOCAL, at, seeds)
    return cells + _of(data_set, Way.PFEDMOAP, (None,), seeds, matching="dp", shots=4)


def _of(
    data_set: str,
    way: Way,
    epsilons: Iterable[float | None],
    seeds: Sequence[int],
    *,
    mechanism: str = FEATURE_SPACE,
    matching: str = MATCHING,
    shots: int | None = None,
) -> list[Cell]:
    if way in (Way.LOCAL, Way.LOCAL_GATE, Way.PROMPTFL):
        matching = "none"
    noisy = way != Way.UPLOADS
    return [
        Cell(data_set, way, mechanism if noisy and epsilon is not None else None, matching, shots, epsilon, seed)
        for epsilon in epsilons
        for seed in seeds
    ]
