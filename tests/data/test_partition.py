from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pfedsecure.data import by_client, by_domain, dirichlet, disjoint_classes, domain_dirichlet
from pfedsecure.errors import DataError

LABELS = hnp.arrays(np.int64, st.integers(1, 80), elements=st.integers(0, 6))
SEEDS = st.integers(0, 2**70)
BETAS = st.one_of(st.sampled_from([5e-324, 1e-12, 1e12]), st.floats(1e-3, 100))


def assert_partition(shares: list[np.ndarray], n_images: int) -> None:
    """Disjoint, complete, each share ascending."""
    assert all(share.dtype == np.int64 and (np.diff(share) > 0).all() for share in shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(n_images))


def as_lists(shares: list[np.ndarray]) -> list[list[int]]:
    return [share.tolist() for share in shares]


@given(LABELS, SEEDS, st.data())
def test_disjoint_classes_keeps_classes_whole(labels: np.ndarray, seed: int, data: st.DataObject) -> None:
    present = len(np.unique(labels))
    n_clients = data.draw(st.integers(1, present))
    shares = disjoint_classes(labels, n_clients, seed)
    assert_partition(shares, len(labels))
    classes = [set(labels[share].tolist()) for share in shares]
    assert sum(len(held) for held in classes) == present == len(set().union(*classes))
    assert max(map(len, classes)) - min(map(len, classes)) <= 1
    assert as_lists(disjoint_classes(labels, n_clients, seed)) == as_lists(shares)


@given(LABELS, BETAS, SEEDS, st.data())
def test_dirichlet_is_a_partition_with_a_minimum(
    labels: np.ndarray, beta: float, seed: int, data: st.DataObject
) -> None:
    n_clients = data.draw(st.integers(1, min(len(labels), 12)))
    minimum = data.draw(st.integers(0, len(labels) // n_clients))
    shares = dirichlet(labels, n_clients, beta, seed, minimum)
    assert len(shares) == n_clients
    assert_partition(shares, len(labels))
    assert min(map(len, shares)) >= minimum
    assert as_lists(dirichlet(labels, n_clients, beta, seed, minimum)) == as_lists(shares)


@given(LABELS, st.sampled_from([0.05, 1.0]), SEEDS, st.data())
def test_domain_dirichlet_keeps_clients_inside_their_domain(
    labels: np.ndarray, beta: float, seed: int, data: st.DataObject
) -> None:
    domains = data.draw(st.lists(st.sampled_from(["c", "a", "b"]), min_size=len(labels), max_size=len(labels)))
    per_domain = data.draw(st.integers(1, min(domains.count(name) for name in set(domains))))
    shares = domain_dirichlet(labels, domains, per_domain, beta, seed, minimum=1)
    assert_partition(shares, len(labels))
    assert [{domains[i] for i in share} for share in shares] == [
        {name} for name in sorted(set(domains)) for _ in range(per_domain)
    ]


@given(st.lists(st.sampled_from(["c", "a", "b"]), min_size=1, max_size=60), st.data())
def test_by_domain_gives_each_client_one_domain(domains: list[str], data: st.DataObject) -> None:
    names = sorted(set(domains))
    fewest = min(map(domains.count, names))
    n_clients = data.draw(st.integers(len(names), len(names) * fewest))
    shares = by_domain(domains, n_clients)
    assert len(shares) == n_clients
    assert_partition(shares, len(domains))
    held = [{domains[i] for i in share} for share in shares]
    assert all(len(names) == 1 for names in held)
    assert [name for (name,) in held] == sorted(name for (name,) in held)
    assert max(map(held.count, held)) - min(map(held.count, held)) <= 1


def test_the_seed_matters_and_zero_is_one_of_them() -> None:
    labels = np.repeat(np.arange(10), 20)
    domains = ["a", "b"] * 100
    for partition in (
        lambda seed: disjoint_classes(labels, 4, seed),
        lambda seed: dirichlet(labels, 4, 0.5, seed),
        lambda seed: domain_dirichlet(labels, domains, 2, 0.5, seed),
    ):
        results = [as_lists(partition(seed)) for seed in (0, 0, 1, 2)]
        assert results[0] == results[1]
        assert len({str(result) for result in results}) == 3


def test_another_domain_does_not_change_the_draw_of_a_domain() -> None:
    labels = np.tile(np.arange(5), 20)
    alone = domain_dirichlet(labels, ["b"] * 100, 3, 0.3, seed=4)
    both = domain_dirichlet(np.tile(labels, 2), ["b"] * 100 + ["a"] * 100, 3, 0.3, seed=4)
    assert as_lists(both[3:]) == as_lists(alone)
    assert as_lists([share - 100 for share in both[:3]]) != as_lists(alone)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_counts_have_the_moments_of_a_dirichlet_multinomial(beta: float) -> None:
    """Of n images of a class, a client's number has mean n/K and variance n (1/K)(1 - 1/K)(n + K beta)/(1 + K beta)."""
    n, clients, draws = 40, 4, 1500
    labels = np.zeros(n, dtype=np.int64)
    counts = np.array([[len(share) for share in dirichlet(labels, clients, beta, s, 0)] for s in range(draws)])
    total = clients * beta
    variance = n / clients * (1 - 1 / clients) * (n + total) / (1 + total)
    np.testing.assert_allclose(counts.mean(axis=0), n / clients, atol=4.5 * np.sqrt(variance / draws))
    np.testing.assert_allclose(counts.var(axis=0), variance, rtol=0.2)


def test_a_small_beta_separates_the_classes_and_a_large_one_mixes_them() -> None:
    labels = np.repeat(np.arange(10), 50)
    skewed, even = (dirichlet(labels, 5, beta, seed=1) for beta in (1e-3, 1e6))
    assert sum(len(np.unique(labels[share])) for share in skewed) <= 12  # 10 if each class had a single holder
    for share in even:
        assert np.bincount(labels[share], minlength=10).min() > 0


def test_the_minimum_moves_no_more_images_than_are_lacking() -> None:
    labels = np.repeat(np.arange(4), 25)
    free, lifted = (dirichlet(labels, 8, 0.05, seed=3, minimum=minimum) for minimum in (0, 10))
    lacking = sum(max(10 - len(share), 0) for share in free)
    assert lacking > 0
    before, after = (np.array([np.bincount(labels[share], minlength=4) for share in s]) for s in (free, lifted))
    assert np.abs(before - after).sum() == 2 * lacking
    assert after.sum(axis=1).min() == 10


def test_the_partition_that_the_data_states() -> None:
    shares = by_client(["north", "south", "north"])
    assert list(shares) == ["north", "south"]
    assert shares["north"].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: disjoint_classes(y, 4, 0), "3 classes cannot be shared out to 4 clients; ask for fewer clients"),
        (lambda y: disjoint_classes(y, 0, 0), "0 clients were asked for; at least 1 is needed"),
        (lambda y: disjoint_classes(y, 2, -1), "the seed is -1; use 0 or a positive number"),
        (lambda y: dirichlet(y, 0, 1.0, 0), "0 clients were asked for"),
        (lambda y: dirichlet(y, 2, 0.0, 0), "beta is 0.0; it must be a positive number"),
        (lambda y: dirichlet(y, 2, float("nan"), 0), "beta is nan"),
        (lambda y: dirichlet(y, 2, float("inf"), 0), "beta is inf"),
        (lambda y: dirichlet(y, 2, 1.0, 0, -1), "minimum of images per client is -1; use 0 or more"),
        (
            lambda y: dirichlet(y, 2, 1.0, 0, 4),
            "6 images cannot give 2 clients 4 each; ask for fewer clients or a smaller minimum",
        ),
        (lambda y: dirichlet(y[:0], 2, 1.0, 0, 0), "0 images cannot give 2 clients"),
        (lambda y: by_domain(["a", "b"], 1), "1 clients cannot hold one each of 2 domains; ask for more clients"),
        (lambda y: by_domain(["a", "b"], 3), "domain 'a': 1 images cannot give 2 clients 1 each"),
        (lambda y: domain_dirichlet(y, list("aaaaab"), 2, 1.0, 0), "domain 'b': 1 images cannot give 2 clients 1 each"),
        (lambda y: domain_dirichlet(y, list("aaabbb"), 0, 1.0, 0), "0 clients were asked for"),
    ],
)
def test_impossible_partitions_are_refused(call, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(np.array([0, 0, 1, 1, 2, 2]))


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 labels and 1 domains"):
        domain_dirichlet(np.array([0, 1]), ["a"], 1, 1.0, 0)
