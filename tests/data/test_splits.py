from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pfedsecure.data import few_shot, train_test_split
from pfedsecure.errors import DataError

LABELS = hnp.arrays(np.int64, st.integers(1, 80), elements=st.integers(0, 9))
SEEDS = st.integers(0, 2**70)


@given(LABELS, st.floats(0.01, 0.99), SEEDS)
def test_training_and_test_images_are_a_stratified_partition(labels: np.ndarray, fraction: float, seed: int) -> None:
    sizes = np.bincount(labels)
    assume(sizes.max() >= 2)
    train, test = train_test_split(labels, fraction, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    for label, size in enumerate(sizes):
        in_test = int((labels[test] == label).sum())
        if size >= 2:
            assert 1 <= in_test <= size - 1
            assert abs(in_test - fraction * size) <= 0.5 or in_test in (1, size - 1)
        else:
            assert in_test == 0
    again = train_test_split(labels, fraction, seed)
    assert [part.tolist() for part in again] == [train.tolist(), test.tolist()]


@given(LABELS, st.integers(1, 20), SEEDS)
def test_few_shot_takes_that_many_of_each_class(labels: np.ndarray, shots: int, seed: int) -> None:
    chosen = few_shot(labels, shots, seed)
    assert (np.diff(chosen) > 0).all()
    for label, size in enumerate(np.bincount(labels)):
        assert (labels[chosen] == label).sum() == min(size, shots)
    assert few_shot(labels, shots, seed).tolist() == chosen.tolist()


def test_the_seed_matters_and_zero_is_one_of_them() -> None:
    labels = np.repeat(np.arange(4), 10)
    for draw in (lambda seed: train_test_split(labels, 0.5, seed)[1], lambda seed: few_shot(labels, 3, seed)):
        results = [draw(seed).tolist() for seed in (0, 0, 1, 2)]
        assert results[0] == results[1]
        assert len({str(result) for result in results}) == 3


def test_every_image_of_a_class_is_as_likely_to_be_drawn() -> None:
    labels = np.zeros(10, dtype=np.int64)
    draws = 2000
    for chosen in (
        [few_shot(labels, 3, seed) for seed in range(draws)],
        [train_test_split(labels, 0.3, seed)[1] for seed in range(draws)],
    ):
        frequency = np.bincount(np.concatenate(chosen), minlength=10) / draws
        np.testing.assert_allclose(frequency, 0.3, atol=4.5 * np.sqrt(0.3 * 0.7 / draws))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_fractions_outside_zero_to_one_are_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=r"^the test fraction is .*; it must lie between 0 and 1$"):
        train_test_split(np.array([0, 0, 1, 1]), fraction, 0)


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2]])
def test_nothing_to_test_on_is_refused(labels: list[int]) -> None:
    with pytest.raises(DataError, match=r"^no class has two images among .*; add images$"):
        train_test_split(np.array(labels, dtype=np.int64), 0.5, 0)


def test_less_than_one_shot_is_refused() -> None:
    with pytest.raises(DataError, match=r"^0 shots per class were asked for; at least 1 is needed$"):
        few_shot(np.array([0, 1]), 0, 0)
