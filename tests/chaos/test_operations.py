"""Random sequences of faults against the real server and clients; and that what looks for errors finds planted ones."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from pfed_benchmarks.chaos.cast import MEMBERS, PRIVATE, Kind
from pfed_benchmarks.chaos.machine import Operations
from pfed_benchmarks.chaos.world import Violation, World
from pfed_benchmarks.operations import sequences_row
from sqlalchemy import update

from pfed_client.privacy import Privacy
from pfed_server import sql_store
from pfed_server.aggregating import Aggregating
from pfed_server.schema import PartRow
from pfed_server.sql_store import SqlStore
from pfedsecure.aggregation.interface import Aggregate
from pfedsecure.aggregation.plain import PlainServerRound
from pfedsecure.errors import NameTaken
from pfedsecure.wire.v1 import federation_pb2 as fed

EXAMPLES = settings(stateful_step_count=20, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture(params=["plain", "secure"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made = World(request.param, tmp_path, seed=1)
    yield made
    made.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[World]:
    made = World("plain", tmp_path, seed=1)
    yield made
    made.close()


@pytest.mark.slow
def test_some_sequences() -> None:
    run_state_machine_as_test(Operations, settings=settings(EXAMPLES, max_examples=3, derandomize=True, database=None))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sequences_that_hypothesis_makes() -> None:
    """Others in every run."""
    run_state_machine_as_test(Operations, settings=settings(EXAMPLES, max_examples=100))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_sequences() -> None:
    """Others in every run; `pfed bench operations --long` runs more."""
    count = int(os.environ.get("PFED_SEQUENCES", "1000"))
    row = sequences_row(count, secrets.randbelow(10**9), workers=os.cpu_count() or 1)
    assert (row["problem"], row["good"]) == (None, count)


def test_without_faults_all_rounds_are_closed(world: World) -> None:
    world.end()
    assert (world.watch.closed, world.watch.abandoned) == ({1, 2, 3}, set())
    assert {name: member.trainer.trained[-1] for name, member in world.members.items()} == dict.fromkeys(MEMBERS, 3)


@pytest.mark.slow
def test_the_same_seed_is_the_same_world(tmp_path: Path) -> None:
    """To the last moment: otherwise no sequence could be shrunk."""
    times = []
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        world = World("secure", tmp_path / place, seed=7)
        world.members["ben"].network.plan("answer lost", 3)
        world.members["cleo"].network.plan("comes again late", 2)
        world.start_server()
        for name in MEMBERS:
            world.start(name)
        world.run(3)
        world.kill_server()
        world.run(3)
        world.end()
        times.append((world.loop.time(), [member.trainer.trained for member in world.members.values()]))
        world.close()
    assert times[0] == times[1]


@pytest.mark.slow
def test_a_server_that_dies_in_any_transaction_goes_on(world: World) -> None:
    """In every one of the first forty, before or after it is committed: each restart goes on where the store is."""
    world.start_server()
    for name in MEMBERS:
        world.start(name)
    for place in range(40):
        if world.server is not None:
            world.server.store.plan("killed before" if place % 2 else "killed after", 1)
        world.run(20)
        world.start_server()
        world.check()
    world.end()


def test_a_network_that_fails_in_every_way(world: World) -> None:
    world.start_server()
    for name in MEMBERS:
        network = world.members[name].network
        for after in range(3):
            for fault in ("sent twice", "answer lost", "cut short", "old one again", "comes again late"):
                network.plan(fault, after)
        world.start(name)
    world.run(600)
    world.check()
    world.end()


def test_a_second_process_is_kept_out_while_the_first_lives(plain: World) -> None:
    plain.start_server()
    for name in MEMBERS:
        plain.start(name)
    plain.run(2)
    assert plain.server is not None
    with pytest.raises(NameTaken):
        plain.loop.run_until_complete(
            plain.server.coordinator.join(plain.cast.peers["ben"], _join_request(plain, "another"))
        )


def _join_request(world: World, instance_id: str) -> Any:
    return fed.JoinRequest(plan_digest=world.plan.digest(), instance_id=instance_id)


def sums(monkeypatch: pytest.MonkeyPatch, choose: Callable[[list[bytes]], list[bytes]]) -> None:
    """The server adds up `choose` of the messages that arrived."""

    def result(self: Any) -> Aggregate:
        read = [self._read(message) for message in choose([message for _, message in sorted(self._stored[1].items())])]
        total = sum(weight for _, weight in read)
        return Aggregate((sum(weighted for weighted, _ in read) / total).astype(np.float32), total)

    monkeypatch.setattr(PlainServerRound, "result", result)


def counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sums(monkeypatch, lambda messages: [*messages, messages[0]])


def lost_after_the_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    sums(monkeypatch, lambda messages: messages[1:])


def published_before_the_round_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = SqlStore.record_publications

    def record_publications(self: SqlStore, number: int, *args: Any) -> Any:
        inner(self, number, *args)
        with self._transaction() as session:
            sql_store.reveal_experts(session, number)
        return self.load()

    monkeypatch.setattr(SqlStore, "record_publications", record_publications)


def spoilt_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = sql_store.reveal_experts

    def reveal(session: Any, number: int) -> None:
        session.execute(update(PartRow).where(PartRow.expert.is_not(None)).values(expert=b"nothing"))
        inner(session, number)

    monkeypatch.setattr(sql_store, "reveal_experts", reveal)


def state_behind_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SqlStore, "_have_parts", lambda self, change, changed: self._newest)


def noise_that_nobody_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reserve(self: Privacy, _round_number: int, _countersigner: object) -> Any:
        return SimpleNamespace(commit=lambda: None)

    monkeypatch.setattr(Privacy, "reserve", reserve)


def messages_that_nobody_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Aggregating, "_check", lambda self, open_round, uploads: {})


def look_every_moment(world: World, seconds: float) -> None:
    for _ in range(int(5 * seconds)):
        world.run(0.2)
        world.check()


PLANTED: dict[Callable[[pytest.MonkeyPatch], None], tuple[Kind, str]] = {
    counted_twice: ("plain", "is not the mean of"),
    lost_after_the_receipt: ("plain", "receipts went to"),
    published_before_the_round_is_closed: ("plain", "which is not closed"),
    spoilt_in_the_pool: ("secure", "cannot open the expert of"),
    state_behind_the_store: ("secure", "the server goes by"),
    noise_that_nobody_pays_for: ("plain", f"{PRIVATE} trained 1 times and paid for 0"),
    messages_that_nobody_checks: ("secure", "was taken, cut short"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_is_planted_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind, says = PLANTED[plant]
    plant(monkeypatch)
    world = World(kind, tmp_path, seed=1)
    try:
        world.start_server()
        for name in MEMBERS:
            for _ in range(20):
                world.members[name].network.plan("cut short", 1)
            world.start(name)
        with pytest.raises(Violation, match=says):
            look_every_moment(world, 60)
    finally:
        world.close()
