"""What does matching on encrypted and noised sketches cost, and does it find the nearest?

Ours beside two other ways on the same machine in the same run: TenSEAL's own `CKKSVector.dot` on pairs of encrypted
sketches, and CKKS with 64 sketches in the slots of a ciphertext. CPU time is that of all threads of the process.

Prompts: recall is of real ones, of 50 clients with a few dozen digits each (`matching_prompts`); pools for costs are
drawn, as what a sketch says does not change what it costs.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean, median
from typing import Literal

import click
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pfedsecure.matching.he.encryption import encrypt, quantised, query_polynomial, sketch_polynomial
from pfedsecure.matching.he.parameters import LARGEST, PLAIN_MODULUS, PRIMES, RING, Layout
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.matching.he.server import HeServerMatching
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.pki.cohort import CohortSecrets

from . import matching_ckks
from .contract import Bar, Outcome, Row, benchmark
from .matching_noised import noised_rows
from .matching_pool import EncryptedPool, nearest
from .matching_prompts import real_prompts
from .secagg_round import cpu

EXPERTS, DIMENSIONS, NOISED_EXPERTS = (64, 1024, 4096), (32, 64, 128), 100_000
QUICK_EXPERTS, QUICK_DIMENSIONS, QUICK_NOISED = (64,), (64,), 2000
K = 9
CLIP = 2.0
QUERIES = 5
ROUND_CLIENTS, ROUND_EXPERTS = 100, 1000
QUICK_ROUND = (4, 40)
AT_ONCE = 16

LIMITS: dict[str, tuple[float, Literal["<=", ">="]]] = {
    "he_ms_per_pair": (0.25, "<="),
    "he_ratio_tenseal_dot": (75.0, ">="),
    "he_upload_kb": (250.0, "<="),
    "he_answer_kb_per_64": (120.0, "<="),
    "he_id_agreement": (0.999, ">="),
    "he_recall_at_9": (0.98, ">="),
    "he_round_seconds_100x1000": (15.0, "<="),
    "dp_query_ms_100k": (5.0, "<="),
    "dp_recall_100k": (0.95, ">="),
}


@benchmark
def command(*, quick: bool) -> Outcome:
    """Matching on encrypted and noised sketches: CPU, bytes, recall, against TenSEAL's dot and CKKS in slots."""
    with threadpool_limits(1):  # BLAS's other threads wait busily: their time would count as ours
        return _measure(quick)


def _measure(quick: bool) -> Outcome:
    key = SecretKey(CohortSecrets.of({1: bytes(range(32))}), 1)
    rows = []
    for dimension in QUICK_DIMENSIONS if quick else DIMENSIONS:
        for experts in QUICK_EXPERTS if quick else EXPERTS:
            _say(f"encrypted, {experts:,} experts, {dimension} numbers")
            rows.append(encrypted_row(key, experts, dimension))
    _say("TenSEAL's dot, and CKKS in slots")
    rows += [matching_ckks.dot_row(way, 64, 3 if quick else 20) for way in matching_ckks.DOT_BITS]
    rows.append(matching_ckks.packed_row(64, 2 if quick else 8))
    _say("recall on real prompts")
    rows += recall_rows(key, quick)
    clients, experts = QUICK_ROUND if quick else (ROUND_CLIENTS, ROUND_EXPERTS)
    _say(f"a round of {clients} clients and {experts:,} experts")
    rows.append(round_row(key, clients, experts))
    _say("noised")
    rows += noised_rows(QUICK_NOISED if quick else NOISED_EXPERTS, K)
    params: dict[str, object] = {
        "k": K,
        "clip": CLIP,
        "ring": RING,
        "primes": list(PRIMES),
        "plain_modulus": PLAIN_MODULUS,
        "largest_norm": LARGEST,
        "queries": QUERIES,
    }
    return Outcome(params=params, rows=rows, bars=bars(rows))


def encrypted_row(key: SecretKey, experts: int, dimension: int) -> Row:
    """One pool: what clients and server compute and send. Everything of the server's answer is in `answer_ms`."""
    layout = Layout(dimension)
    with EncryptedPool(key, layout, drawn(experts, dimension)) as pool:
        asked = [_ask(key, layout, pool, numbers) for numbers in drawn(QUERIES, dimension, seed=1)]
    sketch_ms = median(
        cpu(partial(encrypt, sketch_polynomial(numbers, layout), key))[1] for numbers in pool.numbers[:QUERIES]
    )
    client_ms, answer_ms, query_bytes, answer_bytes, agreement = zip(*asked, strict=True)
    return {
        "way": "he",
        "experts": experts,
        "dimension": dimension,
        "ms_per_pair": median(answer_ms) / experts,
        "answer_ms": median(answer_ms),
        "project_ms": pool.project_ms,
        "client_ms": sketch_ms + median(client_ms),
        "bytes_up": median(query_bytes) + len(pool.upload),
        "bytes_down": median(answer_bytes),
        "bytes_down_per_64": median(answer_bytes) * 64 / experts,
        "id_agreement": fmean(agreement),
    }


def _ask(
    key: SecretKey, layout: Layout, pool: EncryptedPool, numbers: NDArray[np.int64]
) -> tuple[float, float, int, int, float]:
    """The client's and the server's milliseconds, bytes of query and answer, and how many ids are as in clear."""
    query, query_ms = cpu(partial(encrypt, query_polynomial(numbers, layout), key))
    answer, answer_ms = cpu(partial(pool.answer, query))
    found, rank_ms = cpu(partial(pool.nearest, answer, numbers, K))
    agreement = _same_places(found, nearest(pool.numbers, numbers, K))
    return query_ms + rank_ms, answer_ms, len(query), len(answer), agreement


def recall_rows(key: SecretKey, quick: bool) -> list[Row]:
    """The nine that the encrypted way finds among real prompts, against exact ones of unquantised sketches."""
    rows: list[Row] = []
    for name, (centre, contexts) in real_prompts(quick).items():
        for seed in range(1 if quick else 3):
            sketcher = Sketcher(centre, 64, CLIP, seed)
            sketches = np.stack([sketcher.sketch(context) for context in contexts])
            recall, agreement = _recall(key, sketches, range(0, len(contexts), 5 if quick else 1))
            rows.append(
                {
                    "way": "he recall",
                    "prompts": name,
                    "seed": seed,
                    "experts": len(contexts),
                    "dimension": 64,
                    "recall": recall,
                    "id_agreement": agreement,
                }
            )
    return rows


def _recall(key: SecretKey, sketches: NDArray[np.float64], asking: Sequence[int]) -> tuple[float, float]:
    """Recall of the nine nearest of `sketches (n, 64)`, and how many ids are as in clear, over some who ask."""
    recall, agreement = [], []
    with EncryptedPool(key, Layout(64), [quantised(sketch, CLIP) for sketch in sketches]) as pool:
        for row in asking:
            numbers = pool.numbers[row]
            answer = pool.answer(encrypt(query_polynomial(numbers, Layout(64)), key), leave_out=row)
            found = pool.nearest(answer, numbers, K)
            recall.append(len(set(found) & set(nearest(sketches, sketches[row], K, leave_out=row))) / K)
            agreement.append(_same_places(found, nearest(pool.numbers, numbers, K, leave_out=row)))
    return fmean(recall), fmean(agreement)


def round_row(key: SecretKey, clients: int, experts: int) -> Row:
    """The server's whole matching in a round: as many new experts as clients, and an answer for each of these."""
    layout = Layout(64)
    upload = encrypt(sketch_polynomial(drawn(1, 64)[0], layout), key)  # what it says does not change what it costs
    query = encrypt(query_polynomial(drawn(1, 64)[0], layout), key)
    server = HeServerMatching(64)
    try:
        server.install(1, key.evaluation_keys(layout))
        pool = [PoolEntry(f"c{number:04d}", f"id-{number}", upload, b"old") for number in range(experts)]
        server.index(pool)
        changed = [PoolEntry(entry.owner, entry.expert_id, upload, b"new") for entry in pool[:clients]]
        before, started = _cpu_of_children(), time.perf_counter()
        index = server.index(changed + pool[clients:])
        index_seconds = time.perf_counter() - started
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for answer in threads.map(lambda entry: index.answer(query, K, entry.owner, 2), pool[:clients]):
                assert answer
        seconds = time.perf_counter() - started
    finally:
        server.close()  # waits for the processes: their CPU time counts from then on
    return {
        "way": "he round",
        "clients": clients,
        "experts": experts,
        "dimension": 64,
        "seconds": seconds,
        "index_seconds": index_seconds,
        "cpu_seconds_with_first_index": _cpu_of_children() - before,
    }


def drawn(count: int, dimension: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Sketches of random directions, as long as about half of the clip."""
    vectors = np.random.default_rng([seed, dimension]).normal(size=(count, dimension))
    return [quantised(vector / np.linalg.norm(vector), CLIP) for vector in vectors]


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Of the pool of 1,024 with 64 numbers, or the largest there is."""

    def of(way: str) -> list[Row]:
        return [row for row in rows if row["way"] == way]

    pools = [row for row in of("he") if row["dimension"] == 64]
    main = next((row for row in pools if row["experts"] == 1024), pools[-1])
    (dot,), (whole,), noised = of("ckks dot"), of("he round"), of("dp")
    values = {
        "he_ms_per_pair": float(str(main["ms_per_pair"])),
        "he_ratio_tenseal_dot": float(str(dot["ms_per_pair"])) / float(str(main["ms_per_pair"])),
        "he_upload_kb": float(str(main["bytes_up"])) / 1000,
        "he_answer_kb_per_64": float(str(main["bytes_down_per_64"])) / 1000,
        "he_id_agreement": min(float(str(row["id_agreement"])) for row in [*of("he"), *of("he recall")]),
        "he_recall_at_9": fmean(float(str(row["recall"])) for row in of("he recall")),
        "he_round_seconds_100x1000": float(str(whole["seconds"])),
        "dp_query_ms_100k": max(float(str(row["query_ms"])) for row in noised),
        "dp_recall_100k": min(float(str(row["recall"])) for row in noised),
    }
    return {name: Bar.of(value, *LIMITS[name]) for name, value in values.items()}


def _same_places(found: Sequence[int], expected: Sequence[int]) -> float:
    return fmean(one == other for one, other in zip(found, expected, strict=True))


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _say(words: str) -> None:
    click.echo(words, err=True)
