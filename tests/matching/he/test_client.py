"""The client's side: what is made once is sent again after a crash, and noise below the encryption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pfedsecure.matching.he.client import HeClientMatching
from pfedsecure.matching.he.parameters import LARGEST
from pfedsecure.matching.he.server import HeServerMatching
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.release import Release
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.privacy.events import GaussianRelease

M = 64
SHAPE = (4, 32)
ONE = CohortSecrets.of({1: b"\x01" * 32})
BOTH = CohortSecrets.of({1: b"\x01" * 32, 2: b"\x02" * 32})


def context_of(seed: int, norm: float = 1.0) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=SHAPE)
    return (made * (norm / np.linalg.norm(made))).astype(np.float32)


def client_with(kept: Any, secrets: CohortSecrets = ONE, release: Release | None = None) -> HeClientMatching:
    return HeClientMatching(Sketcher(np.zeros(SHAPE, np.float32), M, 2.0, 7), lambda: secrets, kept, release)


def test_after_a_crash_the_same_bytes_are_sent(new_kept: Any) -> None:
    kept = new_kept()
    first = client_with(kept)
    sketch, query = first.sketch(context_of(1), 3), first.query(context_of(1), 3, 4)
    again = client_with(kept)
    assert again.sketch(context_of(1), 3) == sketch
    assert again.query(context_of(1), 3, 4) == query
    assert again.query(context_of(1), 3, 5) != query  # another round, another ciphertext
    assert client_with(new_kept()).sketch(context_of(1), 3) != sketch


@pytest.mark.parametrize("change", ["round", "context", "epoch"])
def test_what_was_kept_is_never_sent_for_something_else(new_kept: Any, change: str) -> None:
    kept = new_kept()
    sketch = client_with(kept).sketch(context_of(1), 3)
    secrets = BOTH if change == "epoch" else ONE
    context = context_of(2) if change == "context" else context_of(1)
    assert client_with(kept, secrets).sketch(context, 4 if change == "round" else 3) != sketch


def test_a_newer_kit_is_taken_up_while_the_client_runs(new_kept: Any) -> None:
    secrets = [ONE]
    client = HeClientMatching(Sketcher(np.zeros(SHAPE, np.float32), M, 2.0, 7), lambda: secrets[0], new_kept(), None)
    assert client.epoch == 1
    before = client.sketch(context_of(1), 1)
    secrets[0] = BOTH
    assert client.epoch == 2
    assert client.sketch(context_of(1), 1) != before


def test_noise_below_the_encryption(new_kept: Any, executor: Any, keys_of: Any) -> None:
    """Recorded as an event, the same for sketch and query of a round; what server and client together could open."""
    events: list[GaussianRelease] = []
    kept = new_kept()
    noisy = client_with(kept, release=Release(8.0, 1e-5, kept, events.append))
    numbers = noisy._numbers(context_of(1), 2)
    np.testing.assert_array_equal(noisy._numbers(context_of(1), 2), numbers)
    assert [(event.what, event.round) for event in events] == [("released sketch", 2)]
    assert int(numbers @ numbers) <= LARGEST**2
    exact = client_with(new_kept())._numbers(context_of(1), 2)
    cosine = numbers @ exact / np.linalg.norm(numbers) / np.linalg.norm(exact)
    assert abs(cosine) < 0.5  # at epsilon 8 hardly anything is left of a sketch
    # The public start gets none, and events no entry.
    noisy._numbers(np.zeros(SHAPE, np.float32), 0)
    assert len(events) == 1

    server = HeServerMatching(M, executor)
    server.install(1, keys_of(M))
    other_kept = new_kept()
    other = client_with(other_kept, release=Release(8.0, 1e-5, other_kept, events.append))
    pool = [PoolEntry("other", "id-other", other.sketch(context_of(5), 2), b"d")]
    query = noisy.query(context_of(1), 2, 3)
    (candidate,) = noisy.rank(server.index(pool).answer(query, 1, "asker", 3), 1)
    assert candidate.distance == float(((numbers - other._numbers(context_of(5), 2)) ** 2).sum())
    noisy.check(candidate, context_of(6))  # cannot be checked, as the other's noise is not known
    server.close()
