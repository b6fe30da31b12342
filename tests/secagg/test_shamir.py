from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from pfedsecure.secagg import shamir
from pfedsecure.secagg.entropy import uniform_below, uniform_subset

SECRETS = [bytes(range(32)), b"\xff" * 32, bytes(32)]
POINTS = np.array([1, 2, 5, 9, 65520])


def test_every_threshold_of_shares_gives_every_secret() -> None:
    shares = shamir.share(SECRETS, POINTS, 3, os.urandom)
    assert shares.shape == (5, 3, 18)
    for chosen in itertools.combinations(range(5), 3):
        rows = np.array(chosen)
        found = shamir.reconstruct(np.tile(POINTS[rows], (3, 1)), shares[rows].transpose(1, 0, 2))
        assert found == SECRETS


def test_sharings_with_different_points_are_reconstructed_together() -> None:
    points = np.array([[1, 2, 3], [7, 8, 900]])
    shares = [shamir.share([secret], row, 3, os.urandom)[:, 0] for secret, row in zip(SECRETS, points, strict=False)]
    assert shamir.reconstruct(points, np.stack(shares)) == SECRETS[:2]


def test_one_share_less_than_the_threshold_tells_nothing() -> None:
    """With t = 2 a share is uniform whatever the secret: chi-squared over 16 bins, 15 degrees of freedom."""
    for secret in (bytes(32), b"\xff" * 32):
        limbs = np.concatenate([shamir.share([secret], np.array([1, 2]), 2, os.urandom)[1, 0] for _ in range(900)])
        counts = np.bincount(limbs.astype(np.int64) * 16 // shamir.PRIME, minlength=16)
        statistic = ((counts - len(limbs) / 16) ** 2 / (len(limbs) / 16)).sum()
        assert statistic < 70  # exceeded with probability 5e-9
    # and t - 1 shares with any other t-th one give another secret, not an error that would tell them apart
    shares = shamir.share([SECRETS[0]], POINTS, 3, os.urandom)[:3, 0]
    shares[2] ^= 1
    assert shamir.reconstruct(POINTS[None, :3], shares[None]) != [SECRETS[0]]


def test_shares_of_no_secret_are_recognised() -> None:
    shares = np.full((1, 2, 18), 40_000, np.uint16)  # a constant polynomial whose limbs have more than 15 bits
    assert shamir.reconstruct(np.array([[1, 2]]), shares) == [None]
    shares = np.zeros((1, 2, 18), np.uint16)
    shares[:, :, 17] = 2  # the last limb has one bit only
    assert shamir.reconstruct(np.array([[1, 2]]), shares) == [None]


def test_shares_survive_their_bytes() -> None:
    shares = shamir.share(SECRETS, POINTS, 4, os.urandom)
    data = shamir.to_bytes(shares[0])
    assert len(data) == 3 * shamir.SHARE_BYTES
    assert (shamir.from_bytes(data) == shares[0]).all()


@pytest.mark.parametrize(
    ("secrets", "points", "threshold"),
    [
        (SECRETS, POINTS, 1),
        (SECRETS, POINTS, 6),
        (SECRETS, np.array([1, 1, 2]), 2),
        (SECRETS, np.array([0, 1, 2]), 2),
        (SECRETS, np.array([1, 2, shamir.PRIME]), 2),
        ([b"short"], POINTS, 2),
    ],
)
def test_refused(secrets: list[bytes], points: np.ndarray, threshold: int) -> None:
    with pytest.raises(ValueError, match=r"points|secrets have"):
        shamir.share(secrets, points, threshold, os.urandom)


def test_field_elements_are_drawn_by_rejection() -> None:
    draws = iter([[shamir.PRIME, 7, 0, 65535], [shamir.PRIME - 1, 65530], [9]])

    def entropy(count: int) -> bytes:
        drawn = next(draws)
        assert count == 2 * len(drawn)
        return np.array(drawn, "<u2").tobytes()

    assert uniform_below(shamir.PRIME, 4, entropy).tolist() == [7, 0, shamir.PRIME - 1, 9]
    assert (uniform_below(shamir.PRIME, 10_000, os.urandom) < shamir.PRIME).all()


def test_subsets_are_uniform() -> None:
    counts = np.zeros(6)
    for _ in range(3000):
        chosen = uniform_subset(2, 6, os.urandom)
        assert len(set(chosen.tolist())) == 2
        counts[chosen] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 40  # 5 degrees of freedom, scaled by 1 - 2/6: below 1e-8
