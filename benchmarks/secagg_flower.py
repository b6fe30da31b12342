"""A round through Flower's SecAgg+, for comparison. Run by an interpreter that has `flwr`; imports nothing of ours.

    python secagg_flower.py CLIENTS VALUES DROPPED SHARES THRESHOLD TIMED

prints one JSON object: CPU milliseconds and bytes. TIMED clients go through Flower's own functions for all four stages;
what they get from others has the right form and size. The server's last stage is done with Flower's primitives as
`SecAggPlusWorkflow.unmask_stage` does it, which needs a running grid: each of its parts is timed on the timed clients'
secrets, and counted as often as a whole cohort makes it necessary.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

# By name: one module is called like a function of its package, and type checkers need not have `flwr`.
mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
ndarrays_to_parameters = importlib.import_module("flwr.common").ndarrays_to_parameters
combine_shares = importlib.import_module("flwr.common.secure_aggregation.crypto.shamir").combine_shares

# The defaults of Flower's SecAggPlusWorkflow.
CLIPPING_RANGE, QUANTIZATION_RANGE, MODULUS_RANGE, MAX_WEIGHT = 8.0, 2**22, 2**32, 1000.0


def measure(clients: int, values: int, dropped: int, shares: int, threshold: int, timed: int) -> dict[str, float]:
    """Medians over the timed clients, and the server's cost for `dropped` of `clients` that left after sharing."""
    setup = {
        mod.Key.SAMPLE_NUMBER: clients,
        mod.Key.SHARE_NUMBER: shares,
        mod.Key.THRESHOLD: threshold,
        mod.Key.CLIPPING_RANGE: CLIPPING_RANGE,
        mod.Key.TARGET_RANGE: QUANTIZATION_RANGE,
        mod.Key.MOD_RANGE: MODULUS_RANGE,
        mod.Key.MAX_WEIGHT: MAX_WEIGHT,
    }
    states = [mod.SecAggPlusState(nid=node) for node in range(shares)]
    answers = [cpu(partial(mod._setup, state, setup)) for state in states]
    public = {
        str(state.nid): [keys[mod.Key.PUBLIC_KEY_1], keys[mod.Key.PUBLIC_KEY_2]]
        for state, (keys, _) in zip(states, answers, strict=True)
    }
    left = shares - round(dropped * (shares - 1) / clients)
    measured = [one_client(state, states, public, values, left) for state in states[:timed]]
    client_ms, up, down, vector = (median(column) for column in zip(*measured, strict=True))
    seed_ms = median(combination_ms(state.rd_seed, threshold, shares, left) for state in states[:timed])
    private_key_ms = median(combination_ms(state.sk1, threshold, shares, left) for state in states[:timed])
    server_ms = (clients - dropped) * (seed_ms + own_mask_ms(states[0], values))
    server_ms += dropped * (private_key_ms + (shares - 1) * pair_mask_ms(states, values))
    return {
        "client_ms": median(milliseconds for _, milliseconds in answers) + client_ms,
        "server_ms": server_ms,
        "bytes_up": up,
        "bytes_down": down,
        "expansion": vector / (4 * values),
    }


def one_client(
    state: Any, states: list[Any], public: dict[str, list[bytes]], values: int, left: int
) -> tuple[float, int, int, int]:
    """A client's last three stages: CPU milliseconds, bytes up and down, bytes of the masked vector."""
    dealt, share_ms = cpu(partial(mod._share_keys, state, public))
    inbox = inbox_of(state, states)
    update = ndarrays_to_parameters([np.random.default_rng(1).normal(0, 0.1, values).astype(np.float32)])
    masked, mask_ms = cpu(partial(mod._collect_masked_vectors, state, inbox, 500, update))
    nodes = [other.nid for other in states]
    request = {mod.Key.ACTIVE_NODE_ID_LIST: nodes[:left], mod.Key.DEAD_NODE_ID_LIST: nodes[left:]}
    given_out, unmask_ms = cpu(partial(mod._unmask, state, request))
    vector = sum(map(len, masked[mod.Key.MASKED_PARAMETERS]))
    sent = [*public[str(state.nid)], *dealt[mod.Key.CIPHERTEXT_LIST], *given_out[mod.Key.SHARE_LIST]]
    received = [key for pair in public.values() for key in pair] + inbox[mod.Key.CIPHERTEXT_LIST]
    return share_ms + mask_ms + unmask_ms, vector + sum(map(len, sent)), sum(map(len, received)), vector


def combination_ms(secret: bytes, threshold: int, shares: int, left: int) -> float:
    """The server's work to put one secret together: Flower takes all shares that arrived."""
    parts = mod.create_shares(secret, threshold, shares)
    found, milliseconds = cpu(partial(combine_shares, parts[:left]))
    if found != secret:
        raise RuntimeError("Flower's shares do not give the secret back")
    return milliseconds


def inbox_of(state: Any, states: list[Any]) -> dict[str, Any]:
    """What the others sealed for a client; the shares in it are random bytes in the lengths that Flower's have."""
    sizes = [len(shares[state.nid]) for shares in (state.rd_seed_share_dict, state.sk1_share_dict)]
    others = [other for other in states if other.nid != state.nid]
    sealed = []
    for other in others:
        key = mod.generate_shared_key(mod.bytes_to_private_key(other.sk2), mod.bytes_to_public_key(state.pk2))
        shares = (os.urandom(size) for size in sizes)
        sealed.append(mod.encrypt(key, mod.share_keys_plaintext_concat(other.nid, state.nid, *shares)))
    return {mod.Key.CIPHERTEXT_LIST: sealed, mod.Key.SOURCE_LIST: [other.nid for other in others]}


def own_mask_ms(state: Any, values: int) -> float:
    """The server's work to take one survivor's own mask away, its secret being known."""
    total = [np.zeros((), np.int64), np.zeros(values, np.int64)]
    shapes = [array.shape for array in total]
    return median(
        cpu(lambda: mod.parameters_subtraction(total, mod.pseudo_rand_gen(state.rd_seed, MODULUS_RANGE, shapes)))[1]
        for _ in range(20)
    )


def pair_mask_ms(states: list[Any], values: int) -> float:
    """The server's work to take one mask between a dropped client and a neighbour away."""
    total = [np.zeros((), np.int64), np.zeros(values, np.int64)]
    shapes = [array.shape for array in total]

    def remove() -> None:
        key = mod.generate_shared_key(mod.bytes_to_private_key(states[0].sk1), mod.bytes_to_public_key(states[1].pk1))
        mod.parameters_subtraction(total, mod.pseudo_rand_gen(key, MODULUS_RANGE, shapes))

    return median(cpu(remove)[1] for _ in range(20))


def cpu(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the CPU milliseconds that it took on all threads."""
    started = time.process_time()
    value = function()
    return value, 1000 * (time.process_time() - started)


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
