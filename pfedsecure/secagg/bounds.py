"""How many share holders each client needs for a sparse graph to be as good as the complete one, but for a stated luck.

Setting: n clients, a share of them corrupt (fixed before the graph is). Each client draws k share holders uniformly
among the others, by itself, so that no server can search for a convenient graph; it shares its secrets so that t of
the k, or t - 1 and itself, determine them. Two clients have a mask in common when one of them drew the other. A server
that cheats declares whom it likes as dropped out, knowing the graph, but leaves a quorum of survivors. Three events:

- t or more holders of some honest client are corrupt, and its secrets read;
- drop-outs, at random, leave some client fewer than t holders, and the round is lost;
- the server's choice of drop-outs parts the honest survivors into groups without a common mask, and it learns the sum
  of each group instead of one sum.

These are the conditions for a good graph of Bell, Bonawitz, Gascon, Lepoint and Raykova, "Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead" (CCS 2020), with exact tails in place of exponential estimates, and the
third one sharper: there drop-outs do not depend on the graph, here they may. That can be had because a survivor's seed
is given out only by t of its holders and itself, of whom, with at most c corrupt, t - c are honest survivors: itself or
mask partners of it. So no group has fewer than t - c members, and larger ones have too many edges to the rest. Because
all clients sign one set of survivors for the whole cohort (see `client`), holders cannot be told different things about
a client; so t > c is enough where Bell et al. need 2 t > k + c.

All logarithms are to base 2; all probabilities are union bounds over clients, groups of clients and drop-outs.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pfedsecure.secagg.setting import Assumptions


@cache
def holders_and_threshold(n: int, quorum: int, assumed: Assumptions) -> tuple[int, int] | None:
    """The smallest k for n clients, with its t; None when fewer than n / 2 holders are not enough.

    `quorum`: the fewest survivors that the clients accept, so D = n - quorum.
    """
    corrupt = math.floor(assumed.corrupt * n)
    alive = n - math.floor(assumed.dropout * n)
    security = -(assumed.security_bits + 1)  # two events share the budget
    for k in range(2, (n - 1) // 2):
        corrupt_tail = math.log2(n) + log_upper_tail(n - 1, corrupt, k)
        lost = math.log2(n) + log_lower_tail(n - 1, alive - 1, k)
        # More than c corrupt holders are improbable enough; with t above t_max shares would be lost too often.
        c = int(np.argmax(corrupt_tail <= security)) - 1
        t_max = int(np.argmax(lost > -assumed.correctness_bits)) - 1
        for t in range(max(c + 1, 2), t_max + 1):
            if log_partition(n, k, smallest=t - c, corrupt=corrupt, dropped=n - quorum) <= security:
                return k, t
    return None


def log_upper_tail(population: int, marked: int, drawn: int) -> NDArray[np.float64]:
    """log P[X >= x] for x = 0..drawn + 1, X the marked ones among `drawn` from `population` (hypergeometric)."""
    masses = _log_masses(population, marked, drawn)
    tail = np.logaddexp2.accumulate(masses[::-1])[::-1]
    return np.append(tail, -np.inf)


def log_lower_tail(population: int, marked: int, drawn: int) -> NDArray[np.float64]:
    """log P[X < x] for x = 0..drawn + 1, X as in `log_upper_tail`."""
    return np.concatenate([[-np.inf], np.logaddexp2.accumulate(_log_masses(population, marked, drawn))])


def log_partition(n: int, k: int, *, smallest: int, corrupt: int, dropped: int) -> float:
    """log of a bound on P[some choice of at most `dropped` honest clients parts the other honest ones in two groups].

    Neither group has fewer than `smallest` members. Summed over the size a of the smaller one; if more could be
    dropped, members of the larger are, so that sets of exactly `dropped` clients are all that has to be counted:
    choices of the group, choices of the dropped, a members who drew none of the other b, b who drew none of the a.
    """
    honest = n - corrupt
    a = np.arange(smallest, honest // 2 + 1)
    if not len(a):
        return -math.inf
    b = np.maximum(honest - a - dropped, smallest)
    drops = honest - a - b
    possible = drops >= 0
    a, b, drops = a[possible], b[possible], drops[possible]
    choices = _log_choose(honest, a) + _log_choose(honest - a, drops)
    nobody_drew_b = a * (_log_choose(n - 1 - b, k) - _log_choose(n - 1, k))
    nobody_drew_a = b * (_log_choose(n - 1 - a, k) - _log_choose(n - 1, k))
    return float(np.logaddexp2.reduce(choices + nobody_drew_b + nobody_drew_a, initial=-np.inf))


def _log_masses(population: int, marked: int, drawn: int) -> NDArray[np.float64]:
    x = np.arange(drawn + 1)
    return _log_choose(marked, x) + _log_choose(population - marked, drawn - x) - _log_choose(population, drawn)


def _log_choose(of: int | NDArray[np.int64], take: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """log of binomial coefficients, -inf where there is nothing to choose."""
    of, take = np.broadcast_arrays(np.asarray(of), np.asarray(take))
    fine = (take >= 0) & (take <= of)
    table = _log_factorials(int(of.max(initial=0)))
    values = np.full(of.shape, -np.inf)
    values[fine] = table[of[fine]] - table[take[fine]] - table[(of - take)[fine]]
    return values


@cache
def _log_factorials(largest: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, largest + 1)))])
