from __future__ import annotations

import numpy as np
import pytest
import torch

from pfed_benchmarks.photo_clients import PHOTO_SETS, Share, by_disjoint_classes, by_domain_and_class, clients_of
from pfedsecure.clip.features import FeatureSet
from pfedsecure.data import ImageSet
from pfedsecure.data.images import ImagePixels
from pfedsecure.errors import DataError

PIXELS = ImagePixels(np.zeros((1, 1, 3), np.uint8))


def image_set(n_classes: int, per_class: int, domains: tuple[str, ...] | None) -> ImageSet:
    """`per_class` images of each class in each domain."""
    n_images = n_classes * per_class * len(domains or ("",))
    return ImageSet(
        class_names=tuple(f"class {number}" for number in range(n_classes)),
        labels=np.arange(n_images) % n_classes,
        keys=tuple(f"{number:05d}" for number in range(n_images)),
        images=(PIXELS,) * n_images,
        domains=None if domains is None else tuple(np.repeat(domains, n_classes * per_class).tolist()),
    )


def indices(shares: list[Share]) -> list[int]:
    return sorted(np.concatenate([np.concatenate([share.train, share.test]) for share in shares]).tolist())


def test_domains_have_five_clients_each_and_half_is_for_training() -> None:
    images = image_set(4, 40, ("art", "photo"))
    shares = by_domain_and_class(images, seed=1)

    assert [share.name for share in shares] == [f"{domain}-{n}" for domain in ("art", "photo") for n in range(1, 6)]
    assert indices(shares) == list(range(len(images)))
    assert images.domains is not None
    for share in shares:
        both = np.concatenate([share.train, share.test])
        assert {images.domains[index] for index in both} == {share.domain}
        assert len(both) >= 16
        assert abs(len(share.train) - len(share.test)) <= 4  # a class may have an odd number of images


def test_labels_are_skewed_inside_a_domain() -> None:
    images = image_set(4, 200, ("art",))
    counts = np.array(
        [np.bincount(images.labels[np.r_[s.train, s.test]], minlength=4) for s in by_domain_and_class(images, seed=1)]
    )

    assert counts.max(axis=1).sum() > 0.5 * counts.sum()


def test_disjoint_classes_have_sixteen_shots_each_and_the_rest_for_testing() -> None:
    images = image_set(20, 19, None)
    shares = by_disjoint_classes(images, seed=1)

    assert len(shares) == 10
    assert indices(shares) == list(range(len(images)))
    classes = [set(images.labels[share.train].tolist()) for share in shares]
    assert sorted(label for held in classes for label in held) == list(range(20))
    for share, held in zip(shares, classes, strict=True):
        assert np.bincount(images.labels[share.train], minlength=20)[sorted(held)].tolist() == [16, 16]
        assert np.bincount(images.labels[share.test], minlength=20)[sorted(held)].tolist() == [3, 3]


@pytest.mark.parametrize(("name", "domains"), [("pacs", ("a", "b")), ("caltech101", None)])
def test_the_seed_decides(name: str, domains: tuple[str, ...] | None) -> None:
    images = image_set(20, 20, domains)

    def held(seed: int) -> list[list[int]]:
        return [share.train.tolist() for share in PHOTO_SETS[name](images, seed)]

    assert held(1) == held(1)
    assert held(1) != held(2)


def test_a_set_without_domains_is_refused() -> None:
    with pytest.raises(DataError, match="DOMAIN/CLASS/IMAGE"):
        by_domain_and_class(image_set(4, 40, None), seed=1)


def test_clients_get_the_features_of_their_own_images() -> None:
    features = FeatureSet(torch.arange(12.0).reshape(6, 2), torch.arange(6))
    (client,) = clients_of([Share("a", None, train=np.array([4, 1]), test=np.array([0]))], features)

    assert client.name == "a"
    assert client.train.features.tolist() == [[8.0, 9.0], [2.0, 3.0]]
    assert client.train.labels.tolist() == [4, 1]
    assert client.test.labels.tolist() == [0]
