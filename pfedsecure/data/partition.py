"""Who holds which images in a simulated federation.

Every function returns one ascending array of indices per client. Arrays are disjoint and together hold every image.
The result depends on the arguments alone: with the same version of NumPy a seed gives the same federation everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pfedsecure.data.seeding import generator
from pfedsecure.errors import DataError

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


def disjoint_classes(labels: Labels, n_clients: int, seed: int) -> list[Indices]:
    """Each class belongs to one client, who holds all its images; numbers of classes differ by at most one.

    The "pathological" split of federated prompt learning (pFedPrompt, Guo et al. 2023; pFedMoAP, Luo et al. 2025).
    Raises DataError if there are fewer classes than clients.
    """
    _require_clients(n_clients)
    classes = np.unique(labels)
    if len(classes) < n_clients:
        raise DataError(f"{len(classes)} classes cannot be shared out to {n_clients} clients; ask for fewer clients")
    hands = np.array_split(generator(seed, "disjoint_classes").permutation(classes), n_clients)
    return [np.flatnonzero(np.isin(labels, hand)) for hand in hands]


def dirichlet(labels: Labels, n_clients: int, beta: float, seed: int, minimum: int = 1) -> list[Indices]:
    """Label skew: the images of each class go to clients in proportions drawn from a symmetric Dirichlet(`beta`).

    Small `beta` gives each client few classes, large `beta` all of them alike. Dirichlet skew was proposed by Hsu et
    al. 2019 (arXiv 1909.06335), who draw the class mix of each client; drawing the client mix of each class, as here,
    is the form of Yurochkin et al. 2019 (arXiv 1905.12022), which needs no equal client sizes. Counts are multinomial,
    so that rounding favours nobody.

    Every client gets at least `minimum` images: clients below it are topped up one image at a time by the client that
    holds most, from that one's commonest class. The usual alternative, drawing again until it fits, need not end.
    Raises DataError for a `beta` that is not positive or finite, or too few images for the minimum.
    """
    _require_clients(n_clients)
    return _dirichlet(labels, n_clients, beta, minimum, generator(seed, "dirichlet"))


def by_domain(domains: Sequence[str], n_clients: int) -> list[Indices]:
    """Each client holds images of one domain only.

    Domains in the order of their names; when there are more clients than domains, the clients of a domain are
    neighbours in the list, their number differs between domains by at most one, and each takes every k-th image of
    the domain. Raises DataError if there are fewer clients than domains, or than a client can get an image each.
    """
    _require_clients(n_clients)
    members = _domain_members(domains)
    if n_clients < len(members):
        raise DataError(f"{n_clients} clients cannot hold one each of {len(members)} domains; ask for more clients")
    shares = []
    for position, (domain, indices) in enumerate(members.items()):
        count = n_clients // len(members) + (position < n_clients % len(members))
        _require_images(len(indices), count, 1, f"domain {domain!r}: ")
        shares += [indices[start::count] for start in range(count)]
    return shares


def domain_dirichlet(
    labels: Labels, domains: Sequence[str], clients_per_domain: int, beta: float, seed: int, minimum: int = 1
) -> list[Indices]:
    """Feature and label skew: each domain, in the order of their names, is split by `dirichlet` among its own clients.

    Client `d * clients_per_domain + j` is the j-th of the d-th domain. The draw of a domain does not depend on which
    others there are. Raises DataError as `dirichlet` does.
    """
    _require_clients(clients_per_domain)
    if len(labels) != len(domains):
        raise ValueError(f"{len(labels)} labels and {len(domains)} domains")
    shares = []
    for domain, indices in _domain_members(domains).items():
        rng = generator(seed, f"domain_dirichlet/{domain}")
        inside = _dirichlet(labels[indices], clients_per_domain, beta, minimum, rng, f"domain {domain!r}: ")
        shares += [indices[share] for share in inside]
    return shares


def by_client(clients: Sequence[str]) -> dict[str, Indices]:
    """The partition that the data itself states (a `client` column), in the order of the clients' names."""
    return _domain_members(clients)


def _dirichlet(
    labels: Labels, n_clients: int, beta: float, minimum: int, rng: np.random.Generator, where: str = ""
) -> list[Indices]:
    if not (beta > 0 and math.isfinite(beta)):
        raise DataError(f"the Dirichlet parameter beta is {beta}; it must be a positive number")
    _require_images(len(labels), n_clients, minimum, where)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    counts = np.array(
        [rng.multinomial(len(indices), rng.dirichlet(np.full(n_clients, beta))) for indices in members], dtype=np.int64
    )  # (C, n_clients)
    _lift_to_minimum(counts, minimum)
    hands = [np.split(indices, np.cumsum(row)[:-1]) for indices, row in zip(members, counts, strict=True)]
    return [np.sort(np.concatenate([hand[client] for hand in hands])) for client in range(n_clients)]


def _lift_to_minimum(counts: npt.NDArray[np.int64], minimum: int) -> None:
    """Move single images in `counts (C, n_clients)`, in place, until every client holds `minimum`.

    Ends: while a client lacks images the largest has some to spare, because the sum suffices, and every move shrinks
    what is lacking by one.
    """
    sizes = counts.sum(axis=0)
    while sizes.min() < minimum:
        giver, taker = sizes.argmax(), sizes.argmin()
        commonest = counts[:, giver].argmax()
        counts[commonest, [giver, taker]] += (-1, 1)
        sizes[[giver, taker]] += (-1, 1)


def _domain_members(names: Sequence[str]) -> dict[str, Indices]:
    """The ascending indices of each distinct name, in the order of the names."""
    column = np.asarray(names, dtype=object)
    return {name: np.flatnonzero(column == name) for name in sorted(set(names))}


def _require_clients(n_clients: int) -> None:
    if n_clients < 1:
        raise DataError(f"{n_clients} clients were asked for; at least 1 is needed")


def _require_images(n_images: int, n_clients: int, minimum: int, where: str) -> None:
    if minimum < 0:
        raise DataError(f"the minimum of images per client is {minimum}; use 0 or more")
    if n_images < max(n_clients * minimum, 1):
        raise DataError(
            f"{where}{n_images} images cannot give {n_clients} clients {minimum} each; "
            "ask for fewer clients or a smaller minimum"
        )
