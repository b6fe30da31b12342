"""Which images each simulated client holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pfedsecure.data import ImageSet, by_client, by_domain, dirichlet, disjoint_classes, domain_dirichlet, open_images
from pfedsecure.errors import DataError

Indices = NDArray[np.int64]

MINIMUM_IMAGES = 4
"""That a client gets at the least where labels are drawn: some to train on and some to test on."""


class Partition(StrEnum):
    """How the images of a data set are shared out."""

    DIRICHLET = "dirichlet"
    CLASSES = "classes"
    DOMAINS = "domains"
    DOMAIN_DIRICHLET = "domain-dirichlet"
    CLIENTS = "clients"


def digits_of(clients: int, seed: int) -> dict[str, ImageSet]:
    """The embedded digits by client, dealt by `seed` as in `pfed demo`: digits and a writing of one's own.

    More clients than the demo can have share what one of the demo's would hold. Raises DataError.
    """
    from pfedsecure.data.digits import CLASS_NAMES, MAX_CLIENTS  # loads scikit-learn

    hands = min(clients, MAX_CLIENTS)
    held = [open_images(f"demo:{hand}/{hands}:{seed}", strict=True).relabel(CLASS_NAMES) for hand in range(hands)]
    shares = {}
    for number in range(clients):
        hand, place = number % hands, number // hands
        sharing = len(range(hand, clients, hands))
        rows = range(place, len(held[hand]), sharing)
        shares[_name(number)] = held[hand].subset(rows)
    return shares


def all_digits(seed: int) -> ImageSet:
    """All embedded digits as one set, whose domains are the writings."""
    from pfedsecure.data.digits import CONDITIONS

    count = len(CONDITIONS)
    parts = [open_images(f"demo:{part}/{count}:{seed}", strict=True) for part in range(count)]
    names = sorted(set(chain.from_iterable(part.class_names for part in parts)))
    parts = [part.relabel(names) for part in parts]
    return ImageSet(
        class_names=tuple(names),
        labels=np.concatenate([part.labels for part in parts]),
        keys=tuple(chain.from_iterable(part.keys for part in parts)),
        images=tuple(chain.from_iterable(part.images for part in parts)),
        domains=tuple(chain.from_iterable(part.domains or () for part in parts)),
    )


def joined(parts: Mapping[str, ImageSet]) -> tuple[ImageSet, dict[str, Indices]]:
    """The images of all clients as one set, and whose rows are whose. All parts have the same class names."""
    sets = list(parts.values())
    starts = np.cumsum([0, *(len(part) for part in sets)])
    images = ImageSet(
        class_names=sets[0].class_names,
        labels=np.concatenate([part.labels for part in sets]),
        keys=tuple(key for part in sets for key in part.keys),
        images=tuple(image for part in sets for image in part.images),
    )
    rows = {name: np.arange(starts[place], starts[place + 1]) for place, name in enumerate(parts)}
    return images, rows


def partition(
    images: ImageSet, way: Partition | None, clients: int | None, beta: float, seed: int
) -> tuple[Partition, dict[str, Indices]]:
    """Rows of `images` by client, drawn by `seed`, and the way they were shared out.

    By default as the data itself says where it does, else by Dirichlet(`beta`). Where the data says, `clients` may be
    None, and is all clients that it knows. Raises DataError.
    """
    if way is None:
        way = Partition.DIRICHLET if images.clients is None else Partition.CLIENTS
    if way is Partition.CLIENTS:
        if images.clients is None:
            raise DataError("the data does not say whose images are whose; give a .csv with a column client")
        own = by_client(images.clients)
        if clients not in (None, len(own)):
            raise DataError(f"the data has {len(own)} clients, not {clients}; leave --clients off")
        return way, own
    return way, {_name(number): rows for number, rows in enumerate(_drawn(images, way, clients or 0, beta, seed))}


def _drawn(images: ImageSet, way: Partition, clients: int, beta: float, seed: int) -> Sequence[Indices]:
    if way is Partition.CLASSES:
        return disjoint_classes(images.labels, clients, seed)
    if way is Partition.DIRICHLET:
        return dirichlet(images.labels, clients, beta, seed, MINIMUM_IMAGES)
    if images.domains is None:
        raise DataError(f"--partition {way}: the data has no domains; give a tree DOMAIN/CLASS/IMAGE")
    if way is Partition.DOMAINS:
        return by_domain(images.domains, clients)
    domains = len(set(images.domains))
    each, rest = divmod(clients, domains)
    if rest or not each:
        raise DataError(f"{clients} clients cannot be as many in each of {domains} domains; ask for a multiple")
    return domain_dirichlet(images.labels, images.domains, each, beta, seed, MINIMUM_IMAGES)


def _name(number: int) -> str:
    return f"client-{number + 1}"
