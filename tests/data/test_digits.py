"""The embedded demo data: real conditions, disjoint shares, nothing left out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pfedsecure.data.digits import (
    CLASS_NAMES,
    CONDITIONS,
    FAVOURITES,
    IMAGE_SIZE,
    MAX_CLIENTS,
    demo_share,
    digit_images,
    digit_labels,
)
from pfedsecure.errors import DataError

SCANS, TARGETS = load_digits(return_X_y=True)
SOME = range(0, len(TARGETS), 30)


def grey(images: list[Image.Image]) -> NDArray[np.float64]:
    return np.stack([np.asarray(image.convert("L"), dtype=np.float64) for image in images])


@pytest.fixture(scope="module")
def clean() -> NDArray[np.float64]:
    return grey(digit_images(None, SOME))


def test_images_are_the_scans() -> None:
    images = digit_images(None, range(len(TARGETS)))
    assert {(image.mode, image.size) for image in images} == {("RGB", (IMAGE_SIZE, IMAGE_SIZE))}
    small = np.stack([np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) for image in images])
    ours, theirs = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(1, keepdims=True) for x in (small, SCANS))
    correlation = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert correlation.min() > 0.95
    assert np.array_equal(digit_labels(), TARGETS)


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_an_image_depends_on_its_index_alone(condition: str | None) -> None:
    together = grey(digit_images(condition, [5, 9, 5]))
    assert np.array_equal(together[0], together[2])
    assert not np.array_equal(together[0], together[1])
    assert np.array_equal(together[1:2], grey(digit_images(condition, [9])))


def test_inverted_swaps_ink_and_paper(clean: NDArray[np.float64]) -> None:
    assert np.array_equal(grey(digit_images("inverted", SOME)), 255 - clean)


def test_rotated_is_undone_by_turning_back(clean: NDArray[np.float64]) -> None:
    rotated = digit_images("rotated", SOME)
    back = grey([image.rotate(-35) for image in rotated])
    inner = (slice(None), slice(6, -6), slice(6, -6))  # corners leave the picture when it turns
    error_turned_back = np.abs(back - clean)[inner].mean((1, 2))
    error_as_it_is = np.abs(grey(rotated) - clean)[inner].mean((1, 2))
    assert (error_turned_back < error_as_it_is).mean() > 0.9


def test_thick_adds_ink_and_takes_none(clean: NDArray[np.float64]) -> None:
    thick = grey(digit_images("thick", SOME))
    assert (thick >= clean).all()
    assert (thick.mean((1, 2)) > 1.2 * clean.mean((1, 2))).all()


def test_blurred_softens_every_edge(clean: NDArray[np.float64]) -> None:
    blurred = grey(digit_images("blurred", SOME))
    assert (np.abs(np.diff(blurred)).max((1, 2)) < 0.7 * np.abs(np.diff(clean)).max((1, 2))).all()


def test_noise_differs_from_image_to_image(clean: NDArray[np.float64]) -> None:
    noise = grey(digit_images("noisy", SOME)) - clean
    middle = np.where((clean > 80) & (clean < 175), noise, np.nan)  # where neither end of the grey scale cuts it off
    assert 30 < np.nanstd(middle) < 80
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("n_clients", [1, 3, 5, 12, MAX_CLIENTS])
def test_shares_are_disjoint_and_cover_every_scan(n_clients: int) -> None:
    shares = [demo_share(client, n_clients, seed=4) for client in range(n_clients)]
    assert sorted(np.concatenate([share.indices for share in shares]).tolist()) == list(range(len(TARGETS)))
    for client, share in enumerate(shares):
        assert share.condition == CONDITIONS[client % len(CONDITIONS)]
        assert share.labels.dtype == np.int64
        assert np.array_equal(share.labels, TARGETS[share.indices])
        assert np.array_equal(grey(share.images), grey(digit_images(share.condition, share.indices.tolist())))
        assert len(np.unique(share.labels)) >= 2


def test_clients_mainly_hold_digits_of_their_own() -> None:
    favourites = []
    for client in range(5):
        share = demo_share(client, 5, seed=0)
        counts = np.bincount(share.labels, minlength=len(CLASS_NAMES))
        order = np.argsort(counts)
        favourites += order[-FAVOURITES:].tolist()
        assert counts[order[-FAVOURITES:]].sum() > 0.5 * counts.sum()
        assert counts.min() >= 3
    assert sorted(favourites) == list(range(len(CLASS_NAMES)))


def test_shares_follow_the_seed() -> None:
    first, again, other = (demo_share(2, 5, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.indices, again.indices)
    assert np.array_equal(grey(first.images), grey(again.images))
    assert not np.array_equal(first.indices, other.indices)


def test_labels_are_handed_out_as_a_copy() -> None:
    digit_labels()[:] = 0
    assert np.array_equal(digit_labels(), TARGETS)


@pytest.mark.parametrize(
    ("client", "n_clients", "seed", "message"),
    [
        (5, 5, 0, "there is no demo client 5 of 5; count from 0 to 4"),
        (-1, 5, 0, "there is no demo client -1 of 5"),
        (0, 0, 0, f"cannot be shared by 0 clients; choose 1 to {MAX_CLIENTS}"),
        (0, MAX_CLIENTS + 1, 0, f"cannot be shared by {MAX_CLIENTS + 1} clients"),
        (0, 5, -1, "the seed is -1"),
    ],
)
def test_shares_that_do_not_exist(client: int, n_clients: int, seed: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        demo_share(client, n_clients, seed)


def test_images_that_do_not_exist() -> None:
    with pytest.raises(DataError, match="unknown writing condition 'upside down'; use one of inverted, rotated"):
        digit_images("upside down", [0])
    for index in (-1, len(TARGETS)):
        with pytest.raises(DataError, match=f"there is no digit scan {index}; give an index from 0 to 1796"):
            digit_images(None, [index])
