"""Two servers on one PostgreSQL: what one does the other knows, and nothing happens twice, or half, or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from pfed_server import sql_store
from pfed_server.aggregating import Aggregating
from pfed_server.clock import SystemClock
from pfed_server.coordinator import Coordinator
from pfed_server.postgres import parse_location
from pfed_server.reading import count_change
from pfed_server.replicas import Looks
from pfed_server.rounds import Transition
from pfed_server.shared_store import PostgresStore
from pfed_server.store import OpenRound, Part, StateOvertaken
from pfedsecure.errors import MessageRejected, NameTaken
from pfedsecure.matching.plain import PlainServerMatching
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
NAMES = ("anna", "bert", "cleo")
CALLS = ("view", "submit", "publish", "nearest", "experts", "global_prompt")
PATIENT = {"start_clients": 3, "experts": 0, "heartbeat_seconds": 60}
"""Nobody is taken for gone when the clock is put forward to a deadline."""
WEIGHTS = {"anna": 1, "bert": 2, "cleo": 4}
"""Which of them are in a mean shows in it."""


def context(name: str, number: int) -> np.ndarray:
    return np.random.default_rng([NAMES.index(name), number]).normal(0, 0.02, SHAPE).astype(np.float32)


def mean(number: int, *names: str) -> np.ndarray:
    contexts = [context(name, number).astype(np.float64) for name in names]
    return np.average(contexts, axis=0, weights=[WEIGHTS[name] for name in names])


@pytest.fixture
def connected(database_url: str, tmp_path: Path) -> Callable[[Plan], Any]:
    """`with connected(plan) as store`: each time another server's store, on the one database."""
    numbers = count()

    @contextmanager
    def connect(plan: Plan) -> Iterator[PostgresStore]:
        folder = tmp_path / f"server-{next(numbers)}"
        with closing(PostgresStore.connect(parse_location(database_url), folder, plan)) as store:
            yield store

    return connect


@pytest.fixture
def replicas(connected: Any, drive: Any) -> Callable[[Plan], Any]:
    """`async with replicas(plan) as (one, other)`: clients of two servers, with one clock.

    Their servers look at the database before every call, as over the network a guard has them do.
    """

    @asynccontextmanager
    async def running(plan: Plan) -> AsyncIterator[tuple[Any, Any]]:
        with connected(plan) as first, connected(plan) as second:
            async with drive(plan, first) as one, drive(plan, second) as other:
                for driver in (one, other):
                    for name in CALLS:
                        setattr(driver, name, looking_first(driver, getattr(driver, name)))
                yield one, other

    return running


def looking_first(driver: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    async def calling(*arguments: Any, **options: Any) -> Any:
        await driver.coordinator.federation.up_to_date()
        return await call(*arguments, **options)

    return calling


async def submit(driver: Any, name: str, number: int) -> Any:
    """As a client does: what a server cannot do for the moment is tried again."""
    while True:
        try:
            return await driver.submit(name, number, context(name, number), WEIGHTS[name])
        except (OperationalError, StateOvertaken):
            await asyncio.sleep(0.02)


async def status(driver: Any) -> Any:
    await driver.coordinator.federation.up_to_date()
    return await driver.coordinator.get_status(driver.members.peer("olga", "operator"))


async def test_one_federation_wherever_its_members_call(make_plan: MakePlan, replicas: Any) -> None:
    plan = make_plan(start_clients=3, experts=2, count=2)
    async with replicas(plan) as (one, other):
        homes = {"anna": one, "bert": other, "cleo": other}
        for name, home in homes.items():
            await home.join(name)
        assert one.federation_id == other.federation_id
        for number in (1, 2):
            for name, home in homes.items():
                await home.until_round(name, number)
                if number == 2:
                    ids = await home.nearest(name, 2, context(name, 1), 2)
                    assert len(await home.experts(name, 2, ids)) == 2
            homes = dict(zip(NAMES, (other, one, other) if number == 1 else (one, other, one), strict=True))
            for name, home in homes.items():
                await submit(home, name, number)
                await home.publish(name, number, context(name, number))
        for name, home in homes.items():
            await home.until(name, lambda view: view.phase == fed.FEDERATION_PHASE_FINISHED)
            np.testing.assert_allclose(await home.global_prompt(name), mean(2, *NAMES), rtol=1e-6)
        said = [await status(home) for home in (one, other)]
        assert said[0].rounds == said[1].rounds
        assert [(record.outcome, record.updates) for record in said[0].rounds] == [("closed", 3)] * 2


async def test_who_waits_at_one_hears_of_what_happens_at_the_other(make_plan: MakePlan, replicas: Any) -> None:
    async with replicas(make_plan(start_clients=3)) as (one, other):
        await one.join("anna")
        await other.join("bert")
        version = await one.settled("anna")
        waiting = asyncio.create_task(one.view("anna", seen=version, wait=10))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        began = time.monotonic()
        await other.join("cleo")
        assert (await waiting).version > version
        assert time.monotonic() - began < 2
        assert (await one.until_round("anna", 1)).selected


async def test_who_calls_another_server_is_not_silent(
    make_plan: MakePlan, replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleo calls one server alone; the other has never heard of her when a step could end without her."""
    plan = make_plan(**PATIENT, count=1)
    async with replicas(plan) as (one, other):
        server = other.coordinator.federation
        await one.join("cleo")
        await other.join("anna", "bert")
        await one.until_round("cleo", 1)
        await server.up_to_date()
        opened = server.state.open_round
        assert opened is not None
        later = replace(opened, step=2, parts={name: Part(step=1 + (name != "cleo")) for name in NAMES})
        monkeypatch.setattr(server, "_state", replace(server.state, open_round=later))
        server.liveness.forget("cleo")
        assert server._due_as_known_here() is Transition.END_STEP  # what it would do by itself
        assert await server._due() is None
        assert "cleo" in server.online()


@pytest.mark.slow
async def test_a_deadline_is_over_once(make_plan: MakePlan, replicas: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with replicas(make_plan(**PATIENT, count=9)) as (one, other):
        await one.join("anna", "bert")
        await other.join("cleo")
        for number in range(1, 9):
            await one.until_round("anna", number)
            await other.until_round("cleo", number)
            for name in ("anna", "bert"):
                await submit(one, name, number)
            one.clock.advance(60)  # both have the same clock
        await one.until_round("anna", 9)
        history = one.coordinator.federation.store.history()
    for number in range(1, 9):
        assert caplog.text.count(f"round {number} opened") == 1
        assert caplog.text.count(f"round {number} closed: cohort 3, updates 2") == 1
    assert [record.updates for record in history.rounds[:8]] == [2] * 8


RACES = 3


async def race(one: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """In each round the deadline is over while one server checks the last upload: the other ends the round if it can.

    For each round: whether that upload got a receipt, and whether it is in the mean.
    """
    check, loop = Aggregating._check, asyncio.get_running_loop()

    def held_up(self: Aggregating, open_round: OpenRound, uploads: Sequence[Any]) -> Any:
        refused = check(self, open_round, uploads)
        if any(upload.name == "cleo" for upload in uploads) and one.clock.now() < open_round.deadline:
            loop.call_soon_threadsafe(one.clock.advance, 60)
            until = time.monotonic() + 0.5
            while one.coordinator.federation.state.rounds_completed < open_round.number and time.monotonic() < until:
                time.sleep(0.01)
        return refused

    monkeypatch.setattr(Aggregating, "_check", held_up)
    await one.join("anna", "bert")
    await other.join("cleo")
    found = []
    for number in range(1, RACES + 1):
        await one.until_round("anna", number)
        await other.until_round("cleo", number)
        for name in ("anna", "bert"):
            await submit(one, name, number)
        try:
            await submit(other, "cleo", number)
            accepted = True
        except MessageRejected:
            accepted = False
        await one.until_round("anna", number + 1)
        prompt = await one.global_prompt("anna", number + 1)
        assert prompt is not None
        means = [mean(number, *names) for names in (NAMES[:2], NAMES)]
        (inside,) = [row for row, oracle in enumerate(means) if np.allclose(prompt, oracle, rtol=1e-5, atol=1e-8)]
        found.append((accepted, bool(inside)))
    return found


def without_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfed_server.shared_store.lock", lambda connection: None)
    monkeypatch.setattr("pfed_server.shared_store.unlock", lambda connection: None)


def without_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are counted, and none is refused."""
    monkeypatch.setattr(sql_store, "count_change", lambda session, known, **how: count_change(session, None, **how))


async def test_an_upload_with_a_receipt_is_in_the_mean(
    make_plan: MakePlan, replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replicas(make_plan(**PATIENT, count=RACES + 1)) as (one, other):
        assert await race(one, other, monkeypatch) == [(True, True)] * RACES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "always", "sometimes"),
    [
        pytest.param([without_count], {(True, True)}, (True, True), id="the lock alone keeps it so"),
        pytest.param(
            [without_lock],
            {(False, False), (True, True)},
            (False, False),
            id="the count alone refuses what is too late",
        ),
        pytest.param(
            [without_lock, without_count],
            {(False, False), (True, True), (True, False)},
            (True, False),
            id="without both a receipt is worth nothing",
        ),
    ],
)
async def test_what_each_protection_is_for(
    make_plan: MakePlan,
    replicas: Any,
    monkeypatch: pytest.MonkeyPatch,
    missing: list[Callable[[pytest.MonkeyPatch], None]],
    always: set[tuple[bool, bool]],
    sometimes: tuple[bool, bool],
) -> None:
    """What the races may come to, and what one of them at least comes to; who is first is up to the machine."""
    for without in missing:
        without(monkeypatch)
    async with replicas(make_plan(**PATIENT, count=RACES + 1)) as (one, other):
        found = await race(one, other, monkeypatch)
    assert set(found) <= always
    assert sometimes in found


@pytest.fixture
def slowly_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message takes a while to be checked, as one of a large cohort does: time for somebody else to be faster."""
    inner = Aggregating._check

    def check(self: Aggregating, *arguments: Any) -> Any:
        time.sleep(0.03)
        return inner(self, *arguments)

    monkeypatch.setattr(Aggregating, "_check", check)


@pytest.mark.slow
@pytest.mark.usefixtures("slowly_checked")
async def test_the_same_upload_at_both_counts_once_and_of_two_different_ones_one_is_taken(
    make_plan: MakePlan, replicas: Any
) -> None:
    async with replicas(make_plan(**PATIENT, count=9)) as (one, other):
        await one.join("anna", "bert")
        await other.join("cleo")
        for number in range(1, 9):
            await one.until_round("anna", number)
            await other.until_round("cleo", number)
            await submit(one, "anna", number)
            if number % 2:
                receipts = await asyncio.gather(*(submit(home, "bert", number) for home in (one, other)))
                assert receipts[0] == receipts[1]
                sent = context("bert", number)
            else:
                versions = [(one, context("bert", number)), (other, context("bert", number + 100))]
                uploads = (home.submit("bert", number, content, WEIGHTS["bert"]) for home, content in versions)
                results = await asyncio.gather(*uploads, return_exceptions=True)
                taken = [not isinstance(result, Exception) for result in results]
                assert sorted(taken) == [False, True]
                assert any(isinstance(result, MessageRejected) for result in results)
                sent = versions[taken.index(True)][1]
            await submit(other, "cleo", number)
            await one.until_round("anna", number + 1)
            contexts = [context("anna", number), sent, context("cleo", number)]
            oracle = np.average([each.astype(np.float64) for each in contexts], axis=0, weights=list(WEIGHTS.values()))
            np.testing.assert_allclose(await one.global_prompt("anna", number + 1), oracle, rtol=1e-5, atol=1e-8)


async def test_a_second_query_of_matching_is_refused_at_the_other_server_too(
    make_plan: MakePlan, replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer tells of others' sketches where matching is encrypted: two servers must not give two of them."""
    monkeypatch.setattr(PlainServerMatching, "one_query", True)
    async with replicas(make_plan(start_clients=3)) as (one, other):
        await one.join("anna", "bert")
        await other.join("cleo")
        await other.until_round("anna", 1)
        await one.nearest("anna", 1, context("anna", 1), 2)
        await other.nearest("anna", 1, context("anna", 1), 2)  # the same again, say after a crash
        with pytest.raises(MessageRejected, match="anna has already sent another query in round 1"):
            await other.nearest("anna", 1, context("anna", 2), 2)
        with pytest.raises(MessageRejected, match="anna has already sent another query in round 1"):
            await one.nearest("anna", 1, context("anna", 3), 2)


async def test_a_name_is_taken_at_both(make_plan: MakePlan, replicas: Any) -> None:
    async with replicas(make_plan(start_clients=3)) as (one, other):
        await one.join("anna")
        with pytest.raises(NameTaken, match="another process takes part as anna"):
            await other.join("anna", instance="2")
        await other.join("anna")  # the process itself, which turned to the other server
        await other.coordinator.leave(other.members.peer("anna"), fed.LeaveRequest(instance_id="1"))
        await one.join("anna", instance="2")


@asynccontextmanager
async def in_real_time(plan: Plan, store: PostgresStore, members: Any) -> AsyncIterator[Coordinator]:
    coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=members.server.authority, clock=SystemClock())
    await coordinator.start()
    try:
        yield coordinator
    finally:
        await coordinator.stop()


@pytest.mark.slow
async def test_who_is_there_is_known_at_both_and_after_a_start(
    make_plan: MakePlan, connected: Any, members: Any
) -> None:
    plan = make_plan(start_clients=9, heartbeat_seconds=0.5)  # nobody is gone before three seconds are over

    async def join(at: Coordinator, name: str) -> None:
        request = fed.JoinRequest(plan_digest=plan.digest(), instance_id="1")
        await at.join(members.peer(name), request)

    async def until(online: set[str], *servers: Coordinator) -> None:
        async with asyncio.timeout(20):
            while any(each.federation.online() != online for each in servers):
                await asyncio.sleep(0.02)

    with connected(plan) as first, connected(plan) as second, connected(plan) as third:
        async with in_real_time(plan, first, members) as one, in_real_time(plan, second, members) as other:
            await join(one, "anna")
            await join(other, "bert")
            await until({"anna", "bert"}, one, other)
            beating = asyncio.create_task(beat(partial(other.heartbeat, members.peer("bert"))))
            await until({"bert"}, one, other)
            async with in_real_time(plan, third, members) as late:
                assert late.federation.online() == {"bert"}, "somebody was there to hear who is silent"
                await join(late, "anna")
                await until({"anna", "bert"}, one, other, late)
            beating.cancel()
            await until(set(), one, other)
        # Nobody could be heard of meanwhile, as far as it knows.
        async with in_real_time(plan, first, members) as alone:
            assert alone.federation.online() == {"anna", "bert"}


async def beat(heartbeat: Callable[[fed.HeartbeatRequest], Any]) -> None:
    while True:
        await heartbeat(fed.HeartbeatRequest(instance_id="1"))
        await asyncio.sleep(0.1)


async def test_what_counts_is_told_where_the_round_ends(make_plan: MakePlan, replicas: Any) -> None:
    """Bytes that a server has counted of a round which another one closed do not go to the next."""
    async with replicas(make_plan(start_clients=3, experts=0)) as (one, other):
        await one.join("anna", "bert")
        await other.join("cleo")
        await other.until_round("cleo", 1)
        await other.global_prompt("anna", 1)
        with pytest.raises(MessageRejected):
            await other.coordinator.submit_step(other.members.peer("anna"), 1, 1, b"x" * 1000)
        for name in NAMES:
            await submit(one, name, 1)
        await other.until_round("cleo", 2)
        await submit(other, "anna", 2)
        said = await status(one)
        sizes = [len(one.contribution(context(name, 1), WEIGHTS[name])) for name in NAMES]
        first, second = (record.bytes_received for record in said.rounds)
        assert first in (sum(sizes), sum(sizes) + 1000)  # with them where the server that has them closed it
        assert second == sizes[0]


async def test_looks_are_shared_and_none_is_older_than_the_question() -> None:
    began: list[int] = []
    gate = asyncio.Event()

    async def look() -> None:
        began.append(len(began))
        await gate.wait()

    looks = Looks(look)
    first = asyncio.create_task(looks())
    await asyncio.sleep(0.01)
    late = [asyncio.create_task(looks()) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert began == [0], "the first is under way, and the others cannot do with it"
    gate.set()
    await asyncio.gather(first, *late)
    assert began == [0, 1]

    async def fails() -> None:
        raise OSError("the database is away")

    looks = Looks(fails)
    results = await asyncio.gather(*(looks() for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["the database is away"] * 3
    await looks.end()
