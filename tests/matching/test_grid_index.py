"""The index against a sort over all exact distances, after any history of pools."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate, read_candidates
from pfedsecure.matching.dp import write_sketch
from pfedsecure.matching.grid_index import GridIndex
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.plain import read_sketch

DIMENSION = 4


def new_index(dimension: int = DIMENSION) -> GridIndex:
    return GridIndex(dimension, lambda sketch: read_sketch(sketch, dimension))


def entry(owner: int, vector: list[int]) -> PoolEntry:
    return PoolEntry(f"client-{owner:03d}", f"id-{owner}-{sum(vector)}", write_sketch(np.array(vector)), b"")


def ask(index: GridIndex, query: list[int], k: int, asker: str) -> list[Candidate]:
    return read_candidates(index.answer(write_sketch(np.array(query)), k, asker, 1))


def by_hand(pool: dict[int, list[int]], query: list[int], k: int, asker: int) -> list[Candidate]:
    others = sorted(
        (sum((a - b) ** 2 for a, b in zip(vector, query, strict=True)), owner)
        for owner, vector in pool.items()
        if owner != asker
    )
    return [Candidate(entry(owner, pool[owner]).expert_id, squared**0.5) for squared, owner in others[:k]]


coarse = st.lists(st.integers(-1, 1), min_size=DIMENSION, max_size=DIMENSION)  # many ties
# Near 2**24 float32 rounds distances: such vectors are told apart by whole numbers alone.
huge = st.lists(st.integers(2**24 - 4, 2**24 - 1), min_size=DIMENSION, max_size=DIMENSION)
pools = st.lists(st.dictionaries(st.integers(0, 40), coarse | huge, max_size=40), min_size=1, max_size=4)


@given(history=pools, query=coarse | huge, k=st.integers(0, 12), asker=st.integers(0, 41))
def test_after_any_history_it_answers_like_a_sort_over_the_last_pool(
    history: list[dict[int, list[int]]], query: list[int], k: int, asker: int
) -> None:
    index = new_index()
    for pool in history:
        index.update([entry(owner, vector) for owner, vector in pool.items()])
        assert ask(index, query, k, f"client-{asker:03d}") == by_hand(pool, query, k, asker)
    rebuilt = new_index()
    rebuilt.update([entry(owner, vector) for owner, vector in reversed(history[-1].items())])
    sketch = write_sketch(np.array(query))
    assert rebuilt.answer(sketch, k, "nobody", 1) == index.answer(sketch, k, "nobody", 1)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_large_pools_that_change_a_little(seed: int) -> None:
    generator = np.random.default_rng(seed)
    index, pool = new_index(), {}
    for _ in range(4):
        gone = generator.choice(sorted(pool), size=len(pool) // 5, replace=False).tolist() if pool else []
        pool = {owner: vector for owner, vector in pool.items() if owner not in gone}
        changed = generator.integers(0, 400, size=150).tolist()
        pool |= {owner: generator.integers(-3, 4, size=DIMENSION).tolist() for owner in changed}
        index.update([entry(owner, vector) for owner, vector in pool.items()])
        query = generator.integers(-3, 4, size=DIMENSION).tolist()
        assert ask(index, query, 9, "client-003") == by_hand(pool, query, 9, 3)


def test_only_equal_sketches_are_in_the_order_of_names() -> None:
    index = new_index()
    index.update([entry(owner, [7, 7, 7, 7]) for owner in reversed(range(300))])
    found = ask(index, [0, 0, 0, 0], 5, "client-002")
    assert [candidate.expert_id for candidate in found] == [f"id-{owner}-28" for owner in (0, 1, 3, 4, 5)]
    assert {candidate.distance for candidate in found} == {14.0}


def test_an_update_with_a_bad_sketch_changes_nothing() -> None:
    index = new_index()
    index.update([entry(1, [1, 0, 0, 0])])
    short = PoolEntry("client-003", "id-3", write_sketch(np.zeros(3, np.int64)), b"")
    with pytest.raises(MessageRejected, match="expected"):
        index.update([entry(2, [0, 0, 0, 0]), short])
    assert [found.expert_id for found in ask(index, [0, 0, 0, 0], 3, "nobody")] == ["id-1-1"]


def test_a_hundred_thousand_experts_are_searched_in_milliseconds() -> None:
    """1.0 ms of CPU on the machine that docs/matching.md names; the limit is for slow ones under load."""
    generator = np.random.default_rng(0)
    index = new_index(64)
    # Put in directly: reading so many messages takes longer than the whole test should.
    index._vectors = np.rint(generator.normal(0, 10_000, size=(100_000, 64))).astype(np.float32)
    index._entries = [PoolEntry(f"client-{row}", f"id-{row}", b"", b"") for row in range(100_000)]
    queries = [write_sketch(index._vectors[row].astype(np.int64)) for row in range(20)]
    started = time.process_time()
    answers = [index.answer(query, 9, "nobody", 1) for query in queries]
    seconds = (time.process_time() - started) / len(queries)
    assert [read_candidates(answer)[0] for answer in answers] == [Candidate(f"id-{row}", 0.0) for row in range(20)]
    assert seconds < 0.02
