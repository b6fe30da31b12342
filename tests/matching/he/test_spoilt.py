"""Members that spoil matching for others, with uploads or with keys: who gets wrong answers says so, and it ends."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.he import pool as pools
from pfedsecure.matching.he.client import HeClientMatching
from pfedsecure.matching.he.encryption import BODY_BYTES, SEED_BYTES, quantised
from pfedsecure.matching.he.parameters import Layout
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.matching.he.server import HeServerMatching
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.wire.v1.matching_pb2 import EncryptedAnswer, EncryptedSketch

M = 1000  # blocks of eight
SHAPE = (4, 32)
SKETCHER = Sketcher(np.zeros(SHAPE, np.float32), M, 2.0, 7)
ONE = CohortSecrets.of({1: b"\x01" * 32})
OTHER = CohortSecrets.of({1: b"\x09" * 32})
HONEST = [f"c{number}" for number in range(7)]


class Cohort:
    """Members that publish once and ask in every round, and a server."""

    def __init__(self, new_kept: Any, executor: Executor, keys: bytes, names: list[str]) -> None:
        self.server = HeServerMatching(M, executor)
        self.server.install(1, keys)
        self.names = names
        self.clients = {name: HeClientMatching(SKETCHER, lambda: ONE, new_kept(), None) for name in names}
        self.entries = {name: self.entry(name, self.clients[name].sketch(self.context(name), 1)) for name in names}
        self.liars: set[str] = set()
        self.index: Any = None
        self.round = 1

    @staticmethod
    def entry(name: str, sketch: bytes) -> PoolEntry:
        return PoolEntry(name, f"id-{name}", sketch, sketch[-32:])

    @staticmethod
    def context(name: str) -> np.ndarray:
        return (0.1 * np.random.default_rng(int(name[1:])).normal(size=SHAPE)).astype(np.float32)

    def distance(self, one: str, other: str) -> float:
        first, second = (quantised(SKETCHER.sketch(self.context(name)), 2.0) for name in (one, other))
        return float(((first - second) ** 2).sum())

    def play(self) -> dict[str, dict[str, float]]:
        """One round: what each member is told of the others, as far as it believes it."""
        self.round += 1
        self.index = self.server.index(list(self.entries.values()))
        found = {}
        for name, client in self.clients.items():
            query = client.query(self.context(name), 1, self.round)
            if self.index.lacks_setup(query):
                continue
            ranked = client.rank(self.index.answer(query, 99, name, self.round), 99)
            assert f"id-{name}" not in [candidate.expert_id for candidate in ranked]
            found[name] = {c.expert_id.removeprefix("id-"): c.distance for c in ranked if c.distance is not None}
            if client.spoilt or name in self.liars:
                self.index.complain(name)
        return found

    def right(self, name: str, among: list[str]) -> dict[str, float]:
        return {other: self.distance(name, other) for other in among if other != name}


@pytest.fixture
def cohort(new_kept: Any, executor: Executor, keys_of: Any) -> Any:
    made = []

    def make(names: list[str], keys: bytes | None = None) -> Cohort:
        made.append(Cohort(new_kept, executor, keys or keys_of(M), names))
        return made[-1]

    yield make
    for one in made:
        one.server.close()


def noise_upload() -> bytes:
    """Of the right form, and an encryption of nothing."""
    body = np.frombuffer(os.urandom(BODY_BYTES), np.uint8).copy()
    body.reshape(-1, 15)[:, [6, 14]] = 0  # every number below its prime
    return EncryptedSketch(epoch=1, seed=os.urandom(SEED_BYTES), body=body.tobytes()).SerializeToString()


def test_in_peace_everybody_is_told_right_and_nobody_complains(cohort: Any) -> None:
    peaceful = cohort([*HONEST, "c7", "c8"])
    for _ in range(2):
        assert peaceful.play() == {name: peaceful.right(name, peaceful.names) for name in peaceful.names}
        assert not peaceful.index.complaining


@pytest.mark.slow
def test_who_uploads_what_is_no_encryption_ends_up_alone_with_it(cohort: Any) -> None:
    harmed = cohort([*HONEST, "c7"])
    harmed.entries["c7"] = Cohort.entry("c7", noise_upload())
    first = harmed.play()
    assert all(first[name] == {} for name in HONEST)  # its block is of no use, and all notice
    harmed.play()
    found = harmed.play()
    for name in HONEST:
        told = {other: distance for other, distance in found[name].items() if other != "c7"}
        assert told == harmed.right(name, HONEST)
    # And it stays so, at no more cost, also when it goes on with other noise.
    before = len(harmed.index._parts[1].blocks)
    harmed.entries["c7"] = Cohort.entry("c7", noise_upload())
    found = harmed.play()
    assert all(found[name].keys() >= set(HONEST) - {name} for name in HONEST)
    assert len(harmed.index._parts[1].blocks) == before <= 8


def test_without_splitting_it_spoils_every_round(cohort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protection taken out."""
    monkeypatch.setattr(pools, "_MOST_SPLITS", 0)
    harmed = cohort([*HONEST, "c7"])
    harmed.entries["c7"] = Cohort.entry("c7", noise_upload())
    for _ in range(4):
        found = harmed.play()
        assert all(found[name] == {} for name in HONEST)


def test_keys_of_another_secret_are_found_out_and_let_go(cohort: Any, keys_of: Any) -> None:
    wrong = SecretKey(OTHER, 1).evaluation_keys(Layout(M))
    harmed = cohort(HONEST, wrong)
    assert all(found == {} for found in harmed.play().values())
    assert not harmed.index.distrusted
    harmed.play()  # split, and still spoilt everywhere
    assert harmed.play() == {}
    assert harmed.index.distrusted == [1]
    harmed.server.install(1, keys_of(M))
    found = harmed.play()
    assert not harmed.index.distrusted
    assert found == {name: harmed.right(name, HONEST) for name in HONEST}


@pytest.mark.slow
def test_liars_change_what_it_costs_and_nothing_else(cohort: Any) -> None:
    calm = cohort([*HONEST, "c7", "c8"])
    calm.liars = {"c0", "c1"}
    for _ in range(6):
        assert calm.play() == {name: calm.right(name, calm.names) for name in calm.names}
        assert not calm.index.distrusted
    assert len(calm.index._parts[1].blocks) <= len(calm.names)


def test_only_who_had_an_answer_may_complain(cohort: Any) -> None:
    calm = cohort(HONEST)
    index = calm.server.index(list(calm.entries.values()))
    with pytest.raises(MessageRejected, match="has had no answer"):
        index.complain("c0")


def test_an_older_sketch_in_the_pool_is_nothing_to_complain_of(cohort: Any) -> None:
    calm = cohort(HONEST)
    newer = 2 * Cohort.context("c0")
    calm.clients["c0"].sketch(newer, 2)  # of a round that was abandoned: the pool has the one before
    query = calm.clients["c0"].query(newer, 2, 3)
    index = calm.server.index(list(calm.entries.values()))
    calm.clients["c0"].rank(index.answer(query, 9, "c0", 3), 9)
    assert not calm.clients["c0"].spoilt


@pytest.mark.parametrize("own", [{"block": 7}, {"lane": 8}])
def test_an_answer_that_names_a_place_that_is_none_is_refused(cohort: Any, own: dict[str, int]) -> None:
    calm = cohort(HONEST)
    query = calm.clients["c0"].query(Cohort.context("c0"), 1, 2)
    answer = EncryptedAnswer.FromString(calm.server.index(list(calm.entries.values())).answer(query, 9, "c0", 2))
    answer.own.MergeFrom(EncryptedAnswer.Own(**own))
    with pytest.raises(MessageRejected, match="not of the form"):
        calm.clients["c0"].rank(answer.SerializeToString(), 9)
