"""A federation under way: its state, who is online, and the transitions that time and the clients' calls bring about.

What is true is in the store; `state` is the store's answer to the last change. All access to the store goes through
`exclusively`, one step after the other. One task makes all transitions, so that a call never waits for an aggregation
that it happened to complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

from pfed_server.clock import Clock
from pfed_server.liveness import Liveness
from pfed_server.rounds import Transition, draw_cohort, due_transition
from pfed_server.store import OpenRound, RoundRecord, State, Store, Traffic
from pfedsecure.aggregation.factory import server_aggregation
from pfedsecure.plan import Plan
from pfedsecure.wire.tensors import to_tensor

T = TypeVar("T")

SHOWN_NAMES = 10
"""How many of a cohort's names a line of the log holds."""

_logger = logging.getLogger(__name__)


class Federation:
    """One federation on one store. Between `start` and `stop` it makes its transitions by itself."""

    def __init__(self, plan: Plan, store: Store, context_shape: tuple[int, int], clock: Clock) -> None:
        self.plan = plan
        self.clock = clock
        self.liveness = Liveness(clock, plan.rounds.heartbeat_seconds)
        self.store = store
        self._aggregation = server_aggregation(plan, context_shape)
        self._state = store.load()
        self._lock = asyncio.Lock()
        self._steps: set[asyncio.Task[object]] = set()
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._announced_online: frozenset[str] = frozenset()
        self._traffic: dict[str, Traffic] = {}
        self._stopping = False
        self._driver: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        return self._state

    def online(self) -> frozenset[str]:
        """The members that take part and have been heard of lately."""
        taking_part = {name for name, member in self._state.members.items() if member.taking_part}
        return self.liveness.online() & taking_part

    @property
    def clients_online(self) -> int:
        """How many were online when the state's version last grew: what belongs to that version."""
        return len(self._announced_online)

    def seconds_left(self) -> float:
        """Seconds until the open round's deadline; 0 when no round is open."""
        open_round = self._state.open_round
        return 0.0 if open_round is None else max(open_round.deadline - self.clock.now(), 0.0)

    async def start(self) -> None:
        """Go on where the store is: every member counts as just heard of, and what is due by now is done at once."""
        for member in self._state.members.values():
            if member.taking_part:
                self.liveness.heard(member.name)
        await self.exclusively(self._advance)
        self._driver = asyncio.create_task(self._drive())

    def end_waits(self) -> None:
        """`newer_than` returns at once from now on."""
        self._stopping = True
        self._announce()

    async def stop(self) -> None:
        """End waits and transitions; steps under way are finished."""
        self.end_waits()
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.wait({self._driver})
        await asyncio.gather(*self._steps, return_exceptions=True)

    async def exclusively(self, step: Callable[[], Awaitable[T]]) -> T:
        """Run a step while no other runs, to its end even if the caller is cancelled.

        Otherwise a client that hangs up during a commit would leave `state` behind the store.
        """

        async def run() -> T:
            async with self._lock:
                return await step()

        task = asyncio.create_task(run())
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        return await asyncio.shield(task)

    async def change(self, transaction: Callable[[], State]) -> None:
        """Run a transaction of the store in a thread and take over the state after it. Only inside `exclusively`."""
        before = self._state
        self._state = await asyncio.to_thread(transaction)
        if self._state.version != before.version:
            self._announced_online = self.online()
            self._announce()
        self._wake.set()

    def heard(self, name: str) -> None:
        """Note that a member called."""
        self.liveness.heard(name)
        if name not in self._announced_online:
            self._wake.set()

    def forget(self, name: str) -> None:
        """Count a member as offline at once."""
        self.liveness.forget(name)
        self._wake.set()

    async def newer_than(self, version: int, seconds: float | None) -> None:
        """Return when the state's version is not `version`, after `seconds`, or when the server stops."""
        until = None if seconds is None else self.clock.monotonic() + seconds
        while self._state.version == version and not self._stopping:
            left = None if until is None else until - self.clock.monotonic()
            if left is not None and left <= 0:
                return
            await self.clock.wait(self._changed, left)

    def count(self, name: str, *, received: int = 0, sent: int = 0) -> None:
        """Add payload bytes to the account of a member; only those of the open round's cohort have one."""
        if self._state.open_round is not None and name in self._state.open_round.parts:
            self._traffic[name] = self._traffic.get(name, Traffic()) + Traffic(received, sent)

    def take_traffic(self, name: str) -> Traffic:
        """What was counted of a member and is not stored yet; it is the caller's to store."""
        return self._traffic.pop(name, Traffic())

    async def _drive(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.exclusively(self._advance)
                pause = self._seconds_until_due()
            except Exception:
                # The store cannot write, say because the disk is full. Nothing is lost by trying again.
                _logger.exception("a transition failed; trying again")
                pause = self.plan.rounds.heartbeat_seconds
            await self.clock.wait(self._wake, pause)

    def _seconds_until_due(self) -> float | None:
        # Of those announced, not of those online: somebody may have gone offline since the last look at it.
        times = [self.liveness.seconds_until_one_is_offline(self._announced_online)]
        if self._state.open_round is not None:
            times.append(self.seconds_left())
        return min((seconds for seconds in times if seconds is not None), default=None)

    async def _advance(self) -> None:
        """Make every transition that is due, and tell the clients when the number of those online has changed."""
        while (transition := due_transition(self.plan, self._state, self.online(), self.clock.now())) is not None:
            if transition is Transition.OPEN:
                await self._open_round(self._state.last_round + 1)
            elif (closing := self._state.open_round) is not None:
                await self._close_round(closing, abandon=transition is Transition.ABANDON)
        if self._announced_online != self.online():
            await self.change(self.store.touch)

    async def _open_round(self, number: int) -> None:
        opened_at = self.clock.now()
        seconds = self.plan.rounds.deadline_seconds
        cohort = draw_cohort(self.plan, number, self.online())
        self._traffic.clear()
        await self.change(partial(self.store.open_round, number, opened_at, opened_at + seconds, cohort))
        names = ", ".join(cohort[:SHOWN_NAMES]) + (", ..." if len(cohort) > SHOWN_NAMES else "")
        _logger.info("round %d opened: %d clients (%s) have %g s", number, len(cohort), names, seconds)

    async def _close_round(self, closing: OpenRound, *, abandon: bool) -> None:
        prompt = None
        if not abandon:
            updates = await asyncio.to_thread(self.store.updates, closing.number)
            prompt = await asyncio.to_thread(self._combine, updates)
        traffic = dict(self._traffic)
        await self.change(partial(self.store.close_round, closing.number, self.clock.now(), prompt, traffic))
        self._traffic.clear()
        history = await asyncio.to_thread(self.store.history)
        _logger.info("%s", _summary(history.rounds[-1], self.plan.rounds.minimum_cohort))
        if self._state.rounds_completed >= self.plan.rounds.count:
            _logger.info("finished: %d rounds completed", self._state.rounds_completed)

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _combine(self, updates: Mapping[str, bytes]) -> bytes:
        return to_tensor(self._aggregation.combine(updates).context).SerializeToString(deterministic=True)


def _summary(record: RoundRecord, minimum: int) -> str:
    head = f"round {record.number} {record.outcome}: cohort {record.cohort}, updates {record.updates}"
    if record.outcome == "abandoned":
        return f"{head}, {minimum} needed; nothing was combined or revealed"
    traffic = record.traffic
    return f"{head}, {record.seconds:.1f} s, {traffic.received:,} bytes received, {traffic.sent:,} sent"
