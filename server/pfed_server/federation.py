"""A federation under way: its state, who is online, and the transitions that time and the clients' calls bring about.

What is true is in the store; `state` is the store's answer to the last change. All access to the store goes through
`exclusively`, one step after the other, also where several servers share the store. One task makes all transitions, so
that a call never waits for an aggregation that it happened to complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

from pfed_server import events
from pfed_server.clock import Clock
from pfed_server.liveness import Liveness
from pfed_server.messages import NONE, RoundReader
from pfed_server.news import News
from pfed_server.replicas import Looks, Presence
from pfed_server.rounds import Transition, draw_cohort, due_transition, moved, open_number, senders, summary
from pfed_server.store import Closing, OpenRound, State, Store, Traffic
from pfedsecure.aggregation.interface import ServerAggregation, ServerAggregationRound
from pfedsecure.console import one_line
from pfedsecure.errors import MessageRejected
from pfedsecure.plan import Plan
from pfedsecure.wire.tensors import to_tensor

T = TypeVar("T")

SHOWN_NAMES = 10
"""How many of a cohort's names a line of the log holds."""

_logger = logging.getLogger(__name__)


class Federation:
    """One federation on one store. Between `start` and `stop` it makes its transitions by itself.

    `tell` hears of all that happens.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        aggregation: ServerAggregation,
        clock: Clock,
        tell: events.Listener = events.nobody,
    ) -> None:
        self.plan = plan
        self.tell = tell
        self.clock = clock
        self.liveness = Liveness(clock, plan.rounds.heartbeat_seconds)
        self.store = store
        self.aggregation = aggregation
        self._state = store.load()
        self._lock = asyncio.Lock()
        self._steps: set[asyncio.Task[object]] = set()
        self._news = News(self._state.version)
        self._wake = asyncio.Event()
        self._announced_online: frozenset[str] = frozenset()
        self._traffic: dict[str, Traffic] = {}
        self._reader = RoundReader(store, aggregation)
        self._tasks: set[asyncio.Task[None]] = set()
        self._shared = shared = store.shared
        every = plan.rounds.heartbeat_seconds
        self._presence = None if shared is None else Presence(shared, self.liveness, clock, every)
        self._looks = Looks(self._look)
        self._when_changed: list[Callable[[State, State], None]] = []

    @property
    def state(self) -> State:
        return self._state

    def online(self) -> frozenset[str]:
        """The members that take part and have been heard of lately."""
        return self.liveness.online() & self._taking_part()

    @property
    def clients_online(self) -> int:
        """How many were online when the state's version last grew: what belongs to that version."""
        return len(self._announced_online)

    def seconds_left(self) -> float:
        """Seconds until the deadline of the open round's open step; 0 when no round is open."""
        open_round = self._state.open_round
        return 0.0 if open_round is None else max(open_round.deadline - self.clock.now(), 0.0)

    async def start(self) -> None:
        """Go on where the store is: every member counts as just heard of, and what is due by now is done at once.

        Who was heard of is known where another server of the federation was there meanwhile.
        """
        await self.exclusively(self._begin)
        await self.exclusively(self._advance)
        self._tasks.add(asyncio.create_task(self._drive()))
        if self._shared is not None:
            self._tasks.add(asyncio.create_task(self._looks.keep_looking()))

    def end_waits(self) -> None:
        """`newer_than` returns at once from now on."""
        self._news.end()

    async def stop(self) -> None:
        """End waits and transitions; steps under way are finished."""
        self.end_waits()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._looks.end()
        await asyncio.gather(*self._steps, return_exceptions=True)

    async def exclusively(self, step: Callable[[], Awaitable[T]]) -> T:
        """Run a step while no other runs, here or at another server, to its end even if the caller is cancelled.

        Otherwise a client that hangs up during a commit would leave `state` behind the store. When the step begins
        `state` has what all servers have changed.
        """

        async def run() -> T:
            async with self._lock:
                if self._shared is None:
                    return await step()
                self._take_over(await asyncio.to_thread(self._shared.acquire))
                try:
                    return await step()
                finally:
                    await asyncio.to_thread(self._shared.release)

        task = asyncio.create_task(run())
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        return await asyncio.shield(task)

    async def change(self, transaction: Callable[[], State]) -> None:
        """Run a transaction of the store in a thread and take over the state after it. Only inside `exclusively`."""
        self._take_over(await asyncio.to_thread(transaction))

    async def change_with(self, traffic: Mapping[str, Traffic], transaction: Callable[[], State]) -> None:
        """As `change`, of what was taken of members' accounts, which get it back when nothing came of it."""
        try:
            await self.change(transaction)
        except BaseException:
            for name, taken in traffic.items():
                self.count(name, received=taken.received, sent=taken.sent)
            raise

    async def up_to_date(self) -> None:
        """Return when `state` has all that any server had changed when this was called. Raises as the store does."""
        if self._shared is not None:
            await self._looks()

    def when_changed(self, listener: Callable[[State, State], None]) -> None:
        """Have `listener` told of every change of `state`, with the one before it, whoever made it."""
        self._when_changed.append(listener)

    def heard(self, name: str) -> None:
        """Note that a member called."""
        self.liveness.heard(name)
        if self._presence is not None:
            self._presence.heard(name)
        if name not in self._announced_online:
            self._wake.set()

    def forget(self, name: str) -> None:
        """Count a member as offline at once."""
        self.liveness.forget(name)
        self._wake.set()

    async def share_presence(self) -> None:
        """Know of members that another server has just heard of, and have it know of others. Inside `exclusively`."""
        if self._presence is not None:
            await self._presence.share(self._state.members)

    async def newer_than(self, version: int, seconds: float | None) -> None:
        """Return when the state's version is not `version`, after `seconds`, or when the server stops.

        At once when a round or one of its steps began or ended. Of who is there, which nobody acts on, callers are told
        as often as `news` has it, and when their time is over.
        """
        until = None if seconds is None else self.clock.monotonic() + seconds
        while self._news.must_wait(version):
            left = None if until is None else until - self.clock.monotonic()
            if left is not None and left <= 0:
                return
            with self._news.change() as change:
                await self.clock.wait(change, left)

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
                if self._is_due():  # where there are several servers most of it is done by another
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
        if self._presence is not None:
            times.append(self._presence.seconds_until_due())
        return min((seconds for seconds in times if seconds is not None), default=None)

    async def _advance(self) -> None:
        """Make every transition that is due, and tell the clients when the number of those online has changed."""
        if self._presence is not None and self._presence.is_due(self._announced_online):
            await self.share_presence()
        while (transition := await self._due()) is not None:
            if transition is Transition.OPEN_ROUND:
                await self._open_round(self._state.last_round + 1)
            elif (open_round := self._state.open_round) is not None:
                await self._end_step(open_round)
        if self._announced_online != self.online():
            await self.change(self.store.touch)

    async def _due(self) -> Transition | None:
        """What has to happen now. Nobody is silent to one server who was heard of by another."""
        due = self._due_as_known_here()
        if due is not None and self._presence is not None:
            await self.share_presence()
            due = self._due_as_known_here()
        return due

    def _due_as_known_here(self) -> Transition | None:
        return due_transition(self.plan, self._state, self.online(), self.clock.now())

    async def _open_round(self, number: int) -> None:
        opened_at = self.clock.now()
        seconds = self.plan.rounds.deadline_seconds
        cohort = draw_cohort(self.plan, number, self.online())
        await self.change(partial(self.store.open_round, number, opened_at, opened_at + seconds, cohort))
        names = ", ".join(cohort[:SHOWN_NAMES]) + (", ..." if len(cohort) > SHOWN_NAMES else "")
        _logger.info(
            "round %d opened: %d clients (%s) have %g s", number, len(cohort), names, seconds, extra={"round": number}
        )
        epochs = sorted({pooled.epoch for pooled in self._state.pooled.values()} - {0})
        wiring = await asyncio.to_thread(self.aggregation.wiring, len(cohort))
        await self.tell(events.round_opened(self.plan, number, len(cohort), epochs, wiring, seconds))

    def aggregation_round(self, open_round: OpenRound, arriving: Mapping[str, bytes] = NONE) -> ServerAggregationRound:
        """As `RoundReader.round`. Reads the store: only inside `exclusively`, in a thread."""
        return self._reader.round(self._state.federation_id, open_round, arriving)

    async def _end_step(self, ending: OpenRound) -> None:
        """Open the next step, close the round, or abandon it."""
        closing = await asyncio.to_thread(self._outcome, ending)
        if closing is not None:
            await self._close_round(ending, closing)
            return
        deadline = self.clock.now() + self.plan.rounds.step_seconds
        await self.change(partial(self.store.open_step, ending.number, ending.step + 1, deadline))

    def _outcome(self, ending: OpenRound) -> Closing | None:
        """How the round ends with its open step; None when there is another step."""
        try:
            return self._closing(ending)
        except MessageRejected as refused:
            # Also what only `check` should raise: no member may stop the federation, and the messages stay the same.
            said = one_line(str(refused))
            _logger.warning("round %d is lost: %s", ending.number, said, extra={"round": ending.number})
            return Closing()

    def _closing(self, ending: OpenRound) -> Closing | None:
        """As `_outcome`; raises MessageRejected for a round that is lost."""
        aggregation = self.aggregation_round(ending)
        if not aggregation.ready(ending.step):
            _logger.info(
                "round %d cannot go on: %d of %d clients are in it after step %d of %d",
                ending.number,
                len(senders(ending, ending.step)),
                len(ending.parts),
                ending.step,
                self.aggregation.steps,
                extra={"round": ending.number},
            )
            return Closing()
        if ending.step < self.aggregation.steps:
            return None
        aggregate = aggregation.result()
        if aggregate.culprits:
            names = ", ".join(aggregate.culprits)
            _logger.warning("round %d: wrong shares from %s", ending.number, names, extra={"round": ending.number})
        prompt = to_tensor(aggregate.context).SerializeToString(deterministic=True)
        return Closing(prompt, aggregate.metrics, aggregate.culprits)

    async def _close_round(self, ending: OpenRound, closing: Closing) -> None:
        traffic = dict(self._traffic)
        await self.change(partial(self.store.close_round, ending.number, self.clock.now(), closing, traffic))
        record = (await asyncio.to_thread(self.store.history)).rounds[-1]
        _logger.info("%s", summary(record), extra={"round": record.number})
        dropouts = Counter(part.step + 1 for part in ending.parts.values() if part.step < ending.step)
        await self.tell(events.round_ended(record, dropouts, closing.culprits))
        if self._state.rounds_completed >= self.plan.rounds.count:
            _logger.info("finished: %d rounds completed", self._state.rounds_completed)

    def _taking_part(self) -> frozenset[str]:
        return frozenset(name for name, member in self._state.members.items() if member.taking_part)

    async def _begin(self) -> None:
        if self._presence is None:
            self.liveness.learn(dict.fromkeys(self._taking_part(), 0.0))
        else:
            await self._presence.begin(self._taking_part())

    def _is_due(self) -> bool:
        """Whether `_advance` has something to do, as far as is known here."""
        if self._presence is not None and self._presence.is_due(self._announced_online):
            return True
        return self._due_as_known_here() is not None or self.online() != self._announced_online

    async def _look(self) -> None:
        """Take over what other servers have changed."""
        assert self._shared is not None
        if not await asyncio.to_thread(self._shared.is_current, self._state):
            async with self._lock:
                self._take_over(await asyncio.to_thread(self._shared.refresh))

    def _take_over(self, state: State) -> None:
        before, self._state = self._state, state
        if state is before:
            return
        if open_number(state) != open_number(before):
            self._traffic.clear()
        if state.version != before.version:
            self._announced_online = self.online()
            self._news.tell(state.version, urgent=moved(before, state))
        self._wake.set()
        for listener in self._when_changed:
            listener(before, state)
