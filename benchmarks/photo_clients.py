"""Photographs shared out among simulated clients, as in the papers that the method is compared in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pfed_cli.simulation import SimulatedClient
from pfedsecure.clip.features import FeatureSet
from pfedsecure.data import ImageSet, disjoint_classes, domain_dirichlet, few_shot, train_test_split
from pfedsecure.errors import DataError

Indices = NDArray[np.int64]

CLIENTS_PER_DOMAIN = 5
DIRICHLET_BETA = 0.3
TEST_FRACTION = 0.5
MINIMUM_IMAGES = 16
"""Images that every client of a multi-domain set gets at the least: more than the classes, so that one has two."""
DISJOINT_CLIENTS = 10
SHOTS = 16


@dataclass(frozen=True)
class Share:
    """What one client holds: indices into the image set. `domain` is None where the set has none."""

    name: str
    domain: str | None
    train: Indices
    test: Indices


def by_domain_and_class(
    images: ImageSet, seed: int, beta: float = DIRICHLET_BETA, clients_per_domain: int = CLIENTS_PER_DOMAIN
) -> list[Share]:
    """Domain x Dirichlet: as many clients for each domain, labels skewed inside it, half of the images for training."""
    if images.domains is None:
        raise DataError("a multi-domain data set must be a tree DOMAIN/CLASS/IMAGE; unpack the archive and look")
    parts = domain_dirichlet(images.labels, images.domains, clients_per_domain, beta, seed, minimum=MINIMUM_IMAGES)
    shares = []
    for number, indices in enumerate(parts):
        domain = images.domains[indices[0]]
        train, test = train_test_split(images.labels[indices], TEST_FRACTION, seed)
        shares.append(
            Share(f"{domain}-{number % clients_per_domain + 1}", domain, train=indices[train], test=indices[test])
        )
    return shares


def by_disjoint_classes(images: ImageSet, seed: int) -> list[Share]:
    """Ten clients with classes of their own; sixteen images of each class for training, the others for testing."""
    shares = []
    for number, indices in enumerate(disjoint_classes(images.labels, DISJOINT_CLIENTS, seed), start=1):
        train = indices[few_shot(images.labels[indices], SHOTS, seed)]
        shares.append(Share(f"client-{number:02d}", None, train=train, test=np.setdiff1d(indices, train)))
    return shares


PHOTO_SETS: dict[str, Callable[[ImageSet, int], list[Share]]] = {
    "office_caltech10": by_domain_and_class,
    "pacs": by_domain_and_class,
    "caltech101": by_disjoint_classes,
}
"""The data sets by the names of their archives, and how a seed shares each out."""


def clients_of(shares: list[Share], features: FeatureSet) -> list[SimulatedClient]:
    """The clients, given the `features` of the whole image set."""
    return [
        SimulatedClient(share.name, train=features.subset(share.train), test=features.subset(share.test))
        for share in shares
    ]
