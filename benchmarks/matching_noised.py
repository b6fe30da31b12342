"""Matching on noised sketches: time and recall of a search among very many."""

from __future__ import annotations

from functools import partial
from statistics import fmean, median

import numpy as np

from pfedsecure.matching.candidates import read_candidates
from pfedsecure.matching.dp import RADIUS, DpServerMatching, write_sketch
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.release import noise_multiplier
from pfedsecure.privacy.noise import RoundedGaussian

from .contract import Row
from .matching_pool import nearest
from .secagg_round import cpu

DIMENSION, DELTA = 64, 1e-5
EPSILONS = (8.0, None)
"""None: prompts that are private already, whose sketches get no noise."""
QUERIES = 20


def noised_rows(experts: int, k: int) -> list[Row]:
    """A row for each epsilon: CPU milliseconds a query, and recall against a sort over the same noised sketches."""
    rows: list[Row] = []
    for epsilon in EPSILONS:
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(experts, DIMENSION))
        exact = np.trunc(vectors * (RADIUS / 2 / np.linalg.norm(vectors, axis=1))[:, None]).astype(np.int64)
        multiplier = 0.0 if epsilon is None else noise_multiplier(epsilon, DELTA)
        if multiplier:
            noise = RoundedGaussian(multiplier * 2 * RADIUS).sample(exact.size)
            exact = exact + noise.reshape(exact.shape)
        server = DpServerMatching(DIMENSION, multiplier)
        pool = [PoolEntry(f"{row:06d}", str(row), write_sketch(vector), b"") for row, vector in enumerate(exact)]
        index, build_ms = cpu(partial(server.index, pool))
        times, recalls = [], []
        for row in rng.integers(0, experts, QUERIES):
            answer, milliseconds = cpu(partial(index.answer, pool[row].sketch, k, pool[row].owner, 1))
            found = {int(candidate.expert_id) for candidate in read_candidates(answer)}
            recalls.append(len(found & set(nearest(exact, exact[row], k, leave_out=int(row)))) / k)
            times.append(milliseconds)
        rows.append(
            {
                "way": "dp",
                "experts": experts,
                "dimension": DIMENSION,
                "epsilon": epsilon,
                "query_ms": median(times),
                "build_ms": build_ms,
                "recall": fmean(recalls),
            }
        )
    return rows
