"""Nearest experts against a sort over all distances in float64, and experts by lot."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate
from pfedsecure.matching.factory import server_matching
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.lot import LotClientMatching
from pfedsecure.matching.plain import PlainClientMatching, PlainServerMatching
from pfedsecure.plan import Plan, ProtectionPlan
from pfedsecure.wire.v1.payload_pb2 import PlainMatchAnswer, PlainSketch

SHAPE = (2, 3)
CLIENT = PlainClientMatching()


def name(row: int) -> str:
    return f"client-{row:02d}"


def pool_of(contexts: np.ndarray) -> list[PoolEntry]:
    contexts = contexts.astype(np.float32)
    return [PoolEntry(name(row), f"id-{row}", CLIENT.sketch(context, 1), b"") for row, context in enumerate(contexts)]


def ask(pool: list[PoolEntry], context: np.ndarray, k: int, asker: str = "nobody") -> list[tuple[str, float]]:
    index = PlainServerMatching(SHAPE, math.inf).index(pool)
    answer = PlainMatchAnswer.FromString(index.answer(CLIENT.query(context.astype(np.float32), 1, 2), k, asker, 1))
    return [(candidate.expert_id, candidate.distance) for candidate in answer.candidates]


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 30), k=st.integers(1, 12), asker=st.integers(0, 29))
def test_the_answer_is_the_k_nearest_others_best_first(seed: int, size: int, k: int, asker: int) -> None:
    contexts = np.random.default_rng(seed).normal(size=(size, *SHAPE)).astype(np.float32)
    query = contexts[asker % size]
    distances = {}  # of all others, one after the other
    for row, context in enumerate(contexts.astype(np.float64)):
        if row != asker:
            distances[f"id-{row}"] = float(np.sqrt(((context - query) ** 2).sum()))
    answer = ask(pool_of(contexts), query, k, asker=name(asker))
    found = [distance for _, distance in answer]
    np.testing.assert_allclose(found, sorted(distances.values())[:k], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, [distances[expert_id] for expert_id, _ in answer], rtol=1e-5, atol=1e-6)
    assert len({expert_id for expert_id, _ in answer}) == len(answer)


@given(st.permutations(range(8)), st.integers(1, 8), st.booleans())
def test_equal_distances_do_not_depend_on_the_order_of_arrival(order: list[int], k: int, takes_part: bool) -> None:
    contexts = np.zeros((8, *SHAPE))
    contexts[4:] = 1.0  # two groups, four times the same prompt in each
    pool = pool_of(contexts)
    asker = name(2) if takes_part else "nobody"
    straight = ask(pool, contexts[0], k, asker)
    assert ask([pool[row] for row in order], contexts[0], k, asker) == straight
    assert [distance for _, distance in straight] == sorted(distance for _, distance in straight)
    assert "id-2" not in [expert_id for expert_id, _ in straight] or not takes_part
    assert len(straight) == min(k, 8 - takes_part)


@pytest.mark.parametrize("k", [1, 5])
def test_an_empty_pool_and_a_pool_of_oneself_offer_nobody(k: int) -> None:
    context = np.ones((1, *SHAPE))
    assert ask([], context[0], k) == []
    assert ask(pool_of(context), context[0], k, asker=name(0)) == []


def test_a_query_for_none_gets_none() -> None:
    context = np.ones((2, *SHAPE))
    assert ask(pool_of(context), context[0], 0) == []


def test_the_answer_names_no_author() -> None:
    contexts = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    answer = (
        PlainServerMatching(SHAPE, math.inf)
        .index(pool_of(contexts))
        .answer(CLIENT.query(contexts[0], 1, 2), 5, name(0), 1)
    )
    assert b"client" not in answer


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (b"\xff", "the sketch is not a PlainSketch"),
        (b"", r"the sketch has shape \(\), expected \(6,\)"),
        (CLIENT.sketch(np.ones((2, 2), np.float32), 1), r"the sketch has shape \(4,\), expected \(6,\)"),
        (CLIENT.sketch(np.full(SHAPE, np.nan, np.float32), 1), "the sketch holds numbers that are not finite"),
        (CLIENT.sketch(np.full(SHAPE, 3e38, np.float32), 1), r"the sketch has norm 7\.35e\+38, over the plan's"),
        (CLIENT.sketch(np.full(SHAPE, 41, np.float32), 1), r"the sketch has norm 100, over the plan's"),
    ],
)
def test_a_sketch_that_cannot_be_used_is_refused(sketch: bytes, message: str) -> None:
    with pytest.raises(MessageRejected, match=message):
        server_matching(plan_of("plain"), SHAPE).check_sketch(sketch, 0)


def test_by_lot_nothing_is_published_and_nothing_taken() -> None:
    client, server = LotClientMatching(), server_matching(plan_of("random"), SHAPE)
    context = np.ones(SHAPE, np.float32)
    assert (client.sketch(context, 1), client.query(context, 1, 2)) == (b"", b"")
    server.check_sketch(b"", 0)
    sketch = CLIENT.sketch(context, 1)
    with pytest.raises(MessageRejected, match="experts are drawn by lot"):
        server.check_sketch(sketch, 0)
    with pytest.raises(MessageRejected, match="experts are drawn by lot"):
        server.index([]).answer(sketch, 1, "nobody", 1)


def test_a_huge_sketch_in_the_pool_is_never_offered() -> None:
    """Its distance is no finite number; FAISS then answers with row -1, which must not become the last of the pool."""
    contexts = np.ones((4, *SHAPE), np.float32) * np.arange(4, dtype=np.float32)[:, None, None]
    contexts[2] = 3e38
    index = PlainServerMatching(SHAPE, math.inf).index(pool_of(contexts))
    answer = PlainMatchAnswer.FromString(index.answer(CLIENT.query(contexts[0], 1, 2), 3, name(0), 1))
    offered = [candidate.expert_id for candidate in answer.candidates]
    assert len(offered) == len(set(offered)) == 2
    assert all(np.isfinite(candidate.distance) for candidate in answer.candidates)


def test_a_query_is_checked_like_a_sketch() -> None:
    index = PlainServerMatching(SHAPE, math.inf).index(pool_of(np.ones((2, *SHAPE))))
    with pytest.raises(MessageRejected, match="expected"):
        index.answer(PlainSketch().SerializeToString(), 1, "nobody", 1)


def test_the_client_takes_the_first_k_of_an_answer() -> None:
    answer = PlainMatchAnswer()
    for expert_id in "abc":
        answer.candidates.add(expert_id=expert_id)
    data = answer.SerializeToString()
    assert CLIENT.rank(data, 2) == [Candidate("a", None), Candidate("b", None)]
    assert [candidate.expert_id for candidate in CLIENT.rank(data, 9)] == ["a", "b", "c"]
    with pytest.raises(MessageRejected, match="not a PlainMatchAnswer"):
        CLIENT.rank(b"\xff", 1)


def plan_of(matching: str, seed: int = 1) -> Plan:
    return Plan(class_names=("cat", "dog"), seed=seed, protection=ProtectionPlan(matching=matching))  # type: ignore[arg-type]


def draw(pool: list[PoolEntry], k: int, asker: int, number: int, seed: int = 1) -> list[str]:
    client, server = LotClientMatching(), server_matching(plan_of("random", seed), SHAPE)
    ranked = client.rank(server.index(pool).answer(b"", k, name(asker), number), k)
    return [candidate.expert_id for candidate in ranked]


def pool_by_lot(size: int) -> list[PoolEntry]:
    return [PoolEntry(name(row), f"id-{row}", b"", b"") for row in range(size)]


def test_lots_are_fair_and_never_ones_own() -> None:
    pool = pool_by_lot(5)
    draws = [draw(pool, 2, asker=0, number=number) for number in range(1, 1001)]
    assert all(len(set(drawn)) == 2 for drawn in draws)
    times = Counter(expert_id for drawn in draws for expert_id in drawn)
    assert set(times) == {"id-1", "id-2", "id-3", "id-4"}
    # Each is drawn with probability 1/2: 500 times of 1000, standard deviation 15.8.
    assert all(count == pytest.approx(500, abs=80) for count in times.values())


def test_lots_repeat_with_their_seed_and_differ_without() -> None:
    pool = pool_by_lot(30)
    drawn = draw(pool, 9, asker=0, number=1)
    assert drawn == draw(pool[::-1], 9, asker=0, number=1)
    assert drawn != draw(pool, 9, asker=0, number=2)
    assert drawn != draw(pool, 9, asker=1, number=1)
    assert drawn != draw(pool, 9, asker=0, number=1, seed=2)
    assert len(draw(pool, 99, asker=0, number=1)) == 29


def test_lots_have_no_distance() -> None:
    answer = server_matching(plan_of("random"), SHAPE).index(pool_by_lot(3)).answer(b"", 2, name(0), 1)
    candidates = PlainMatchAnswer.FromString(answer).candidates
    assert len(candidates) == 2
    assert not any(candidate.HasField("distance") for candidate in candidates)


def test_neither_way_needs_torch() -> None:
    code = (
        "import sys, pfedsecure.matching.factory, pfedsecure.aggregation.factory\n"
        "print({'torch', 'open_clip', 'pfed_server', 'pfed_client'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
