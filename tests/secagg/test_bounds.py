"""The sparse graph's parameters: tails against exact fractions, published parameters, simulated rounds."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from pfedsecure.secagg import Assumptions, Parameters, Sharing
from pfedsecure.secagg.bounds import holders_and_threshold, log_lower_tail, log_partition, log_upper_tail


@pytest.mark.parametrize(("population", "marked", "drawn"), [(30, 7, 12), (9, 9, 4), (20, 0, 5), (15, 8, 15)])
def test_tails_are_hypergeometric(population: int, marked: int, drawn: int) -> None:
    whole = math.comb(population, drawn)
    masses = [
        Fraction(math.comb(marked, x) * math.comb(population - marked, drawn - x), whole) for x in range(drawn + 1)
    ]
    for x in range(drawn + 2):
        assert 2 ** log_upper_tail(population, marked, drawn)[x] == pytest.approx(float(sum(masses[x:])), abs=1e-12)
        assert 2 ** log_lower_tail(population, marked, drawn)[x] == pytest.approx(float(sum(masses[:x])), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout", "published"),
    [
        (100, 0.33, 0.33, (68, 34)),
        (1000, 0.33, 0.33, (286, 150)),
        (10_000, 0.33, 0.33, (422, 221)),
        (100, 0.45, 0.45, (92, 46)),
        (1000, 0.45, 0.45, (822, 417)),
        (1000, 0.05, 0.33, (72, 24)),
        (10_000, 0.05, 0.33, (86, 29)),
    ],
)
def test_the_first_two_conditions_give_the_published_parameters(
    n: int, corrupt: float, dropout: float, published: tuple[int, int]
) -> None:
    """Even degree and threshold of the reference implementation of Bell et al., google-parfait/federated-compute.

    Its table is for an honest but curious server, 40 bits of security in two events and 20 bits of correctness.
    """
    bad, alive = math.floor(corrupt * n + 1e-9), math.ceil((1 - dropout) * n - 1e-9)
    for k in range(2, n, 2):
        t1 = int(np.argmax(log_upper_tail(n, bad, k) + math.log2(n) <= -41)) - 1
        t2 = int(np.argmax(log_lower_tail(n, alive, k) + math.log2(n) > -20)) - 1
        if t1 < t2:
            assert (k, t1 + 1) == published
            return
    pytest.fail("no degree found")


@pytest.mark.parametrize("n", [150, 300, 1000, 4096])
def test_chosen_parameters_meet_every_condition_and_one_holder_less_does_not(n: int) -> None:
    assumed = Assumptions()
    quorum = 2 * n // 3 + 1
    found = holders_and_threshold(n, quorum, assumed)
    assert found is not None
    k, t = found
    assert not math.isfinite(_failure(n, k - 1, assumed, quorum))
    assert _failure(n, k, assumed, quorum) <= t


def _failure(n: int, k: int, assumed: Assumptions, quorum: int) -> float:
    """The smallest threshold with which k holders are good, by exact fractions and a plain sum; infinity if none is."""
    corrupt, alive = math.floor(assumed.corrupt * n), n - math.floor(assumed.dropout * n)
    whole = math.comb(n - 1, k)

    def many_corrupt(x: int) -> float:
        return float(
            n * Fraction(sum(math.comb(corrupt, y) * math.comb(n - 1 - corrupt, k - y) for y in range(x, k + 1)), whole)
        )

    def few_alive(x: int) -> float:
        return float(n * Fraction(sum(math.comb(alive - 1, y) * math.comb(n - alive, k - y) for y in range(x)), whole))

    c = next(x for x in range(k + 1) if many_corrupt(x + 1) <= 2.0**-41)
    for t in range(max(c + 1, 2), k + 1):
        if few_alive(t) > 2.0**-20:
            break
        if log_partition(n, k, smallest=t - c, corrupt=corrupt, dropped=n - quorum) <= -41:
            return t
    return math.inf


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k", "dropped"), [(5, 2, 1), (5, 1, 0), (6, 1, 0)])
def test_the_bound_on_parted_groups_holds_where_all_graphs_can_be_listed(n: int, k: int, dropped: int) -> None:
    clients, smallest = range(n), 2
    graphs = list(itertools.product(*(list(itertools.combinations(set(clients) - {i}, k)) for i in clients)))
    parted = 0
    for drawn in graphs:
        edges = {frozenset((i, j)) for i, others in enumerate(drawn) for j in others}
        parted += any(
            len(rest := set(clients) - set(gone) - set(group)) >= smallest
            and not any(frozenset((a, b)) in edges for a in group for b in rest)
            for count in range(dropped + 1)
            for gone in itertools.combinations(clients, count)
            for group in itertools.combinations(sorted(set(clients) - set(gone)), smallest)
        )
    bound = 2 ** log_partition(n, k, smallest=smallest, corrupt=0, dropped=dropped)
    assert 0 < parted / len(graphs) <= bound * (1 + 1e-9)
    assert bound < 0.2


def test_simulated_cohorts_fail_no_oftener_than_stated() -> None:
    """With few bits of security failures can be seen: random corrupt clients, random drop-outs, honest graph."""
    n, trials = 60, 400
    assumed = Assumptions(corrupt=0.15, dropout=0.2, security_bits=3, correctness_bits=3)
    found = holders_and_threshold(n, 2 * n // 3 + 1, assumed)
    assert found is not None
    k, t = found
    generator = np.random.default_rng(3)
    read, lost, parted = 0, 0, 0
    for _ in range(trials):
        drawn = np.array([generator.permutation(np.delete(np.arange(n), i))[:k] for i in range(n)])
        corrupt = np.isin(np.arange(n), generator.choice(n, math.floor(0.15 * n), replace=False))
        gone = np.isin(np.arange(n), generator.choice(n, math.floor(0.2 * n), replace=False))
        read += bool((corrupt[drawn].sum(axis=1)[~corrupt] >= t).any())
        lost += bool(((~gone)[drawn].sum(axis=1) < t).any())
        parted += not _connected(drawn, ~corrupt & ~gone)
    for failures, stated in ((read + parted, 2**-3), (lost, 2**-3)):
        assert failures / trials <= stated + 3 * math.sqrt(stated / trials)


def _connected(drawn: np.ndarray, chosen: np.ndarray) -> bool:
    n = len(drawn)
    edges = np.zeros((n, n), bool)
    edges[np.arange(n)[:, None], drawn] = True
    edges = (edges | edges.T) & chosen & chosen[:, None]
    reached = np.zeros(n, bool)
    reached[np.flatnonzero(chosen)[0]] = True
    while True:
        more = reached | edges[reached].any(axis=0)
        if (more == reached).all():
            return bool((reached == chosen).all())
        reached = more


def test_two_quorums_share_an_honest_client() -> None:
    for n in range(3, 400):
        quorum = Sharing.of(Parameters(1, 1.0, 1, 0.5, complete_up_to=400), n).quorum
        largest_minority = math.ceil(n / 3) - 1
        assert 2 * quorum - n > largest_minority
        assert 2 * n < 3 * quorum <= 2 * n + 3


def test_complete_up_to_the_limit_and_sparse_where_it_pays() -> None:
    parameters = Parameters(1, 1.0, 1, 0.5)
    assert Sharing.of(parameters, 64) == Sharing(64, 43, 63, 43)
    assert Sharing.of(parameters, 64).complete
    sparse = Sharing.of(parameters, 1000)
    assert not sparse.complete
    assert sparse.threshold < sparse.holders < 200
    assert Sharing.of(Parameters(1, 1.0, 1, 0.5, complete_up_to=1000), 1000).complete
    # So many colluding clients that no sparse graph of 80 clients is good enough: complete, not less safe.
    strict = Parameters(1, 1.0, 1, 0.5, assumptions=Assumptions(corrupt=0.33, dropout=0.33))
    assert Sharing.of(strict, 80).complete


def test_holders_are_drawn_by_the_client_from_the_others() -> None:
    sharing = Sharing(clients=20, quorum=14, holders=4, threshold=3)
    drawn = [
        sharing.draw_holders(own, lambda count, own=own: np.random.default_rng(own).bytes(count)) for own in range(20)
    ]
    assert all(len(set(row.tolist()) - {own}) == 4 for own, row in enumerate(drawn))
    assert len({tuple(row) for row in drawn}) > 15
    complete = Sharing(clients=5, quorum=4, holders=4, threshold=4)
    assert complete.draw_holders(2, lambda count: b"").tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("corrupt", "dropout", "security", "correctness"),
    [(1 / 3, 0, 40, 20), (0, 0.4, 40, 20), (-0.1, 0, 40, 20), (0, 0, 0, 20)],
)
def test_assumptions_beyond_the_quorum_are_refused(
    corrupt: float, dropout: float, security: int, correctness: int
) -> None:
    with pytest.raises(ValueError, match=r"below 1/3|at least 1"):
        Assumptions(corrupt, dropout, security, correctness)
