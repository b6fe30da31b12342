"""Splits of one client's images: training against test, and a few shots of each class."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pfedsecure.data.seeding import generator
from pfedsecure.errors import DataError

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


def train_test_split(labels: Labels, test_fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Indices for training and for testing: disjoint, complete, ascending, stratified by class.

    Of a class with `n >= 2` images, `test_fraction * n` rounded, at least one and at most n - 1, are for testing. The
    image of a class with only one is for training. Raises DataError for a fraction outside (0, 1), and where no class
    has two images, so that there would be nothing to test on.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"the test fraction is {test_fraction}; it must lie between 0 and 1")
    rng = generator(seed, "train_test_split")
    is_test = np.zeros(len(labels), dtype=bool)
    for members in _shuffled_classes(labels, rng):
        if len(members) >= 2:
            count = min(max(math.floor(test_fraction * len(members) + 0.5), 1), len(members) - 1)
            is_test[members[:count]] = True
    if not is_test.any():
        raise DataError(f"no class has two images among {len(labels)}, so none can be kept for testing; add images")
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def few_shot(labels: Labels, shots: int, seed: int) -> Indices:
    """Indices of `shots` images of each class, ascending; all images of a class that has no more.

    Raises DataError for fewer than one shot.
    """
    if shots < 1:
        raise DataError(f"{shots} shots per class were asked for; at least 1 is needed")
    rng = generator(seed, "few_shot")
    chosen = [members[:shots] for members in _shuffled_classes(labels, rng)]
    return np.sort(np.concatenate([*chosen, np.empty(0, dtype=np.int64)]))


def _shuffled_classes(labels: Labels, rng: np.random.Generator) -> list[Indices]:
    """For each class that has images, in label order, their indices in random order."""
    return [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
