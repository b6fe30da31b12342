"""Shares, scores and correlations of the expert benchmark, on known data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from pfed_benchmarks.expert_clients import (
    DIGITS,
    Data,
    accuracies,
    digits,
    likeness,
    plan_of_set,
    shares_of,
    spearman,
)
from pfed_benchmarks.photo_clients import Share
from pfedsecure.clip.features import FeatureSet
from pfedsecure.data.digits import CONDITIONS


def test_digits_are_shared_out_by_writing() -> None:
    images = digits()
    assert images.domains is not None
    assert set(images.domains) == set(CONDITIONS)
    few, many = (shares_of(images, 1, 0.3, shots) for shots in (4, None))

    assert len(few) == len(many) == 20
    for less, more in zip(few, many, strict=True):
        assert {images.domains[index] for index in np.concatenate([more.train, more.test])} == {more.domain}
        assert less.test.tolist() == more.test.tolist()
        assert set(less.train) <= set(more.train)
        every, kept = (np.bincount(images.labels[share.train], minlength=10) for share in (more, less))
        assert kept.tolist() == np.minimum(every, 4).tolist()


@pytest.mark.parametrize("name", [DIGITS, "pacs"])
def test_plans_differ_in_their_seeds(name: str) -> None:
    plans = [plan_of_set(name, ("a", "b"), seed, 3, "model") for seed in (1, 2)]
    assert plans[0].digest() != plans[1].digest()
    assert plans[0].rounds.count == 3


def known() -> tuple[Data, list[Share]]:
    """One domain x of two clients and three classes, and one client elsewhere; features are labels."""
    labels = np.array([0, 0, 1, 1, 2, 0, 1, 1])
    features = FeatureSet(torch.eye(3)[labels], torch.from_numpy(labels))
    images = SimpleNamespace(labels=labels, class_names=("a", "b", "c"))
    shares = [
        Share("one", "x", train=np.array([0]), test=np.array([1, 2, 3])),
        Share("two", "x", train=np.array([2, 5]), test=np.array([4])),
        Share("far", "y", train=np.array([5, 6]), test=np.array([7])),
    ]
    return Data(cast(Any, images), features, cast(Any, None)), shares


class Always:
    """Calls everything by the one class that its model names."""

    def predict(self, model: int, features: torch.Tensor) -> torch.Tensor:
        return torch.eye(3)[model].expand(len(features), -1)


def test_the_three_scores() -> None:
    data, shares = known()
    trainers = {share.name: cast(Any, Always()) for share in shares}
    found = accuracies(data, shares, trainers, cast(Any, {"one": 1, "two": 0, "far": 1}))

    # one: tested on labels 0, 1, 1 of its own and 2 of the other; says 1, and has trained on 0 only
    assert found.own == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found.balanced == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert found.unseen == pytest.approx((1 / 2 + 0) / 2)  # `far` misses no class that its domain has


def test_likeness_of_prompts_that_follow_the_labels() -> None:
    data, shares = known()
    # label histograms: one (1, 0, 0), two and far (1/2, 1/2, 0); so two and far are nearest, in different domains
    contexts = {name: np.full((1, 2), at, np.float32) for name, at in {"one": 0.0, "two": 3.0, "far": 3.1}.items()}
    found = likeness(data, shares, contexts)
    assert found.labels == pytest.approx(spearman([3.0, 3.1, 0.1], [0.5, 0.5, 0.0]))
    assert found.labels > 0.8
    assert found.domains == pytest.approx(0.0)


def test_spearman_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    for levels in (3, 1000):
        x, y = (rng.integers(0, levels, 40).astype(float).tolist() for _ in range(2))
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0.0
