"""The same sum under homomorphic encryption (CKKS by TenSEAL), for comparison: CPU and bytes.

All clients hold the secret key and the server has only ciphertexts. No drop-out costs anything, but any one client that
colludes with the server opens every single input: what secure aggregation is there to prevent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

import numpy as np
import tenseal as ts
from numpy.typing import NDArray

from pfedsecure.secagg import Update

from .secagg_round import Cost, cpu

RING_DEGREE = 8192
PRIME_BITS = (50, 40, 50)
"""Coefficient modulus for sums; 140 of the 218 bits that 128-bit security allows at this degree."""
SCALE = 2.0**40


def measure(updates: Sequence[Update], timed: int) -> tuple[Cost, float, float]:
    """Median cost of a client, the server's CPU milliseconds for all, and the largest error of the sum.

    Only `timed` clients encrypt; the server adds theirs again and again, as often as there are clients.
    """
    context = ts.context(ts.SCHEME_TYPE.CKKS, RING_DEGREE, coeff_mod_bit_sizes=list(PRIME_BITS))
    context.global_scale = SCALE
    public = ts.context_from(context.serialize(save_secret_key=False))
    weighted = [update.values.astype(np.float64) * update.weight for update in updates[:timed]]
    encrypted = [cpu(partial(_encrypted, context, values)) for values in weighted]
    exact = np.zeros(len(weighted[0]))
    totals: list[ts.CKKSVector] = []
    server_ms = 0.0
    for number in range(len(updates)):
        totals, milliseconds = cpu(partial(_added, public, totals, encrypted[number % timed][0]))
        server_ms += milliseconds
        exact += weighted[number % timed]
    answer = [total.serialize() for total in totals]
    opened, opening_ms = cpu(lambda: np.concatenate([_opened(context, data) for data in answer]))
    cost = Cost(
        milliseconds=median(milliseconds for _, milliseconds in encrypted) + opening_ms,
        sent=sum(map(len, encrypted[0][0])),
        received=sum(map(len, answer)),
    )
    return cost, server_ms, float(np.abs(opened - exact).max())


def _encrypted(context: ts.Context, values: NDArray[np.float64]) -> list[bytes]:
    slots = RING_DEGREE // 2
    return [ts.ckks_vector(context, values[i : i + slots]).serialize() for i in range(0, len(values), slots)]


def _added(public: ts.Context, totals: list[ts.CKKSVector], message: list[bytes]) -> list[ts.CKKSVector]:
    parts = [ts.ckks_vector_from(public, data) for data in message]
    return [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts


def _opened(context: ts.Context, data: bytes) -> NDArray[np.float64]:
    return np.array(ts.ckks_vector_from(context, data).decrypt())
